package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// otherCA runs Istio's own control plane beside the nodes as a CA of somebody else, until the test ends. It signs for
// our agents; its roots are in ConfigMaps of another name than ours. It returns its address.
func otherCA(t *testing.T) string {
	t.Helper()
	program, err := mesh.Peer(t.Context(), "istiod")
	must(t, err)
	if _, err := mesh.Kubectl(t.Context(), "create", "namespace", "external-ca"); err != nil {
		t.Fatal(err)
	}
	ip, err := mesh.Kubectl(t.Context(), "get", "endpoints", "kubernetes", "-o", "jsonpath={.subsets[0].addresses[0].ip}")
	must(t, err)
	addr := net.JoinHostPort(ip, "15112") // beside the API server
	cmd := mesh.Cluster.OutsideCommand(context.WithoutCancel(t.Context()), program, "discovery", "--kubeconfig", filepath.Join(mesh.Cluster.Dir(), "pki", "admin.conf"), "--domain", "cluster.local",
		"--secureGRPCAddr", addr, "--grpcAddr", "", "--httpAddr", "127.0.0.1:15180", "--httpsAddr", "", "--monitoringAddr", "127.0.0.1:15114",
		"--ctrlz_port", "0", "--shutdownDuration", "1s")
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "POD_NAME=istiod-0", "POD_NAMESPACE=external-ca", "SERVICE_ACCOUNT=istiod", "CLUSTER_ID=Kubernetes", "REVISION=external",
		"CA_TRUSTED_NODE_ACCOUNTS="+lab.Namespace+"/warren-node", "PILOT_CERT_PROVIDER=istiod", "JWT_POLICY=third-party-jwt", "PILOT_ENABLE_AMBIENT=false",
		"PILOT_CA_CERT_CONFIGMAP=external-ca-root-cert", "PILOT_CRL_CONFIGMAP=external-ca-crl", "INJECT_ENABLED=false", "PILOT_ENABLE_GATEWAY_API=false",
		"PILOT_ENABLE_STATUS=false", "ENABLE_LEADER_ELECTION=false")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		timer := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
		if t.Failed() {
			b := log.Bytes()
			t.Logf("the other CA: %s", b[max(0, len(b)-10_000):])
		}
		ctx := context.WithoutCancel(t.Context())
		if _, err := mesh.Kubectl(ctx, "delete", "namespace", "external-ca", "--wait=false"); err != nil {
			t.Error(err)
		}
		for _, name := range []string{"external-ca-root-cert", "external-ca-crl"} {
			if _, err := mesh.Kubectl(ctx, "delete", "configmaps", "-A", "--field-selector=metadata.name="+name); err != nil {
				t.Error(err)
			}
		}
	})
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		_, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "get", "configmap", "external-ca-root-cert")
		return err
	}))
	return addr
}

// Somebody else's CA signs for the workloads: Istio's control plane, by the protocol that both speak. The agents get
// certificates for the pods of their nodes; our control plane refuses to sign.
func TestExternalCA(t *testing.T) {
	ownCluster(t)
	if !*long {
		t.Skip("builds Istio's control plane; our own as the external CA is in test/certificates")
	}
	ctx := t.Context()
	addr := otherCA(t)
	t.Cleanup(func() { must(t, mesh.Install(context.WithoutCancel(ctx))) })
	must(t, mesh.Install(ctx, "ca.address="+addr, "ca.serverName=istiod.external-ca.svc", "ca.rootConfigMap=external-ca-root-cert"))
	ns := namespace(t, "e2e-external-ca", ambient)
	strict(t, ns)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]), server(ns, "near", nodes[0]))
	for _, to := range []string{"far", "near"} {
		unharmed(t, "external CA, to the "+to+" server", startLoad(t, ns, "client", "-for", "10s", "-rate", "100", "-hold", "10", "-timeout", "30s", to+":9000")())
	}
	ours, err := mesh.Kubectl(ctx, "-n", ns, "get", "configmap", "istio-ca-root-cert", "-o", `jsonpath={.data.root-cert\.pem}`)
	must(t, err)
	theirs, err := mesh.Kubectl(ctx, "-n", ns, "get", "configmap", "external-ca-root-cert", "-o", `jsonpath={.data.root-cert\.pem}`)
	must(t, err)
	if ours == theirs {
		t.Error("both CAs have one root")
	}
	for _, node := range nodes[:2] {
		page, err := agentAdmin(node, "GET", "/config_dump")
		must(t, err)
		var dump struct {
			Certificates []struct {
				Identity, State string
				RootCerts       []struct{ PEM []byte }
			}
		}
		must(t, json.Unmarshal(page, &dump))
		found := false
		for _, c := range dump.Certificates {
			if !strings.Contains(c.Identity, "/ns/"+ns+"/") {
				continue
			}
			found = true
			for _, r := range c.RootCerts {
				if !strings.Contains(theirs, strings.TrimSpace(string(r.PEM))) {
					t.Errorf("%s: %s is %s, under another root than the external CA's", node, c.Identity, c.State)
				}
			}
		}
		if !found {
			t.Errorf("%s has no certificate of %s", node, ns)
		}
	}
}

// With the images of the certified module its mode is on in both programs, and pods reach each other.
func TestFIPSImages(t *testing.T) {
	ownCluster(t)
	if !*long {
		t.Skip("builds all images once more; the mode's unit tests are in internal/identity")
	}
	ctx := t.Context()
	tag, err := mesh.LoadFIPSImages(ctx)
	must(t, err)
	t.Cleanup(func() { must(t, mesh.Install(context.WithoutCancel(ctx))) })
	must(t, mesh.Install(ctx, "image.tag="+tag))
	must(t, lab.Eventually(ctx, 2*time.Minute, func() error {
		check := exec.CommandContext(ctx, "go", "run", "./cmd/warren", "check")
		check.Dir, check.Env = mesh.Root(), append(os.Environ(), "KUBECONFIG="+mesh.Kubeconfig())
		out, err := check.Output()
		if !strings.Contains(string(out), "the FIPS 140-3 mode is on in the control plane and all node agents") {
			return fmt.Errorf("warren check says: %s, %v", out, err)
		}
		return nil
	}))
	ns := namespace(t, "e2e-fips", ambient)
	strict(t, ns)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]), server(ns, "near", nodes[0]))
	for _, to := range []string{"far", "near"} {
		unharmed(t, "FIPS 140-3 mode, to the "+to+" server", startLoad(t, ns, "client", "-for", "10s", "-rate", "100", "-hold", "10", "-timeout", "30s", to+":9000")())
	}
	must(t, rotateRoot(ctx))
	awaitTrust(t, time.Minute, "phase 2 of 3")
	unharmed(t, "FIPS 140-3 mode, while a root is exchanged", startLoad(t, ns, "client", "-for", "10s", "-rate", "100", "-timeout", "30s", "far:9000")())
}
