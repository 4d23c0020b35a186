package host

import (
	"os"
	"os/exec"
	"slices"
	"testing"
)

func TestParseHierarchies(t *testing.T) {
	l, err := ParseHierarchies("3:cpu,cpuacct:/user\n1:name=systemd:/\n0::/user/a:b\n")
	if err != nil {
		t.Fatal(err)
	}
	want := []Hierarchy{
		{Controllers: "cpu,cpuacct", Self: "/user"},
		{Controllers: "name=systemd", Self: "/"},
		{Self: "/user/a:b"},
	}
	if !slices.Equal(l, want) {
		t.Errorf("got %+v", l)
	}
	for i, dir := range []string{"cpu,cpuacct", "systemd", "unified"} {
		if l[i].Dir() != dir || l[i].V2() != (i == 2) {
			t.Errorf("%+v: directory %s, v2 %t", l[i], l[i].Dir(), l[i].V2())
		}
	}
	if _, err := ParseHierarchies("nonsense\n"); err == nil {
		t.Error("nonsense is accepted")
	}
}

func TestAlive(t *testing.T) {
	if !Alive(os.Getpid()) {
		t.Error("this process is not alive")
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if !Alive(cmd.Process.Pid) {
		t.Error("a child is not alive")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if Alive(cmd.Process.Pid) {
		t.Error("a dead child is alive")
	}
}
