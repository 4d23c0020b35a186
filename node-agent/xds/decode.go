package xds

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/api/security"
	"github.com/warrenmesh/warren/api/workload"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// rejections are the resources of one response that could not be used, by name.
type rejections map[string]error

func (r rejections) names() []string { return slices.Sorted(maps.Keys(r)) }

// Error names every resource; the reasons of the first few.
func (r rejections) Error() string {
	const most = 10
	names := r.names()
	var reasons []string
	for _, n := range names[:min(len(names), most)] {
		reasons = append(reasons, fmt.Sprintf("%s: %v", n, r[n]))
	}
	text := strings.Join(reasons, "; ")
	if len(names) > most {
		text += "; and " + strings.Join(names[most:], ", ")
	}
	return text
}

// detail is the error of the NACK. It names the resources in a form that the control plane can count with: all
// others of the response are applied.
func (r rejections) detail(typeURL string) *status.Status {
	s := &status.Status{Code: int32(codes.InvalidArgument), Message: r.Error()}
	if d, err := anypb.New(&node.TypeStatus{TypeUrl: typeURL, Nack: r.Error(), Rejected: r.names()}); err == nil {
		s.Details = []*anypb.Any{d}
	}
	return s
}

// take decodes a response into what is being built.
func (c *Client) take(resp *discovery.DeltaDiscoveryResponse, state *typeState) rejections {
	bad := make(rejections)
	for _, res := range resp.Resources {
		name := res.GetName()
		if err := c.put(resp.TypeUrl, name, res); err != nil {
			bad[name] = err
			continue
		}
		state.versions[name] = res.GetVersion()
	}
	for _, name := range resp.RemovedResources {
		c.remove(resp.TypeUrl, name)
		delete(state.versions, name)
	}
	return bad
}

// unpack checks the type and parses the resource.
func unpack(typeURL string, res *discovery.Resource, into proto.Message) error {
	any := res.GetResource()
	if any == nil {
		return fmt.Errorf("%w: it is empty", wds.ErrResource)
	}
	if any.TypeUrl != typeURL {
		return fmt.Errorf("%w: it is a %s", wds.ErrResource, any.TypeUrl)
	}
	if err := proto.Unmarshal(any.Value, into); err != nil {
		return fmt.Errorf("%w: %w", wds.ErrResource, err)
	}
	return nil
}

// misnamed reports a resource whose name is not that of its content: it could never be removed.
func misnamed(name, own string) error {
	if name == own {
		return nil
	}
	return fmt.Errorf("%w: it calls itself %q", wds.ErrResource, own)
}

// put decodes one resource and puts it into the builder. With an error nothing has changed, but for a policy
// that has no earlier version: that denies.
func (c *Client) put(typeURL, name string, res *discovery.Resource) error {
	switch typeURL {
	case wds.AddressType:
		var p workload.Address
		if err := unpack(typeURL, res, &p); err != nil {
			return err
		}
		w, s, err := wds.DecodeAddress(&p)
		switch {
		case err != nil:
			return err
		case w != nil:
			if err := misnamed(name, w.UID); err != nil {
				return err
			}
			c.builder.PutWorkload(w)
		default:
			if err := misnamed(name, s.Name.String()); err != nil {
				return err
			}
			c.builder.PutService(s)
		}
	case wds.AuthorizationType:
		policy, err := decodePolicy(name, res)
		if err == nil {
			c.builder.PutPolicy(policy)
			return nil
		}
		if policy == nil {
			return err
		}
		if have := c.builder.Policy(policy.Name); have == nil || have.Action == mesh.Audit {
			c.builder.PutPolicy(policy)
			return fmt.Errorf("%w; until it can be, it denies all it applies to", err)
		}
		return err
	case wds.AuditType:
		var p node.AuditPolicy
		if err := unpack(typeURL, res, &p); err != nil {
			return err
		}
		policy, err := wds.DecodeAudit(&p)
		if err != nil {
			return err
		}
		if err := misnamed(name, policy.Name.String()); err != nil {
			return err
		}
		c.builder.PutPolicy(policy)
	case wds.LocalPodType:
		var p node.LocalPod
		if err := unpack(typeURL, res, &p); err != nil {
			return err
		}
		pod, err := wds.DecodeLocalPod(&p)
		if err != nil {
			return err
		}
		if pod.Node != "" && pod.Node != c.cfg.Node.Name {
			return fmt.Errorf("%w: it is of the node %s", wds.ErrResource, pod.Node)
		}
		if err := misnamed(name, pod.UID); err != nil {
			return err
		}
		c.pods[name] = pod
		c.dirty.pods = true
	case wds.NamespaceType:
		var p node.Namespace
		if err := unpack(typeURL, res, &p); err != nil {
			return err
		}
		ns, enrolled, err := wds.DecodeNamespace(&p)
		if err != nil {
			return err
		}
		if err := misnamed(name, ns); err != nil {
			return err
		}
		c.namespaces[name] = enrolled
		c.dirty.namespaces = true
	case wds.MeshConfigType:
		var p node.MeshConfig
		if err := unpack(typeURL, res, &p); err != nil {
			return err
		}
		cfg, err := wds.DecodeConfig(&p)
		if err != nil {
			return err
		}
		c.builder.SetConfig(cfg)
		c.dirty.config = true
	case wds.TrustBundleType:
		p := &node.TrustBundle{}
		if err := unpack(typeURL, res, p); err != nil {
			return err
		}
		if err := misnamed(name, wds.TrustBundleName); err != nil {
			return err
		}
		return c.takeTrust(p)
	default:
		return errors.New("nobody subscribed to this type")
	}
	return nil
}

// decodePolicy decodes one policy. With an error it returns what stands in for it: of what can be read in part
// the same denying, of what cannot be read at all a policy that denies its namespace.
func decodePolicy(name string, res *discovery.Resource) (*mesh.Policy, error) {
	var p security.Authorization
	err := unpack(wds.AuthorizationType, res, &p)
	if err == nil {
		var policy *mesh.Policy
		if policy, err = wds.DecodePolicy(&p); err == nil {
			err = misnamed(name, policy.Name.String())
		}
		if policy != nil && policy.Name.String() == name {
			return policy, err
		}
	}
	own, nerr := wds.ParsePolicyName(name)
	if nerr != nil {
		return nil, err
	}
	return &mesh.Policy{Name: own, Scope: mesh.ScopeNamespace, Action: mesh.Deny, Rules: []mesh.Rule{{}}}, err
}

// remove takes one resource out. Names that are not there are fine.
func (c *Client) remove(typeURL, name string) {
	switch typeURL {
	case wds.AddressType:
		c.builder.DeleteWorkload(name)
		if svc, err := wds.ParseServiceName(name); err == nil {
			c.builder.DeleteService(svc)
		}
	case wds.AuthorizationType, wds.AuditType:
		// A policy that became an AUDIT one, or ceased to be, goes from one type to the other: what the other has
		// put already stays.
		if policy, err := wds.ParsePolicyName(name); err == nil {
			if have := c.builder.Policy(policy); have != nil && (have.Action == mesh.Audit) == (typeURL == wds.AuditType) {
				c.builder.DeletePolicy(policy)
			}
		}
	case wds.LocalPodType:
		delete(c.pods, name)
		c.dirty.pods = true
	case wds.NamespaceType:
		delete(c.namespaces, name)
		c.dirty.namespaces = true
	case wds.MeshConfigType:
		if name == wds.MeshConfigName {
			c.builder.SetConfig(c.cfg.Base)
			c.dirty.config = true
		}
	}
}
