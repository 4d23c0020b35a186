package conformance

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/gateway-api/conformance"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"

	"github.com/warrenmesh/warren/results"
	"github.com/warrenmesh/warren/test/cluster/image"
	"github.com/warrenmesh/warren/test/e2e/lab"
)

// basicImages are the names under which the suite's manifests ask for its own echo server. The last one is for tests of UDP, of
// which nothing is claimed: it only has to be there.
var basicImages = []string{
	"registry.k8s.io/gateway-api/echo-basic:v1.5.1", "registry.k8s.io/gateway-api/echo-basic:v1.6.0-dev.2", "registry.k8s.io/gateway-api/echo-basic:v1.6.0-dev.3",
	"registry.k8s.io/coredns/coredns:v1.12.2",
}

// claimedAtGateways are the features of gateways beyond those that the profiles have in any case.
var claimedAtGateways = []features.FeatureName{
	features.SupportGateway, features.SupportReferenceGrant, features.SupportHTTPRoute, features.SupportGRPCRoute,
	features.SupportTLSRoute, features.SupportTLSRouteModeTerminate, features.SupportTLSRouteModeMixed, features.SupportTCPRoute,
	features.SupportGatewayPort8080, features.SupportGatewayHTTPListenerIsolation, features.SupportGatewayHTTPSListenerDetectMisdirectedRequests,
	features.SupportGatewayInfrastructure, features.SupportGatewayAddressEmpty, features.SupportGatewayStaticAddresses,
	features.SupportHTTPRouteBackendRequestHeaderModification, features.SupportHTTPRouteQueryParamMatching, features.SupportHTTPRouteMethodMatching,
	features.SupportHTTPRouteResponseHeaderModification, features.SupportHTTPRoutePortRedirect, features.SupportHTTPRouteSchemeRedirect,
	features.SupportHTTPRoutePathRedirect, features.SupportHTTPRouteHostRewrite, features.SupportHTTPRoutePathRewrite, features.SupportHTTPRouteRequestMirror,
	features.SupportHTTPRouteRequestMultipleMirrors, features.SupportHTTPRouteRequestPercentageMirror, features.SupportHTTPRouteRequestTimeout,
	features.SupportHTTPRouteBackendTimeout, features.SupportHTTPRouteParentRefPort, features.SupportHTTPRouteBackendProtocolH2C,
	features.SupportHTTPRouteBackendProtocolWebSocket, features.SupportHTTPRouteNamedRouteRule,
	features.SupportBackendTLSPolicy, features.SupportBackendTLSPolicySANValidation,
	features.SupportGatewayFrontendClientCertificateValidation, features.SupportGatewayFrontendClientCertificateValidationInsecureFallback,
	features.SupportGatewayBackendClientCertificate, features.SupportListenerSet, features.SupportHTTPRouteCORS,
	features.SupportHTTPRoute303RedirectStatusCode, features.SupportHTTPRoute307RedirectStatusCode, features.SupportHTTPRoute308RedirectStatusCode,
	features.SupportHTTPRouteDestinationPortMatching, features.SupportGRPCRouteNamedRouteRule,
}

// outsideEnv is set where the suite runs as a client outside the cluster.
const outsideEnv = "WARREN_CONFORMANCE_OUTSIDE"

// TestGateways runs the profiles for gateways.
func TestGateways(t *testing.T) {
	if os.Getenv(outsideEnv) != "" {
		runGateways(t)
		return
	}
	atGateways(t, prepare(t), "-only="+*only)
}

// experimental is the suite's test of what only the CRDs of the experimental channel have a field for.
const experimental = "HTTPRouteRetry"

// TestExperimental runs that test on a cluster that has those CRDs in place of the chart's.
func TestExperimental(t *testing.T) {
	if *only != "" && *only != experimental {
		t.Skipf("%s is asked for, and is not about fields of the experimental channel", *only)
	}
	ctx := t.Context()
	l := prepare(t)
	if l.Cluster == nil {
		t.Skip("the cluster is not ours: its CRDs stay as they are")
	}
	apply := func(ctx context.Context, files ...string) error {
		args := []string{"apply", "--server-side", "--force-conflicts"}
		for _, f := range files {
			args = append(args, "-f", f)
		}
		_, err := l.Kubectl(ctx, args...)
		return err
	}
	dir, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
	must(t, err)
	crds := filepath.Join(strings.TrimSpace(string(dir)), "config", "crd")
	ours, err := filepath.Glob(filepath.Join(crds, "standard", "gateway.networking.k8s.io_*.yaml"))
	must(t, err)
	for i, f := range ours {
		ours[i] = filepath.Join(crds, "experimental", filepath.Base(f))
	}
	t.Cleanup(func() {
		if err := apply(context.WithoutCancel(ctx), filepath.Join("..", "..", "charts", "warren", "files", "crds", "gateway-api.yaml")); err != nil {
			t.Error("the CRDs of the standard channel are not back; end the cluster with `make cluster-down`: ", err)
		}
	})
	must(t, apply(ctx, ours...))
	atGateways(t, l, "-only="+experimental, "-experimental")
	if *only == "" {
		failed := 0
		if t.Failed() {
			failed = 1
		}
		must(t, results.Record("gateway-api-conformance", results.Row{
			Name: "gateway, with the experimental channel's CRDs", Inputs: 1, Failures: failed, Figure: float64(1 - failed), Unit: "tests passed"}))
	}
}

// atGateways runs the suite with these flags. On our own cluster the gateways' addresses are reached from the link of the nodes
// alone: there the test runs itself again.
func atGateways(t *testing.T, l *lab.Lab, flags ...string) {
	ctx := t.Context()
	namespaces := []string{suite.InfrastructureNamespace, suite.AppBackendNamespace, suite.WebBackendNamespace}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		for _, ns := range namespaces {
			if t.Failed() {
				t.Log(l.Diagnose(ctx, ns))
			}
			if _, err := l.Kubectl(ctx, "delete", "namespace", ns, "--ignore-not-found", "--wait=false"); err != nil {
				t.Error(err)
			}
		}
	})
	if l.Cluster == nil {
		t.Setenv("KUBECONFIG", l.Kubeconfig())
		runGateways(t)
		return
	}
	end, err := l.Balance(ctx)
	must(t, err)
	t.Cleanup(end)
	config, err := os.ReadFile(l.Kubeconfig())
	must(t, err)
	inside := filepath.Join(t.TempDir(), "kubeconfig")
	config = regexp.MustCompile(`server: https://\S+`).ReplaceAll(config, []byte("server: https://172.30.0.1:6443"))
	must(t, os.WriteFile(inside, config, 0o600))
	must(t, os.Setenv(outsideEnv, "1"))
	defer os.Unsetenv(outsideEnv)
	args := append([]string{os.Args[0], "-test.run=^TestGateways$", "-test.v", "-test.timeout=50m", "-release=" + *release}, flags...)
	cmd := l.Cluster.OutsideCommand(ctx, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+inside)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		t.Error("the suite, outside the cluster: ", err)
	}
}

func runGateways(t *testing.T) {
	opts := options(t, "gateway-report.yaml")
	opts.GatewayClassName = "istio"
	opts.NamespaceLabels = map[string]string{lab.Label: "ambient"}
	opts.ConformanceProfiles = []suite.ConformanceProfileName{suite.GatewayHTTPConformanceProfileName, suite.GatewayGRPCConformanceProfileName,
		suite.GatewayTLSConformanceProfileName, suite.GatewayTCPConformanceProfileName}
	asked := claimedAtGateways
	if *experiments {
		asked = append(slices.Clone(asked), features.SupportHTTPRouteRetry)
	}
	opts.SupportedFeatures = asked
	ip := gatewayv1.IPAddressType
	opts.UsableNetworkAddresses = []gatewayv1.GatewaySpecAddress{{Type: &ip, Value: lab.Balanced}}
	opts.UnusableNetworkAddresses = []gatewayv1.GatewaySpecAddress{{Type: &ip, Value: "192.0.2.1"}} // of nobody (RFC 5737)
	opts.TimeoutConfig.MaxTimeToConsistency = time.Minute
	opts.TimeoutConfig.RequiredConsecutiveSuccesses = 20
	ran, failed := 0, 0
	opts.Hook = func(t *testing.T, test suite.ConformanceTest, s *suite.ConformanceTestSuite) {
		beyond := slices.ContainsFunc(test.Features, func(f features.FeatureName) bool { return !slices.Contains(asked, f) })
		if beyond || *only != "" && test.ShortName != *only {
			return
		}
		ran++
		if t.Failed() || t.Skipped() {
			failed++
		}
		if t.Skipped() {
			t.Errorf("%s was left out, though all that it needs is claimed: %v", test.ShortName, test.Features)
		}
	}
	if *only == "" {
		t.Cleanup(func() {
			must(t, results.Record("gateway-api-conformance", results.Row{Name: "gateway", Inputs: ran, Failures: failed, Figure: float64(ran - failed), Unit: "tests passed"}))
		})
	}
	start := time.Now()
	conformance.RunConformanceWithOptions(t, opts)
	if *experiments && ran != 1 {
		t.Errorf("%d tests named %s ran", ran, *only)
	}
	t.Logf("the suite took %.0f s", time.Since(start).Seconds())
}

// basicArchives builds the suite's own echo server and packs it under each of its names.
func basicArchives(ctx context.Context, dir string) (archives []string, err error) {
	bin := filepath.Join(dir, "echo-basic")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "sigs.k8s.io/gateway-api/conformance/echo-basic")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the suite's echo server: %w\n%s", err, out)
	}
	for i, name := range basicImages {
		im := image.Image{Name: name, Config: image.Config{Entrypoint: []string{"/echo-basic"}, User: "65532:65532"},
			Variants: []image.Variant{{Platform: image.Platform{Arch: runtime.GOARCH}, Files: map[string]string{"echo-basic": bin}}}}
		archive := filepath.Join(dir, fmt.Sprintf("echo-basic-%d.tar", i))
		if _, err := im.WriteFile(archive); err != nil {
			return nil, err
		}
		archives = append(archives, archive)
	}
	return archives, nil
}
