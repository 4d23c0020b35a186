package conformance

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/gateway-api/conformance"
	confv1 "sigs.k8s.io/gateway-api/conformance/apis/v1"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"

	"github.com/warrenmesh/warren/results"
	"github.com/warrenmesh/warren/test/cluster"
	"github.com/warrenmesh/warren/test/cluster/image"
	"github.com/warrenmesh/warren/test/e2e/lab"
)

var (
	only        = flag.String("only", "", "run one test of the suite; no report is written")
	release     = flag.String("release", "dev", "version of Warren in the report")
	experiments = flag.Bool("experimental", false, "claim what needs the experimental channel's CRDs too")
)

// echoImage is the name under which the suite's manifests ask for Istio's echo server.
const echoImage = "registry.k8s.io/gateway-api/echo-advanced:v1.5.1"

// claimed are the features beyond those that the profiles have in any case. Without the last five the suite would leave out
// tests of the mesh without a word.
var claimed = []features.FeatureName{
	features.SupportMeshClusterIPMatching, features.SupportMeshConsumerRoute, features.SupportMeshHTTPRouteRewritePath,
	features.SupportMeshHTTPRouteSchemeRedirect, features.SupportMeshHTTPRouteRedirectPort, features.SupportMeshHTTPRouteRedirectPath,
	features.SupportMeshHTTPRouteBackendRequestHeaderModification, features.SupportMeshHTTPRouteQueryParamMatching,
	features.SupportMeshHTTPRouteNamedRouteRule,
	features.SupportHTTPRouteResponseHeaderModification, features.SupportHTTPRouteParentRefPort,
	features.SupportHTTPRoute303RedirectStatusCode, features.SupportHTTPRoute307RedirectStatusCode, features.SupportHTTPRoute308RedirectStatusCode,
}

// prepare is a cluster with the mesh and the suite's images.
func prepare(t *testing.T) *lab.Lab {
	t.Helper()
	ctx := t.Context()
	_, attached := cluster.Attach("")
	l, err := lab.Open(ctx, os.Getenv("WARREN_E2E_KUBECONFIG"), t.Logf)
	must(t, err)
	if l.Cluster == nil {
		t.Log("the cluster is not ours: it is taken to have the images already")
	} else {
		if attached != nil { // we started it, we end it
			t.Cleanup(func() {
				if err := l.Cluster.Down(context.WithoutCancel(ctx)); err != nil {
					t.Error("ending the cluster:", err)
				}
			})
		}
		must(t, l.BuildImages(ctx))
		must(t, l.LoadWaypoint(ctx))
		dir := t.TempDir()
		advanced, err := echoArchive(ctx, dir)
		must(t, err)
		basic, err := basicArchives(ctx, dir)
		must(t, err)
		must(t, l.Cluster.LoadImages(ctx, append(basic, advanced)...))
	}
	must(t, l.Install(ctx))
	return l
}

// options are those of every run of the suite.
func options(t *testing.T, report string) suite.ConformanceOptions {
	opts := conformance.DefaultOptions(t)
	opts.CleanupBaseResources = false // by us, after what went wrong has been looked at
	opts.RunTest = *only
	opts.Implementation = confv1.Implementation{
		Organization: "warrenmesh", Project: "warren", URL: "https://github.com/warrenmesh/warren", Version: *release,
		Contact: []string{"https://github.com/warrenmesh/warren/issues"},
	}
	if *only == "" {
		opts.ReportOutputPath = report
	}
	return opts
}

// TestMesh runs the profiles for meshes. Every Service of the suite is behind a waypoint.
func TestMesh(t *testing.T) {
	ctx := t.Context()
	l := prepare(t)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		for _, ns := range []string{suite.MeshNamespace, suite.MeshConsumerNamespace} {
			if t.Failed() {
				t.Log(l.Diagnose(ctx, ns))
			}
			if _, err := l.Kubectl(ctx, "delete", "namespace", ns, "--ignore-not-found", "--wait=false"); err != nil {
				t.Error(err)
			}
		}
	})
	for _, ns := range []string{suite.MeshNamespace, suite.MeshConsumerNamespace} {
		must(t, l.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata: {name: %[1]s, labels: {istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: %[1]s, labels: {istio.io/waypoint-for: service}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
`, ns)))
		if out, err := l.Kubectl(ctx, "-n", ns, "wait", "--for=condition=Programmed", "gateway/waypoint", "--timeout=180s"); err != nil {
			t.Fatal(err, out)
		}
	}

	t.Setenv("KUBECONFIG", l.Kubeconfig())
	opts := options(t, "mesh-report.yaml")
	opts.NamespaceLabels = map[string]string{lab.Label: "ambient", "istio.io/use-waypoint": "waypoint"}
	opts.ConformanceProfiles = []suite.ConformanceProfileName{suite.MeshHTTPConformanceProfileName, suite.MeshGRPCConformanceProfileName}
	opts.SupportedFeatures = claimed
	opts.TimeoutConfig.RequiredConsecutiveSuccesses = 20
	ran, failed := 0, 0
	opts.Hook = func(t *testing.T, test suite.ConformanceTest, s *suite.ConformanceTestSuite) {
		if !slices.Contains(test.Features, features.SupportMesh) || *only != "" && test.ShortName != *only {
			return
		}
		ran++
		if t.Failed() {
			failed++
		}
		if t.Skipped() { // there is nothing about meshes that is not claimed
			failed++
			t.Errorf("%s was left out, which needs %v", test.ShortName, test.Features)
		}
	}
	if *only == "" {
		t.Cleanup(func() {
			must(t, results.Record("gateway-api-conformance", results.Row{Name: "mesh", Inputs: ran, Failures: failed, Figure: float64(ran - failed), Unit: "tests passed"}))
		})
	}
	start := time.Now()
	conformance.RunConformanceWithOptions(t, opts)
	t.Logf("the suite took %.0f s", time.Since(start).Seconds())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// echoArchive builds Istio's echo server and client from the module in echo, into the user's cache, and packs them as the
// suite's image. The suite runs the client in the pods.
func echoArchive(ctx context.Context, dir string) (string, error) {
	const src = "echo"
	mod, err := os.ReadFile(filepath.Join(src, "go.mod"))
	if err != nil {
		return "", err
	}
	_, version, _ := strings.Cut(string(mod), "istio.io/istio v")
	version, _, _ = strings.Cut(version, " ")
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(cache, "warren", "echo-"+version)
	if _, err := os.Stat(filepath.Join(bin, "server")); err != nil {
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin+"/", "istio.io/istio/pkg/test/echo/cmd/client", "istio.io/istio/pkg/test/echo/cmd/server")
		cmd.Dir = src
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build Istio's echo server in %s: %w\n%s", src, err, out)
		}
	}
	files := map[string]string{"usr/local/bin/server": filepath.Join(bin, "server"), "usr/local/bin/client": filepath.Join(bin, "client")}
	if err := selfSigned(dir); err != nil {
		return "", err
	}
	for _, name := range []string{"cert.crt", "cert.key"} {
		files[name] = filepath.Join(dir, name)
	}
	im := image.Image{Name: echoImage, Config: image.Config{Entrypoint: []string{"/usr/local/bin/server"}, User: "65532:65532"},
		Variants: []image.Variant{{Platform: image.Platform{Arch: runtime.GOARCH}, Files: files}}}
	archive := filepath.Join(dir, "echo.tar")
	_, err = im.WriteFile(archive)
	return archive, err
}

// selfSigned writes a certificate that the server wants for the port on which it speaks TLS.
func selfSigned(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"echo"}, NotAfter: time.Now().Add(24 * time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "cert.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644),
		os.WriteFile(filepath.Join(dir, "cert.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o644),
	)
}
