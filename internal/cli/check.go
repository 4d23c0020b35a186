package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	authv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// finding is one line of check.
type finding struct {
	Check  string `json:"check"`
	Result string `json:"result"` // ok, warning, failed
	What   string `json:"what"`
	Hint   string `json:"hint,omitempty"`
}

// The oldest versions that work.
const (
	minKubernetesMinor = 29
	minKernelMajor     = 6
	minKernelMinor     = 1
)

func (a *app) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use: "check", Short: "Check whether Warren can run here and, when it is installed, whether it does",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			findings, err := a.check(cmd.Context(), c)
			if err != nil {
				return err
			}
			return a.report(findings)
		},
	}
}

// report prints findings, and is an error where one has failed.
func (a *app) report(list []finding) error {
	if err := a.print(list, func(w io.Writer) error { return a.printFindings(w, list) }); err != nil {
		return err
	}
	if slices.ContainsFunc(list, func(f finding) bool { return f.Result == "failed" }) {
		return errFound
	}
	return nil
}

func (a *app) printFindings(w io.Writer, list []finding) error {
	marks := map[string]string{"ok": a.paint(green, "ok     "), "warning": a.paint(yellow, "warning"), "failed": a.paint(red, "failed ")}
	for _, f := range list {
		if _, err := fmt.Fprintf(w, "%s  %s: %s\n", marks[f.Result], f.Check, f.What); err != nil {
			return err
		}
		if f.Hint != "" {
			fmt.Fprintf(w, "         %s\n", a.paint(faint, f.Hint))
		}
	}
	return nil
}

// check runs every check; those of an installation only when there is one.
func (a *app) check(ctx context.Context, c *conn) ([]finding, error) {
	v, err := c.Discovery().ServerVersion()
	if err != nil {
		return nil, fmt.Errorf("reaching the cluster: %w", err)
	}
	out := []finding{kubernetesVersion(v.Major, v.Minor, v.GitVersion)}
	nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("listing nodes: %w", err)
	}
	out = append(out, checkNodes(nodes.Items))
	out = append(out, a.checkOthers(ctx, c, a.besideIstio(ctx, c))...)
	out = append(out, checkPlugin(ctx, c)...)
	s, err := a.status(ctx, c)
	switch {
	case err != nil && !errors.Is(err, errNotInstalled):
		return append(out, finding{"installation", "warning", "cannot tell: " + err.Error(), "this needs the right to list what is in " + a.namespace + ", namespaces and pods"}), nil
	case err != nil:
		out = append(out, finding{"installation", "warning", "Warren is not installed in " + a.namespace,
			a.name() + " install"})
		return append(out, a.checkRights(ctx, c)), nil
	}
	return append(out, a.checkInstallation(ctx, c, s)...), nil
}

func kubernetesVersion(major, minor, git string) finding {
	n, err := strconv.Atoi(strings.TrimRight(minor, "+"))
	if err != nil || major != "1" || n < minKubernetesMinor {
		return finding{"kubernetes", "failed", git, fmt.Sprintf("1.%d or newer is needed", minKubernetesMinor)}
	}
	return finding{"kubernetes", "ok", git, ""}
}

func checkNodes(nodes []corev1.Node) finding {
	var bad, kernels []string
	for _, n := range nodes {
		info := n.Status.NodeInfo
		if info.OperatingSystem != "" && info.OperatingSystem != "linux" {
			continue
		}
		if !kernelOK(info.KernelVersion) {
			bad = append(bad, n.Name+" ("+info.KernelVersion+")")
		}
		if !slices.Contains(kernels, info.KernelVersion) {
			kernels = append(kernels, info.KernelVersion)
		}
	}
	if len(bad) > 0 {
		return finding{"kernel", "failed", "too old on " + strings.Join(bad, ", "),
			fmt.Sprintf("Linux %d.%d or newer is needed on every node; keep the agent off others with node.nodeSelector", minKernelMajor, minKernelMinor)}
	}
	return finding{"kernel", "ok", strings.Join(kernels, ", ") + " on " + plural(len(nodes), "node"), ""}
}

func kernelOK(release string) bool {
	p := strings.SplitN(release, ".", 3)
	if len(p) < 2 {
		return false
	}
	digits := func(s string) int {
		n, _ := strconv.Atoi(s[:len(s)-len(strings.TrimLeft(s, "0123456789"))])
		return n
	}
	major, minor := digits(p[0]), digits(p[1])
	return major > minKernelMajor || major == minKernelMajor && minor >= minKernelMinor
}

// checkOthers looks for what would be in the way.
func (a *app) checkOthers(ctx context.Context, c *conn, besideIstio bool) []finding {
	if besideIstio {
		return []finding{{"other meshes", "ok", "Istio, beside which Warren is installed", "who captures on which node: " + a.name() + " migrate status"}}
	}
	var out []finding
	sets, err := istioSets(ctx, c)
	if err != nil {
		return []finding{{"other meshes", "warning", "cannot tell: " + err.Error(), "this needs the right to list daemonsets"}}
	}
	for _, d := range sets {
		out = append(out, finding{"other meshes", "failed", "Istio ambient captures pods here (" + setName(&d) + ")",
			"two meshes cannot capture the same pods: go over node by node with " + a.name() + " migrate begin, or remove Istio's ztunnel and istio-cni"})
	}
	controls, err := istioControls(ctx, c)
	if err == nil {
		for _, d := range controls {
			out = append(out, finding{"other meshes", "warning", "an Istio control plane runs here (" + d.Namespace + "/" + d.Name + ")",
				"it writes the same ConfigMap istio-ca-root-cert; run one of the two"})
		}
	}
	if len(out) == 0 {
		out = append(out, finding{"other meshes", "ok", "none captures pods", ""})
	}
	return out
}

// checkPlugin looks for a network plugin that takes others out of its configuration: what starts before they are in again is not captured.
func checkPlugin(ctx context.Context, c *conn) []finding {
	cilium, err := c.CoreV1().ConfigMaps("kube-system").Get(ctx, "cilium-config", metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return []finding{{"network plugin", "warning", "cannot tell: " + err.Error(), "this needs the right to get configmaps in kube-system"}}
	case cilium.Data["cni-exclusive"] != "false":
		return []finding{{"network plugin", "failed", "Cilium takes Warren's plugin out of its configuration again and again (cni-exclusive in kube-system/cilium-config), and pods that start meanwhile are captured too late",
			"helm upgrade cilium cilium/cilium -n kube-system --reuse-values --set cni.exclusive=false; then restart its agents"}}
	}
	out := []finding{{"network plugin", "ok", "Cilium leaves room for Warren's", ""}}
	is := func(key string) bool { return cilium.Data[key] == "true" }
	if is("kube-proxy-replacement") && is("enable-bpf-masquerade") && !is("enable-host-legacy-routing") {
		namespaces, err := c.CoreV1().Namespaces().List(ctx, metav1.ListOptions{LabelSelector: udpLabel + "=" + udpEnforce})
		if err == nil && len(namespaces.Items) > 0 {
			out = append(out, finding{"network plugin", "failed", "Cilium hands packets to pods past the filter that namespaces ask for with " + udpLabel + ": UDP of " + namespaces.Items[0].Name + " is not filtered",
				"have NetworkPolicies say it, or give Cilium bpf.hostLegacyRouting=true"})
		}
	}
	return out
}

// checkRights asks whether the user may install.
func (a *app) checkRights(ctx context.Context, c *conn) finding {
	var missing []string
	for _, r := range []authv1.ResourceAttributes{
		{Verb: "create", Resource: "namespaces"},
		{Verb: "create", Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions"},
		{Verb: "create", Group: "rbac.authorization.k8s.io", Resource: "clusterroles"},
		{Verb: "create", Group: "apps", Resource: "daemonsets", Namespace: a.namespace},
	} {
		review, err := c.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx,
			&authv1.SelfSubjectAccessReview{Spec: authv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &r}}, metav1.CreateOptions{})
		if err != nil {
			return finding{"rights", "warning", "cannot tell: " + err.Error(), "kubectl auth can-i create clusterroles"}
		}
		if !review.Status.Allowed {
			missing = append(missing, r.Verb+" "+r.Resource)
		}
	}
	if len(missing) > 0 {
		return finding{"rights", "failed", "you may not " + strings.Join(missing, ", "), "install as a cluster administrator"}
	}
	return finding{"rights", "ok", "you may install", ""}
}

func (a *app) checkInstallation(ctx context.Context, c *conn, s *meshStatus) []finding {
	parts := func(name string, r ratio, selector string) finding {
		if r.complete() {
			return finding{name, "ok", r.String() + " ready", ""}
		}
		return finding{name, "failed", r.String() + " ready",
			"kubectl -n " + a.namespace + " describe pods -l " + selector}
	}
	out := []finding{
		parts("control plane", s.Control, controlSelector),
		parts("node agents", s.Agents, agentSelector),
		parts("holders", s.Holders, holderSelector),
	}
	switch _, err := c.CoreV1().ConfigMaps(a.namespace).Get(ctx, "istio-ca-root-cert", metav1.GetOptions{}); {
	case apierrors.IsNotFound(err):
		out = append(out, finding{"root certificate", "failed", "ConfigMap istio-ca-root-cert is missing in " + a.namespace,
			"the control plane writes it: kubectl -n " + a.namespace + " logs -l " + controlSelector})
	case err != nil:
		out = append(out, finding{"root certificate", "warning", "cannot tell: " + err.Error(), "this needs the right to get configmaps in " + a.namespace})
	default:
		out = append(out, finding{"root certificate", "ok", "published", ""})
	}
	out = append(out, a.checkRevisions(ctx, c, s)...)
	out = append(out, a.checkAdmission(ctx, c), a.checkCryptography(ctx, c))
	out = append(out, a.checkLabels(ctx, c)...)
	out = append(out, checkUDP(s))
	if len(s.Pending) > 0 {
		p := s.Pending[0]
		return append(out, finding{"capture", "warning",
			fmt.Sprintf("%s not captured, among them %s/%s: %s", plural(len(s.Pending), "pod"), p.Namespace, p.Name, p.Why),
			"all of them: " + a.name() + " status"})
	}
	captured := 0
	for _, n := range s.Namespaces {
		captured += n.Captured
	}
	return append(out, finding{"capture", "ok", plural(captured, "pod") + " captured, none pending", ""})
}

// checkAdmission tells whether policies are judged before they are stored.
func (a *app) checkAdmission(ctx context.Context, c *conn) finding {
	if a.besideIstio(ctx, c) {
		return finding{"admission", "ok", "policies are Istio's to judge when they are applied, while it is there", ""}
	}
	const name = "warren-validator"
	config, err := c.AdmissionregistrationV1().ValidatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return finding{"admission", "warning", "policies are not checked when they are applied: there is no ValidatingWebhookConfiguration " + name,
			"install the chart with admission.enabled=true"}
	case err != nil:
		return finding{"admission", "warning", "cannot tell: " + err.Error(), "this needs the right to get validatingwebhookconfigurations"}
	case len(config.Webhooks) == 0 || len(config.Webhooks[0].ClientConfig.CABundle) == 0:
		return finding{"admission", "warning", "policies are not checked when they are applied: the webhook has no root certificate yet",
			"the control plane writes it: kubectl -n " + a.namespace + " logs -l " + controlSelector}
	}
	return finding{"admission", "ok", "policies are checked when they are applied", ""}
}

// checkCryptography tells whose cryptography the programs use, as they say themselves: an image's tag is a name, the
// FIPS 140-3 mode is on or not.
func (a *app) checkCryptography(ctx context.Context, c *conn) finding {
	agents, err := a.agents(ctx, c)
	if err != nil {
		return finding{"cryptography", "warning", "cannot tell: " + err.Error(), "this needs the right to list pods in " + a.namespace}
	}
	control, err := c.CoreV1().Pods(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: controlSelector})
	if err != nil {
		return finding{"cryptography", "warning", "cannot tell: " + err.Error(), "this needs the right to list pods in " + a.namespace}
	}
	pods := slices.DeleteFunc(append(agents, control.Items...), func(p corev1.Pod) bool { return !ready(&p) || p.DeletionTimestamp != nil })
	certified := make([]bool, len(pods))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range pods {
		g.Go(func() error {
			port := adminPort
			if pods[i].Labels["app"] == "istiod" {
				port = monitoringPort
			}
			b, err := c.ask(ctx, &pods[i], port, "/version")
			if err != nil {
				return err
			}
			var v struct{ FIPS140 string }
			err = json.Unmarshal(b, &v)
			certified[i] = v.FIPS140 == "true"
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return finding{"cryptography", "warning", "cannot tell: " + err.Error(), "this needs the right to create pods/portforward in " + a.namespace}
	}
	var with, without, broken []string
	for i, p := range pods {
		switch {
		case certified[i]:
			with = append(with, p.Name)
		case strings.HasSuffix(imageTag(&p), "-fips"):
			broken = append(broken, p.Name)
		default:
			without = append(without, p.Name)
		}
	}
	switch {
	case len(broken) > 0:
		return finding{"cryptography", "failed", "the FIPS 140-3 mode is off in " + some(broken) + ", though the image has the certified module",
			"take GODEBUG out of node.env and control.env"}
	case len(with) > 0 && len(without) > 0:
		return finding{"cryptography", "warning", fmt.Sprintf("the FIPS 140-3 mode is on in %s and off in %s", plural(len(with), "pod"), some(without)),
			"one image.tag for all: those that end in -fips have the certified module"}
	case len(with) > 0:
		return finding{"cryptography", "ok", "the FIPS 140-3 mode is on in the control plane and all node agents", ""}
	}
	return finding{"cryptography", "ok", "of the Go toolchain, without the FIPS 140-3 mode", ""}
}

// some names the first of many.
func some(names []string) string {
	const most = 5
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

// checkUDP says what becomes of UDP, which the tunnel does not carry.
func checkUDP(s *meshStatus) finding {
	var open, filtered []string
	for _, n := range s.Namespaces {
		if n.UDP == udpByPolicy {
			filtered = append(filtered, n.Name)
		} else {
			open = append(open, n.Name)
		}
	}
	var say []string
	if len(open) > 0 {
		say = append(say, "of "+some(open)+" neither encrypted nor filtered, as in Istio")
	}
	if len(filtered) > 0 {
		say = append(say, "of "+some(filtered)+" filtered by identity, not encrypted")
	}
	f := finding{"UDP", "ok", strings.Join(say, "; "), ""}
	if len(say) == 0 {
		f.What = "no namespace is in the mesh"
	}
	if len(open) > 0 {
		f.Hint = fmt.Sprintf("to have policies apply to it: kubectl label namespace %s %s=%s", open[0], udpLabel, udpEnforce)
	}
	return f
}

// checkLabels finds values of the mode label that mean nothing.
func (a *app) checkLabels(ctx context.Context, c *conn) []finding {
	var out []finding
	namespaces, err := c.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil
	}
	for _, n := range namespaces.Items {
		switch v := n.Labels[modeLabel]; v {
		case "", "ambient", "none":
		default:
			out = append(out, finding{"labels", "warning", fmt.Sprintf("namespace %s has %s=%s, which means nothing", n.Name, modeLabel, v),
				fmt.Sprintf("kubectl label --overwrite namespace %s %s=ambient", n.Name, modeLabel)})
		}
		switch v := n.Labels[udpLabel]; v {
		case "", udpEnforce, "none":
		default:
			out = append(out, finding{"labels", "warning", fmt.Sprintf("namespace %s has %s=%s, which means nothing: its UDP is not filtered", n.Name, udpLabel, v),
				fmt.Sprintf("kubectl label --overwrite namespace %s %s=%s", n.Name, udpLabel, udpEnforce)})
		}
		if n.Labels["istio-injection"] == "enabled" && n.Labels[modeLabel] == "" {
			out = append(out, finding{"labels", "warning", "namespace " + n.Name + " has istio-injection=enabled, which asks for sidecars",
				fmt.Sprintf("kubectl label namespace %s %s=ambient", n.Name, modeLabel)})
		}
	}
	return out
}
