package xds

import (
	"context"
	"maps"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	rpc "google.golang.org/grpc/status"

	"github.com/warrenmesh/warren/api/node"
)

// Status is what the client knows about itself.
type Status struct {
	Connected bool
	Connects  uint64 // streams opened
	Revision  uint64 // of the Store's Snapshot
	Workloads int
	Services  int
	Policies  int
	Types     map[string]TypeStatus // by type URL

	Enforced    uint64 // the last revision that holds on this node, see Client.Enforced
	NotEnforced string // why a later one does not
	failed      uint64 // that later one
}

// TypeStatus is how far one type has come.
type TypeStatus struct {
	Applied   string // system_version_info of the last response applied without an error
	NACK      string // the error of the last response, if it was rejected
	Rejected  []string
	Resources int
	Responses uint64
	ACKs      uint64
	NACKs     uint64
}

// Status returns a copy.
func (c *Client) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.status
	s.Types = maps.Clone(s.Types)
	return s
}

func (c *Client) count(f func(*Status)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.status)
}

// Redirection is what the node's kernel does with a pod.
type Redirection uint8

const (
	RedirectionUnknown Redirection = iota
	RedirectionEnabled
	RedirectionPending
	RedirectionDisabled
)

// PodStatus is the truth about one pod, for the control plane to publish.
type PodStatus struct {
	UID             string
	Namespace       string
	Name            string
	Redirection     Redirection
	Reason          string
	OpenConnections int
}

// ReportPods sets what is reported about this node's pods: the whole set.
func (c *Client) ReportPods(pods []PodStatus) {
	c.mu.Lock()
	c.report.pods = slices.Clone(pods)
	c.mu.Unlock()
	c.report.kick()
}

// report is what goes to NodeStatus/Report.
type report struct {
	pods []PodStatus // guarded by Client.mu, as are the roots
	due  chan struct{}

	roots string // digest of those that OnTrust took
}

func (r *report) init() { r.due = make(chan struct{}, 1) }

func (r *report) kick() {
	select {
	case r.due <- struct{}{}:
	default:
	}
}

// coalesce is how long changes gather before they are reported.
const coalesce = 50 * time.Millisecond

// sendReports reports until ctx is done, or gives up where the control plane has no such service. The stream
// ends with the session.
func (c *Client) sendReports(ctx context.Context, conn *grpc.ClientConn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-c.yielded:
			cancel()
		case <-ctx.Done():
		}
	}()
	wait := backoffMin
	for {
		err := c.reportOn(ctx, conn)
		if ctx.Err() != nil {
			return
		}
		if rpc.Code(err) == codes.Unimplemented {
			c.cfg.Log.Info("the control plane takes no node status")
			return
		}
		c.cfg.Log.Warn("reporting the node's status", "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = min(wait*2, backoffMax)
	}
}

func (c *Client) reportOn(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := node.NewNodeStatusClient(conn).Report(ctx)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		var m node.StatusSummary
		ended <- stream.RecvMsg(&m) // returns when the control plane ends the stream or ctx does
	}()
	defer func() { cancel(); <-ended }()
	for {
		if err := stream.Send(c.statusReport()); err != nil {
			err = <-ended
			ended <- err
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			ended <- err
			return err
		case <-c.report.due:
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(coalesce):
		}
		select {
		case <-c.report.due:
		default:
		}
	}
}

func (c *Client) statusReport() *node.StatusReport {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := &node.StatusReport{Node: c.cfg.Node.Name, Version: c.cfg.Node.Version, RootsDigest: c.report.roots}
	for _, p := range c.report.pods {
		r.Pods = append(r.Pods, &node.PodStatus{
			Uid: p.UID, Namespace: p.Namespace, Name: p.Name, Reason: p.Reason,
			Redirection:     node.PodStatus_Redirection(p.Redirection),
			OpenConnections: uint32(max(p.OpenConnections, 0)),
		})
	}
	for _, t := range slices.Sorted(maps.Keys(c.status.Types)) {
		st := c.status.Types[t]
		r.Types = append(r.Types, &node.TypeStatus{TypeUrl: t, AppliedVersion: st.Applied, Nack: st.NACK, Rejected: st.Rejected})
	}
	return r
}
