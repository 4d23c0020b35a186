// Command tcpcheck shows what TCP is like from inside a pod: servers with known manners, a client that checks
// them one by one, and a load that counts what failed and how. It knows nothing of the mesh, so that the
// same run with and without one can be compared.
//
//	tcpcheck serve            all servers, on the ports below
//	tcpcheck manners HOST     every check against the servers on HOST, as JSON
//	tcpcheck load HOST:PORT   new connections at a steady rate and some that stay open, as JSON
//	tcpcheck first HOST:PORT  an exchange, at once: the first thing this process does
//	tcpcheck who HOST:PORT    which server answers
//	tcpcheck decide NAME=HOST:PORT ...  whether connections are let in, again and again
//	tcpcheck ask IP:PORT ...      which servers answer a datagram
//	tcpcheck resolve IP:PORT ...  a name at these servers, again and again
//	tcpcheck authority        keys that verify tokens, and decisions about requests
//	tcpcheck get URL          a page, with headers
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// marker is planted in everything that is sent: whoever finds it on a wire has found it in clear.
const marker = "warren-demo-marker-7c1e"

// Ports of `tcpcheck serve`.
const (
	portEcho   = 9000 // a line with both addresses once the client has sent something, then what it sent; UDP: what it sent
	portGreet  = 9001 // speaks first
	portReset  = 9002 // resets the connection after the first byte
	portDigest = 9003 // reads to the end, answers with count and SHA-256
	portSource = 9004 // reads a number, sends that many bytes, then their SHA-256
	portHTTP   = 9005 // /healthz, /ends: how connections to 9007 ended, /headers: those of the request
	portGRPC   = 9006 // grpc.health.v1
	portEnds   = 9007 // reads an id, then remembers how the connection ended
	portStall  = 9008 // reads nothing for two seconds, then as portDigest
	portNobody = 9010 // nobody listens
)

// Ports of `tcpcheck authority`.
const (
	portKeys    = 9011 // /keys
	portDecides = 9012 // envoy.service.auth.v3
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	verbs := map[string]func(context.Context, []string) error{
		"serve": serve, "manners": manners, "load": load, "first": first, "who": who, "decide": decide, "ask": ask, "resolve": resolve, "requests": requests,
		"authority": authority, "get": get,
	}
	if len(os.Args) < 2 || verbs[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: tcpcheck serve|manners|load|first|who|decide|ask|resolve|requests|authority|get [flags] [HOST[:PORT]]")
		os.Exit(2)
	}
	if err := verbs[os.Args[1]](ctx, os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "tcpcheck:", err)
		os.Exit(1)
	}
}

func report(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }
