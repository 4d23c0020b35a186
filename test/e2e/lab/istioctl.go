package lab

import "context"

// istioctlVersion is what the program calls itself: a release number, for what it compares with others.
const istioctlVersion = "1.31.0"

// BuildIstioctl returns Istio's own command line, built from the module in test/e2e/istioctl into the user's cache, which
// the first time takes minutes of both cores.
func (l *Lab) BuildIstioctl(ctx context.Context) (string, error) {
	return l.buildProgram(ctx, "istioctl", "istio.io/istio/istioctl/cmd/istioctl",
		[]string{"build", "-p=2", "-buildvcs=false", "-trimpath", "-ldflags=-s -w -X istio.io/istio/pkg/version.buildVersion=" + istioctlVersion})
}

// Program runs a program with the cluster's kubeconfig and returns its standard output.
func (l *Lab) Program(ctx context.Context, program string, args ...string) (string, error) {
	return l.run(ctx, nil, program, args...)
}
