package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"k8s.io/client-go/kubernetes/fake"

	corev1 "k8s.io/api/core/v1"
)

// told is what the agents of the session tell: one by the client's node, the other by the server's.
var told = map[string][]string{
	"warren-node-a": {
		`{"time":"2026-01-02T03:04:05.006Z","event":"open","direction":"outbound","id":1,"source":{"address":"10.1.0.5:40000","namespace":"shop","pod":"ui-1","workload":"ui","identity":"spiffe://cluster.local/ns/shop/sa/ui"},"destination":{"address":"10.1.1.6:8080","namespace":"shop","pod":"catalog-1","workload":"catalog"},"asked":"10.96.0.7:80","service":"catalog.shop.svc.cluster.local","path":"tunnel"}`,
		`{"time":"2026-01-02T03:04:05.1Z","event":"close","direction":"outbound","id":1,"source":{"address":"10.1.0.5:40000","namespace":"shop","pod":"ui-1"},"destination":{"address":"10.1.1.6:8080","namespace":"shop","pod":"catalog-1"},"asked":"10.96.0.7:80","service":"catalog.shop.svc.cluster.local","path":"tunnel","outcome":"completed","bytesSent":120,"bytesReceived":5000,"durationMs":94}`,
		`{"time":"2026-01-02T03:04:06Z","event":"failed","direction":"outbound","source":{"address":"10.1.0.5:40001","namespace":"shop","pod":"ui-1"},"destination":{},"asked":"10.96.0.8:80","service":"bank.bank.svc.cluster.local","path":"plaintext","outcome":"route_refused","error":"no route to 10.96.0.8:80: no_endpoint"}`,
	},
	"warren-node-b": {
		`{"time":"2026-01-02T03:04:07Z","event":"failed","direction":"inbound","source":{"address":"192.0.2.1:5"},"destination":{"address":"10.1.1.6:8080","namespace":"shop","pod":"catalog-1"},"path":"plaintext","outcome":"policy_denied","error":"deny_policy by policy shop/strict"}`,
	},
}

// tapped runs the command against agents that tell lines and then nothing; asked are the paths.
func tapped(t *testing.T, lines map[string][]string, args ...string) (code int, stdout, stderr string, asked []string) {
	t.Helper()
	var out, errs bytes.Buffer
	a := &app{env: Env{Program: "warren", Args: args, Version: "test", Out: &out, Err: &errs}}
	a.connect = func(*app) (*conn, error) {
		return &conn{Interface: fake.NewClientset(installed()...), stream: func(ctx context.Context, p *corev1.Pod, port int, path string) (io.ReadCloser, error) {
			if port != adminPort {
				return nil, fmt.Errorf("port %d is asked", port)
			}
			asked = append(asked, p.Name+" "+path)
			if lines[p.Name] == nil {
				return nil, &answerError{pod: p.Name, path: path, status: 404}
			}
			r, w := io.Pipe()
			go func() {
				for _, l := range lines[p.Name] {
					if _, err := io.WriteString(w, l+"\n"); err != nil {
						return
					}
				}
			}()
			return r, nil
		}}, nil
	}
	code = a.main(t.Context())
	return code, out.String(), errs.String(), asked
}

func TestTap(t *testing.T) {
	session(t, "testdata/tap.txtar", func(t *testing.T, args ...string) (int, string, string) {
		code, out, errs, _ := tapped(t, told, args...)
		return code, out, errs
	})
}

func TestTapAsksForWhatIsWanted(t *testing.T) {
	_, _, _, asked := tapped(t, told, "tap", "shop", "--to", "shop/catalog:80", "--verdict", "denied", "--node", "node2", "-c", "1")
	if len(asked) != 1 {
		t.Fatal(asked)
	}
	name, query, _ := strings.Cut(asked[0], "?")
	q, err := url.ParseQuery(query)
	if err != nil || name != "warren-node-b /connections/watch" || len(q) != 3 || q.Get("of") != "shop" || q.Get("to") != "shop/catalog:80" || q.Get("verdict") != "denied" {
		t.Errorf("asked %v", asked)
	}
	if code, _, errs, _ := tapped(t, map[string][]string{"warren-node-a": {}}, "tap"); code != ExitError || !strings.Contains(errs, "the agent on node2 is of a version that does not tell") {
		t.Errorf("code %d: %s", code, errs)
	}
}

// An agent that ends is not the end: its successor is asked.
func TestTapGoesOnWithASuccessor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out, errs bytes.Buffer
		a := &app{env: Env{Program: "warren", Args: []string{"tap", "--node", "node1", "-c", "2", "-o", "json"}, Out: &out, Err: &errs}}
		var times atomic.Int32
		k := fake.NewClientset(installed()...)
		a.connect = func(*app) (*conn, error) {
			return &conn{Interface: k, stream: func(context.Context, *corev1.Pod, int, string) (io.ReadCloser, error) {
				switch times.Add(1) {
				case 2:
					return nil, fmt.Errorf("no agent is there")
				default:
					return io.NopCloser(strings.NewReader(told["warren-node-a"][0] + "\n")), nil
				}
			}}, nil
		}
		if code := a.main(t.Context()); code != ExitOK || strings.Count(out.String(), `"node":"node1"`) != 2 || times.Load() != 3 {
			t.Errorf("code %d after %d streams\n%s%s", code, times.Load(), out.String(), errs.String())
		}
		for _, want := range []string{"node1: the agent has ended; asking the agent there again", "node1: no agent is there", "node1: watching again", "2 opened, 0 closed, 0 failed"} {
			if !strings.Contains(errs.String(), want) {
				t.Errorf("%q is not said:\n%s", want, errs.String())
			}
		}
	})
}
