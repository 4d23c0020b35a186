package cli

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestBenchRefuses(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--workloads", "http-c17"}, ExitUsage, `no workload is called "http-c17"; there are rr-c1,`},
		{[]string{"--variants", "linkerd"}, ExitUsage, `no variant is called "linkerd"`},
		{[]string{"--variant-dir", "/nonexistent"}, ExitUsage, "/nonexistent"},
		{[]string{"--rounds", "0"}, ExitUsage, "0 rounds"},
		{[]string{"--duration", "1ms"}, ExitUsage, "1ms"},
		{[]string{"--nodes", "node1"}, ExitUsage, "name the client's and the server's"},
		{[]string{"--compare", "/nonexistent/latest.json"}, ExitError, "what to compare with"},
		{[]string{"--nodes", "node1,node9"}, ExitError, "node9"},
	} {
		code, _, errs := run(t, installed(), append([]string{"bench"}, c.args...)...)
		if code != c.code || !strings.Contains(errs, c.want) {
			t.Errorf("%v: code %d, %s", c.args, code, errs)
		}
	}
}

func TestPickNodes(t *testing.T) {
	if c, s, err := pickNodes(nil, []string{"b", "a", "c"}); err != nil || c != "a" || s != "b" {
		t.Errorf("%s, %s, %v", c, s, err)
	}
	if c, s, err := pickNodes([]string{"y", "x"}, nil); err != nil || c != "y" || s != "x" {
		t.Errorf("%s, %s, %v", c, s, err)
	}
	if _, _, err := pickNodes(nil, []string{"a"}); err == nil || !strings.Contains(err.Error(), "1 node with an agent") {
		t.Errorf("one node: %v", err)
	}
}

func TestSettled(t *testing.T) {
	running := func(change func(*corev1.Pod)) *corev1.Pod {
		p := pod("warren-bench-x", "client", "node1", nil, map[string]string{redirection: "enabled"})
		p.Status.PodIP = "10.0.0.1"
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "load", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}
		change(p)
		return p
	}
	for _, c := range []struct {
		want   string // in what it still lacks
		change func(*corev1.Pod)
	}{
		{"", func(*corev1.Pod) {}},
		{"ErrImagePull no such image", func(p *corev1.Pod) {
			p.Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull", Message: "no such image"}}
		}},
		{"ended with 1: see kubectl -n warren-bench-x logs client -c load", func(p *corev1.Pod) {
			p.Status.ContainerStatuses[0].State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 1}}
		}},
		{"is Pending", func(p *corev1.Pod) { p.Status.Conditions, p.Status.Phase = nil, corev1.PodPending }},
		{"no annotation " + redirection, func(p *corev1.Pod) { p.Annotations = nil }},
	} {
		got := settled(running(c.change), map[string]string{redirection: "enabled"})
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}
