package identity

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"strings"
	"testing"

	"github.com/warrenmesh/warren/internal/mesh"
)

// FuzzSAN gives a certificate whatever subjectAltName. At most one identity is read, and only where the bytes
// say just that; a URI that x509 reads otherwise is not one of ours.
func FuzzSAN(f *testing.F) {
	for _, all := range [][]string{
		{ui.String()}, {ui.String(), catalog.String()}, {}, {""}, {ui.String() + "\x00"}, {"spiffe://cluster.local/ns/*/sa/ui"},
	} {
		f.Add(names(all...).Value)
	}
	f.Add([]byte{0x30, 0x00})
	f.Add([]byte{0x30, 0x02, 0x86, 0x7f})
	f.Add([]byte{0x30, 0x80, 0x86, 0x00, 0x00, 0x00}) // indefinite length
	f.Add([]byte{0x31, 0x02, 0x86, 0x00})             // a SET
	f.Add([]byte{0x30, 0x04, 0xa6, 0x02, 0x16, 0x00}) // constructed
	f.Fuzz(func(t *testing.T, value []byte) {
		c := &x509.Certificate{Extensions: []pkix.Extension{{Id: oidSAN, Value: value}}}
		uri, err := uriSAN(c)
		if err != nil {
			var p *PeerError
			if uri != "" || !errors.As(err, &p) || Reason(err) == ReasonHandshake {
				t.Errorf("%q, %v", uri, err)
			}
			return
		}
		if !bytes.Contains(value, []byte(uri)) {
			t.Errorf("%q is not in %x", uri, value)
		}
		if id, err := mesh.ParseIdentity(uri); err == nil {
			if n := bytes.Count(value, []byte("spiffe://")); n > 1 && bytes.Count(value, []byte{0x86}) > 1 && strings.Count(uri, "spiffe://") == 1 && bytes.Equal(value, names(uri, uri).Value) {
				t.Errorf("%s is read out of two", id)
			}
		}
		twice := &x509.Certificate{Extensions: append(c.Extensions, c.Extensions...)}
		if uri, err := uriSAN(twice); err == nil {
			t.Errorf("two extensions, and %q is read", uri)
		}
	})
}

// FuzzBundle reads what a process that took over might find. What is accepted has a key that fits and a chain,
// says the same after being written again, and neither it nor an error shows a key.
func FuzzBundle(f *testing.F) {
	ca := newTestCA(f)
	good := ca.bundle(f, ui, nil)
	good, err := newBundle(ui, good.cert.PrivateKey.(crypto.Signer), []*x509.Certificate{good.cert.Leaf}, good.roots)
	if err != nil {
		f.Fatal(err)
	}
	data, err := Marshal([]*Bundle{good})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(append(bytes.Clone(data), data...))
	f.Add(bytes.Replace(data, []byte("PRIVATE KEY"), []byte("CERTIFICATE"), 2))
	f.Add(data[:len(data)/2])
	f.Add([]byte("-----BEGIN WARREN IDENTITY-----\n-----END WARREN IDENTITY-----\n"))
	f.Add([]byte{})
	key, _ := pem.Decode(data[bytes.Index(data, []byte("-----BEGIN PRIVATE KEY")):])
	secret := pem.EncodeToMemory(key)[30:80]
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := Unmarshal(data)
		if err != nil {
			if all != nil || !errors.Is(err, ErrBundle) || bytes.Contains([]byte(err.Error()), secret) {
				t.Errorf("%d bundles, %v", len(all), err)
			}
			return
		}
		for _, b := range all {
			if b.ID.IsZero() || len(b.Chain()) == 0 || len(b.Roots()) == 0 || b.cert.Leaf == nil {
				t.Errorf("not complete: %v", b)
			}
			if strings.Contains(b.String(), string(secret)) {
				t.Error("a key is shown")
			}
		}
		written, err := Marshal(all)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Unmarshal(written)
		if err != nil || len(again) != len(all) {
			t.Fatalf("%d bundles become %d, %v", len(all), len(again), err)
		}
		twice, err := Marshal(again)
		if err != nil || !bytes.Equal(written, twice) {
			t.Errorf("written again it differs, %v", err)
		}
	})
}

// FuzzTrust: roots and revocation lists as a control plane sends them.
func FuzzTrust(f *testing.F) {
	root := newTestCA(f).cert.Raw
	f.Add(root, []byte{})
	f.Add(root, root)
	f.Add([]byte{}, []byte{0x30, 0x03, 0x02, 0x01, 0x00})
	f.Fuzz(func(t *testing.T, root, list []byte) {
		var lists [][]byte
		if len(list) > 0 {
			lists = [][]byte{list}
		}
		trust, err := NewTrust([][]byte{root}, lists)
		if err != nil {
			if trust != nil || !errors.Is(err, ErrBundle) {
				t.Errorf("%v, %v", trust, err)
			}
			return
		}
		if len(trust.Roots()) != 1 || trust.Digest() != RootsDigest([][]byte{root}) {
			t.Errorf("%d roots, digest %s", len(trust.Roots()), trust.Digest())
		}
	})
}
