// Package kubeapi is the little of the Kubernetes API that the launcher itself
// needs. It knows no types: objects are values that encode to JSON.
package kubeapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// Client talks to one API server as the administrator.
type Client struct {
	http *http.Client
	base string
}

// New makes a client for the server at address host:port with the certificates
// in dir.
func New(dir, address string) (*Client, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "admin.crt"), filepath.Join(dir, "admin.key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &Client{
		base: "https://" + address,
		http: &http.Client{
			Timeout:   10 * time.Second,
			Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}},
		},
	}, nil
}

// Ready asks /readyz.
func (c *Client) Ready(ctx context.Context) error { return c.do(ctx, "GET", "/readyz", nil, nil) }

// Get decodes the object or list at path.
func (c *Client) Get(ctx context.Context, path string, into any) error {
	return c.do(ctx, "GET", path, nil, into)
}

// Create posts body to a collection; an object that exists is fine.
func (c *Client) Create(ctx context.Context, path string, body any) error {
	err := c.do(ctx, "POST", path, body, nil)
	if s, ok := err.(*StatusError); ok && s.Code == http.StatusConflict {
		return nil
	}
	return err
}

// PatchStatus merges body into the status of the object at path.
func (c *Client) PatchStatus(ctx context.Context, path string, body any) error {
	return c.do(ctx, "PATCH", path+"/status", body, nil)
}

// StatusError is an answer that is not a success.
type StatusError struct {
	Code    int
	Request string
	Message string
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s: status %d: %s", e.Request, e.Code, e.Message)
}

func (c *Client) do(ctx context.Context, method, path string, body, into any) error {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, r)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if method == "PATCH" {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return &StatusError{resp.StatusCode, method + " " + path, string(b)}
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(b, into)
}
