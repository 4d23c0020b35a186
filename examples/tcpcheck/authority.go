package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// authority is what policies ask: it serves a key set, and decides about requests as Envoy's external authorization does.
func authority(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("authority", flag.ContinueOnError)
	keys := fs.String("keys", `{"keys":[]}`, "the key set")
	if err := fs.Parse(args); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, *keys) })
	failed := make(chan error, 2)
	go func() { failed <- http.ListenAndServe(fmt.Sprintf(":%d", portKeys), mux) }()
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", portDecides))
	if err != nil {
		return err
	}
	g := grpc.NewServer()
	authv3.RegisterAuthorizationServer(g, decides{})
	go func() { failed <- g.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}

// decides lets in requests that say x-ask: yes, and tells the application so.
type decides struct{}

func (decides) Check(_ context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	req := r.GetAttributes().GetRequest().GetHttp()
	if req.GetHeaders()["x-ask"] != "yes" {
		return &authv3.CheckResponse{
			Status: &status.Status{Code: int32(codes.PermissionDenied)},
			HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
				Status: &typev3.HttpStatus{Code: typev3.StatusCode_Forbidden}, Body: "the authority says no to " + req.GetPath(),
			}},
		}, nil
	}
	return &authv3.CheckResponse{
		Status: &status.Status{Code: int32(codes.OK)},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{Headers: []*corev3.HeaderValueOption{{
			Header: &corev3.HeaderValue{Key: "x-decided-by", Value: "the authority"},
		}}}},
	}, nil
}

// got is what get prints.
type got struct {
	Status int
	Body   string
}

// get asks for a page once, with headers.
func get(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("get", flag.ContinueOnError)
	header := http.Header{}
	fs.Func("header", "name=value", func(s string) error {
		name, value, _ := strings.Cut(s, "=")
		header.Add(name, value)
		return nil
	})
	if err := fs.Parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fs.Arg(0), nil)
	if err != nil {
		return err
	}
	req.Header = header
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	return report(got{res.StatusCode, string(body)})
}
