package wds

import (
	"encoding/json"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/api/security"
	"github.com/warrenmesh/warren/api/workload"
	"github.com/warrenmesh/warren/internal/mesh"
)

// snapshot is the JSON form of a Snapshot: its resources as they are on the wire.
type snapshot struct {
	Revision  uint64   `json:"revision"`
	Config    []byte   `json:"config,omitempty"`
	Addresses [][]byte `json:"addresses,omitempty"`
	Policies  [][]byte `json:"policies,omitempty"`
	Audits    [][]byte `json:"audits,omitempty"`
}

// EncodeSnapshot writes all that a node knows of the mesh, so that another program decides as the node does.
func EncodeSnapshot(s *mesh.Snapshot) ([]byte, error) {
	out := snapshot{Revision: s.Revision()}
	var errs []error
	put := func(into *[][]byte, m proto.Message, err error) {
		if err == nil {
			var b []byte
			b, err = proto.Marshal(m)
			*into = append(*into, b)
		}
		errs = append(errs, err)
	}
	if c := s.Config(); c.TrustDomain != "" {
		b, err := proto.Marshal(EncodeConfig(c))
		out.Config = b
		errs = append(errs, err)
	}
	for w := range s.Workloads() {
		put(&out.Addresses, EncodeWorkload(w), nil)
	}
	for svc := range s.Services() {
		put(&out.Addresses, EncodeService(svc), nil)
	}
	for p := range s.Policies() {
		if p.Action == mesh.Audit {
			m, err := EncodeAudit(p)
			put(&out.Audits, m, err)
			continue
		}
		m, err := EncodePolicy(p)
		put(&out.Policies, m, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return json.Marshal(out)
}

// DecodeSnapshot reads what EncodeSnapshot wrote.
func DecodeSnapshot(data []byte) (*mesh.Snapshot, error) {
	var in snapshot
	if err := json.Unmarshal(data, &in); err != nil {
		return nil, bad("a snapshot: %v", err)
	}
	b := mesh.NewBuilder(nil)
	if in.Config != nil {
		p := &node.MeshConfig{}
		if err := proto.Unmarshal(in.Config, p); err != nil {
			return nil, bad("the settings of a snapshot: %v", err)
		}
		c, err := DecodeConfig(p)
		if err != nil {
			return nil, err
		}
		b.SetConfig(c)
	}
	for _, data := range in.Addresses {
		p := &workload.Address{}
		if err := proto.Unmarshal(data, p); err != nil {
			return nil, bad("an address of a snapshot: %v", err)
		}
		w, svc, err := DecodeAddress(p)
		switch {
		case err != nil:
			return nil, err
		case w != nil:
			b.PutWorkload(w)
		default:
			b.PutService(svc)
		}
	}
	for _, data := range in.Policies {
		p := &security.Authorization{}
		if err := proto.Unmarshal(data, p); err != nil {
			return nil, bad("a policy of a snapshot: %v", err)
		}
		policy, err := DecodePolicy(p)
		if err != nil {
			return nil, fmt.Errorf("policy %s/%s: %w", p.GetNamespace(), p.GetName(), err)
		}
		b.PutPolicy(policy)
	}
	for _, data := range in.Audits {
		p := &node.AuditPolicy{}
		if err := proto.Unmarshal(data, p); err != nil {
			return nil, bad("an AUDIT policy of a snapshot: %v", err)
		}
		policy, err := DecodeAudit(p)
		if err != nil {
			return nil, err
		}
		b.PutPolicy(policy)
	}
	return b.Commit(in.Revision), nil
}
