package xds

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"log/slog"
	"slices"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/warrenmesh/warren/api/security"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// offline is a client that nobody connects.
func offline(t *testing.T) *Client {
	t.Helper()
	c, err := New(Config{Address: "nowhere:1", Store: new(mesh.Store), Node: Node{Name: "node-a"}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func resource(f *testing.F, typeURL, name string, m proto.Message) *discovery.Resource {
	data, err := proto.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	return &discovery.Resource{Name: name, Version: "1", Resource: &anypb.Any{TypeUrl: typeURL, Value: data}}
}

// responses are what a control plane could send, well and badly.
func responses(f *testing.F) []*discovery.DeltaDiscoveryResponse {
	pod := wds.EncodeLocalPod(wds.LocalPod{UID: "u", Namespace: "shop", Name: "ui", Node: "node-a", Enrolled: true})
	other := wds.EncodeLocalPod(wds.LocalPod{UID: "v", Namespace: "shop", Name: "ui", Node: "node-b"})
	w := wds.EncodeWorkload(&mesh.Workload{UID: "c//Pod/shop/ui", Namespace: "shop", Healthy: true, Policies: []mesh.PolicyName{{Namespace: "shop", Name: "p"}}})
	policy := &security.Authorization{Name: "p", Namespace: "shop", Scope: security.Scope_WORKLOAD_SELECTOR}
	bad := &security.Authorization{Name: "p", Namespace: "shop", Scope: security.Scope_WORKLOAD_SELECTOR, Action: 9}
	response := func(typeURL string, rs ...*discovery.Resource) *discovery.DeltaDiscoveryResponse {
		return &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL, Resources: rs, RemovedResources: []string{"shop/gone", "/", "x"}, ControlPlane: &core.ControlPlane{Identifier: "node-a"}}
	}
	return []*discovery.DeltaDiscoveryResponse{
		response(wds.MeshConfigType, resource(f, wds.MeshConfigType, wds.MeshConfigName, wds.EncodeConfig(mesh.Config{TrustDomain: "cluster.local"}))),
		response(wds.AuthorizationType, resource(f, wds.AuthorizationType, "shop/p", policy), resource(f, wds.AuthorizationType, "shop/q", policy)),
		response(wds.AuthorizationType, resource(f, wds.AuthorizationType, "shop/p", bad)),
		response(wds.AuthorizationType, &discovery.Resource{Name: "shop/p", Resource: &anypb.Any{TypeUrl: wds.AuthorizationType, Value: []byte{0xff}}}, &discovery.Resource{Name: "shop/r"}),
		response(wds.AddressType, resource(f, wds.AddressType, "c//Pod/shop/ui", w), resource(f, wds.AddressType, "misnamed", w)),
		response(wds.LocalPodType, resource(f, wds.LocalPodType, "u", pod), resource(f, wds.LocalPodType, "v", other)),
		response(wds.NamespaceType, resource(f, wds.NamespaceType, "shop", wds.EncodeNamespace("shop", true))),
	}
}

// FuzzResponse takes responses in a row. Each resource is taken or named as refused; a policy that is refused
// and has no earlier version denies; and what the node then writes to its disk is what it reads back.
func FuzzResponse(f *testing.F) {
	var all bytes.Buffer
	for _, r := range responses(f) {
		var one bytes.Buffer
		for _, to := range []*bytes.Buffer{&one, &all} {
			if _, err := protodelim.MarshalTo(to, r); err != nil {
				f.Fatal(err)
			}
		}
		f.Add(one.Bytes())
	}
	f.Add(all.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		c := offline(t)
		for in := bytes.NewReader(data); in.Len() > 0; {
			r := &discovery.DeltaDiscoveryResponse{}
			if (protodelim.UnmarshalOptions{MaxSize: int64(in.Len())}).UnmarshalFrom(in, r) != nil {
				break
			}
			state := c.types[r.TypeUrl]
			if state == nil {
				continue
			}
			state.received = true
			bad := c.take(r, state)
			for _, res := range r.Resources {
				_, refused := bad[res.Name]
				_, taken := state.versions[res.Name]
				if !refused && !taken && !slices.Contains(r.RemovedResources, res.Name) {
					t.Errorf("%s %q is neither taken nor refused", r.TypeUrl, res.Name)
				}
				name, err := wds.ParsePolicyName(res.Name)
				if refused && err == nil && r.TypeUrl == wds.AuthorizationType && !slices.Contains(r.RemovedResources, res.Name) {
					if c.builder.Policy(name) == nil {
						t.Errorf("the policy %s was refused (%v) and does not deny", name, bad[res.Name])
					}
				}
			}
			if len(bad) > 0 && bad.Error() == "" {
				t.Error("refused without a word")
			}
		}
		c.rev++
		c.cfg.Store.Swap(c.builder.Commit(c.rev))
		written, err := c.state().encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeState(written, "node-a")
		if err != nil {
			t.Fatal(err)
		}
		again := offline(t)
		for _, r := range back {
			if bad := again.take(r, again.types[r.TypeUrl]); len(bad) > 0 {
				t.Errorf("what was written is refused: %v", bad)
			}
		}
		again.cfg.Store.Swap(again.builder.Commit(1))
		w, s, p := c.cfg.Store.Load().Len()
		w2, s2, p2 := again.cfg.Store.Load().Len()
		if w != w2 && c.types[wds.AddressType].received || s != s2 && c.types[wds.AddressType].received || p != p2 && c.types[wds.AuthorizationType].received && c.types[wds.AuditType].received {
			t.Errorf("%d workloads, %d services and %d policies become %d, %d and %d", w, s, p, w2, s2, p2)
		}
	})
}

// FuzzState reads files as a disk may give them back, with and without a checksum that is right.
func FuzzState(f *testing.F) {
	var body bytes.Buffer
	for _, r := range responses(f) {
		if _, err := protodelim.MarshalTo(&body, r); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(body.Bytes(), true)
	f.Add(body.Bytes()[:body.Len()-3], true)
	f.Add([]byte(stateMagic), false)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}, true) // a record of 2^63 bytes
	f.Fuzz(func(t *testing.T, data []byte, sealed bool) {
		file, record := data, data
		if sealed {
			sum := sha256.Sum256(data)
			file = append(append([]byte(stateMagic), sum[:]...), data...)
			record = append(sum[:], data...)
		}
		all, err := decodeState(file, "node-a")
		if err != nil && (!errors.Is(err, ErrState) || all != nil) {
			t.Errorf("%v with %d responses", err, len(all))
		}
		for _, r := range all {
			if r.GetControlPlane().GetIdentifier() != "node-a" {
				t.Error("the state of another node")
			}
		}
		for in := bytes.NewReader(record); in.Len() > 0; {
			before := in.Len()
			if _, err := readRecord(in, "node-a"); err != nil {
				if !errors.Is(err, ErrState) {
					t.Error(err)
				}
				break
			}
			if in.Len() >= before {
				t.Fatal("no progress")
			}
		}
	})
}
