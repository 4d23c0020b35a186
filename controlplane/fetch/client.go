package fetch

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

const (
	redirects   = 3
	headerBytes = 64 << 10
)

// Config is what a Client fetches, and how.
type Config struct {
	What     string // in errors, of several: "keys"
	Accept   string // media types
	MaxBytes int64  // of an answer
	Within   time.Duration
	// NoPlain says why nothing is fetched without TLS; empty, it is.
	NoPlain string
	// Transport is by what it is fetched; nil: [Guarded] by what the system has.
	Transport http.RoundTripper
}

// Client fetches from addresses that anybody may have written.
type Client struct {
	Config
	client *http.Client
}

// NewClient returns one.
func NewClient(c Config) *Client {
	if c.Transport == nil {
		c.Transport = Guarded(NewDialer(), nil)
	}
	out := &Client{Config: c}
	out.client = &http.Client{Timeout: c.Within, Transport: c.Transport, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		if len(via) > redirects {
			return errors.New("it is redirected too often")
		}
		return out.allowed(r.URL)
	}}
	return out
}

// HTTP is the client that it fetches by, for libraries that speak a protocol of their own. Whatever it is asked for is judged.
func (c *Client) HTTP() *http.Client {
	out := *c.client
	out.Transport = judged{c}
	return &out
}

// judged judges each request, and not only those that are redirected.
type judged struct{ *Client }

func (j judged) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := j.allowed(r.URL); err != nil {
		return nil, err
	}
	return j.Transport.RoundTrip(r)
}

// Guarded connects by a dialer. A proxy of the environment would connect to what it likes.
func Guarded(d Dialer, trust *tls.Config) http.RoundTripper {
	return &http.Transport{
		DialContext: d.DialContext, TLSClientConfig: trust, DisableKeepAlives: true, ForceAttemptHTTP2: true,
		TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: 10 * time.Second, MaxResponseHeaderBytes: headerBytes,
	}
}

// allowed judges an address as far as it is written.
func (c *Client) allowed(u *url.URL) error {
	switch {
	case u.Scheme == "https" || u.Scheme == "http" && c.NoPlain == "":
	case u.Scheme == "http":
		return fmt.Errorf("%s are not fetched without TLS: %s", c.What, c.NoPlain)
	default:
		return fmt.Errorf("%s cannot be fetched by %q", c.What, u.Scheme)
	}
	if u.Hostname() == "" {
		return errors.New("the address has no host")
	}
	if u.User != nil {
		return errors.New("the address has a user name or a password in it, which everybody can read who reads the object")
	}
	return nil
}

// Get fetches what is at an address. Errors show nothing of what was answered.
func (c *Client) Get(ctx context.Context, at string) ([]byte, error) {
	u, err := url.Parse(at)
	if err != nil {
		return nil, errors.New("the address is not one of the form https://host/path")
	}
	if err := c.allowed(u); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", c.Accept)
	res, err := c.client.Do(req)
	if err != nil {
		var at *url.Error
		if errors.As(err, &at) { // it repeats the address
			err = at.Err
		}
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the answer is %d", res.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, c.MaxBytes+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > c.MaxBytes {
		return nil, fmt.Errorf("the answer has more than %d bytes", c.MaxBytes)
	}
	return b, nil
}
