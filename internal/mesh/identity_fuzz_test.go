package mesh

import (
	"strings"
	"testing"
)

// FuzzIdentity: what is accepted is written back byte for byte, has nothing in it that another reader of URIs
// or of paths could take for something else, and is never taken for another identity.
func FuzzIdentity(f *testing.F) {
	for _, s := range []string{
		"spiffe://cluster.local/ns/shop/sa/ui", "spiffe://cluster.local/ns/shop/sa/ui/", "spiffe://cluster.local//ns/shop/sa/ui",
		"spiffe://cluster.local/ns/*/sa/*", "spiffe://cluster.local/ns/../sa/ui", "spiffe://cluster.local/ns/./sa/..",
		"spiffe://cluster.local/ns/shop/sa/u%69", "spiffe://cluster.local:80/ns/shop/sa/ui", "spiffe://user@cluster.local/ns/shop/sa/ui",
		"spiffe://cluster.local/ns/shop/sa/ui?x", "spiffe://cluster.local/ns/shop/sa/ui#x", "spiffe://cluster.local/ns/shop/sa/ui\x00.evil",
		"SPIFFE://cluster.local/ns/shop/sa/ui", "spiffe://cluster.local/ns/shop/sa/ui\n", "spiffe:/cluster.local/ns/shop/sa/ui",
		"spiffe://cluster.local/ns/shop/sa/\u0443i", `spiffe://cluster.local\ns\shop\sa\ui`, "spiffe://" + strings.Repeat("a", 3000) + "/ns/a/sa/b", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseIdentity(s)
		if err != nil {
			if !id.IsZero() {
				t.Errorf("%q: an error, and %+v", s, id)
			}
			return
		}
		if id.String() != s || len(s) > maxIdentity {
			t.Errorf("%q is read as %q", s, id)
		}
		for _, part := range []string{id.TrustDomain, id.Namespace, id.ServiceAccount} {
			if part == "" || part == "." || part == ".." || strings.ContainsFunc(part, func(r rune) bool {
				return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_", r)
			}) {
				t.Errorf("%q has the part %q", s, part)
			}
		}
		if spiffeScheme+id.Principal() != s {
			t.Errorf("%q has the principal %q", s, id.Principal())
		}
	})
}
