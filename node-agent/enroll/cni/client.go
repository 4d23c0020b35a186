package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
)

// ErrAway means that no agent answered: it is not installed, restarting, or hung.
var ErrAway = errors.New("the node agent does not answer")

// Client asks the agent. It makes a connection for each request.
type Client struct{ Socket string }

// Do sends one request. An error that is not ErrAway is the agent's own word.
func (c Client) Do(ctx context.Context, path string, req Request) (Response, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return Response{}, err
	}
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", c.Socket)
		},
		DisableKeepAlives: true,
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return Response{}, err
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := t.RoundTrip(r)
	if err != nil {
		return Response{}, fmt.Errorf("%w at %s: %w", ErrAway, c.Socket, err)
	}
	defer resp.Body.Close()
	var out Response
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil {
		err = json.Unmarshal(b, &out)
	}
	if err != nil { // killed while it answered
		return Response{}, fmt.Errorf("%w at %s: %w", ErrAway, c.Socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		if out.Error == "" {
			out.Error = resp.Status
		}
		return Response{}, errors.New(out.Error)
	}
	return out, nil
}
