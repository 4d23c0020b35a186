package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// agent answers on a socket as f says.
func agent(t *testing.T, f http.HandlerFunc) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cni.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: f}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return path
}

const prev = `{"cniVersion":%q,"interfaces":[{"name":"eth0","sandbox":"/var/run/netns/x"}],` +
	`"ips":[{%s"interface":0,"address":"10.244.1.7/24","gateway":"10.244.1.1"},{%[3]s"interface":0,"address":"fd00::7/64"}],"dns":{}}`

func prevResult(version string) string {
	v4, v6 := "", ""
	if strings.HasPrefix(version, "0.") {
		v4, v6 = `"version":"4",`, `"version":"6",`
	}
	return fmt.Sprintf(prev, version, v4, v6)
}

func cmd(t *testing.T, version, namespace, socket, state string) *skel.CmdArgs {
	t.Helper()
	conf := fmt.Sprintf(`{"cniVersion":%q,"name":"net","type":"warren-cni","socket":%q,"stateFile":%q,"systemNamespace":"istio-system","exemptNamespaces":["kube-system"],"prevResult":%s}`,
		version, socket, state, prevResult(version))
	return &skel.CmdArgs{
		ContainerID: "abc", Netns: "/var/run/netns/x", IfName: "eth0", StdinData: []byte(conf),
		Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=" + namespace + ";K8S_POD_NAME=ui-1;K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=uid-1",
	}
}

func TestTheAgentIsToldWhoThePodIs(t *testing.T) {
	var got Request
	socket := agent(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != PathAdd {
			t.Errorf("asked for %s", r.URL.Path)
		}
		json.NewDecoder(r.Body).Decode(&got)
		fmt.Fprint(w, `{"captured":true}`)
	})
	for _, v := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		var out bytes.Buffer
		if err := (Plugin{Stdout: &out, Stderr: os.Stderr}).Add(cmd(t, v, "shop", socket, "/none")); err != nil {
			t.Fatal(err)
		}
		want := `{shop ui-1 uid-1 abc /var/run/netns/x eth0 [10.244.1.7 fd00::7]}`
		if s := fmt.Sprint(struct {
			A, B, C, D, E, F string
			G                any
		}{got.Namespace, got.Name, got.UID, got.ContainerID, got.NetNS, got.IfName, got.Addrs}); s != want {
			t.Errorf("%s: got %s, want %s", v, s, want)
		}
		var result, was map[string]any
		if err := errors.Join(json.Unmarshal(out.Bytes(), &result), json.Unmarshal([]byte(prevResult(v)), &was)); err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(result["ips"]) != fmt.Sprint(was["ips"]) || result["cniVersion"] != v {
			t.Errorf("%s: the result before is not passed on: %s", v, out.String())
		}
	}
}

func TestWhoMayStartWithoutTheAgent(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "enrolled.json")
	if err := WriteLastKnown(state, []string{"shop"}); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(dir, "broken.json")
	os.WriteFile(broken, []byte("{"), 0o644)
	absent := filepath.Join(dir, "no.sock")
	refuses := filepath.Join(dir, "stale.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: refuses})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	dies := agent(t, func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) })
	no := agent(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprint(w, `{"error":"the agent's own reason"}`)
	})
	for _, tc := range []struct {
		name              string
		namespace, socket string
		state             string
		starts            bool
		says              string
	}{
		{"not enrolled, agent away", "other", absent, state, true, ""},
		{"enrolled, no socket", "shop", absent, state, false, "pod shop/ui-1 waits to be captured by the mesh: the node agent does not answer at "},
		{"enrolled, nobody at the socket", "shop", refuses, state, false, "the node agent does not answer at"},
		{"enrolled, agent killed while it answers", "shop", dies, state, false, "the node agent does not answer at"},
		{"enrolled, the agent says wait", "shop", no, state, false, "pod shop/ui-1 waits to be captured by the mesh: the agent's own reason"},
		{"not enrolled when the agent was last there, but it says wait", "other", no, state, false, "the agent's own reason"},
		{"state lost", "other", absent, filepath.Join(dir, "none"), false, "nobody can tell"},
		{"state unreadable", "other", absent, broken, false, "nobody can tell"},
		{"the mesh's own, nothing there", "istio-system", absent, broken, true, ""},
		{"the mesh's own, the agent says wait", "istio-system", no, broken, true, ""},
		{"exempt, nothing there", "kube-system", absent, broken, true, ""},
		{"exempt, the agent says wait", "kube-system", no, broken, true, ""},
	} {
		var out, errs bytes.Buffer
		err := Plugin{&out, &errs}.Add(cmd(t, "1.0.0", tc.namespace, tc.socket, tc.state))
		if (err == nil) != tc.starts {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if tc.starts {
			if out.Len() == 0 {
				t.Errorf("%s: no result", tc.name)
			}
			continue
		}
		var ce *cnitypes.Error
		if !errors.As(err, &ce) || ce.Code != cnitypes.ErrTryAgainLater {
			t.Errorf("%s: %v is not one to try again", tc.name, err)
		}
		if !strings.Contains(err.Error(), tc.says) || strings.Count(err.Error(), "waits") != 1 {
			t.Errorf("%s: %q does not say %q, once", tc.name, err, tc.says)
		}
	}
}

func TestDelNeverFails(t *testing.T) {
	no := agent(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusInternalServerError) })
	for _, socket := range []string{"/nonexistent.sock", no} {
		if err := (Plugin{os.Stdout, &bytes.Buffer{}}).Del(cmd(t, "1.0.0", "shop", socket, "/none")); err != nil {
			t.Error(err)
		}
	}
	if err := (Plugin{os.Stdout, &bytes.Buffer{}}).Del(&skel.CmdArgs{StdinData: []byte("{")}); err != nil {
		t.Error(err)
	}
	if err := (Plugin{}).Status(nil); err != nil {
		t.Error(err)
	}
}

func TestAnAgentThatHangsDoesNotHoldAnExemptPod(t *testing.T) {
	release := make(chan struct{})
	socket := agent(t, func(w http.ResponseWriter, r *http.Request) { <-release })
	defer close(release)
	began := time.Now()
	if err := (Plugin{&bytes.Buffer{}, &bytes.Buffer{}}).Add(cmd(t, "1.0.0", "kube-system", socket, "/none")); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 6*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestBadInputIsSaid(t *testing.T) {
	p := Plugin{&bytes.Buffer{}, &bytes.Buffer{}}
	for _, stdin := range []string{``, `{`, `{"cniVersion":"1.0.0"}`, `{"cniVersion":"1.0.0","prevResult":{"cniVersion":"9.9.9"}}`, `{"cniVersion":"1.0.0","prevResult":5}`} {
		err := p.Add(&skel.CmdArgs{StdinData: []byte(stdin), Args: "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=x"})
		if err == nil {
			t.Errorf("%q passed", stdin)
		}
	}
}

// What comes on standard input is the node administrator's and the other plugins'; none of it may crash or start
// a pod that must wait.
func FuzzAdd(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","prevResult":`+prevResult("1.0.0")+`}`), "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=a")
	f.Add([]byte(`{`), ";;=;K8S_POD_UID")
	f.Fuzz(func(t *testing.T, stdin []byte, args string) {
		var m map[string]any
		if json.Unmarshal(stdin, &m) == nil && (m["socket"] != nil || m["stateFile"] != nil || m["systemNamespace"] != nil || m["exemptNamespaces"] != nil) {
			return // another configuration, another answer
		}
		err := Plugin{&bytes.Buffer{}, &bytes.Buffer{}}.Add(&skel.CmdArgs{StdinData: stdin, Args: args})
		_, namespace, name := podArgs(args)
		if err == nil && namespace == "shop" && name != "" {
			t.Errorf("started with %q", stdin)
		}
	})
}

func TestWriteFileLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "f")
	for _, s := range []string{"one", "two"} {
		if err := WriteFile(path, []byte(s), 0o640); err != nil {
			t.Fatal(err)
		}
		if b, _ := os.ReadFile(path); string(b) != s {
			t.Errorf("read %q", b)
		}
	}
	e, _ := os.ReadDir(filepath.Dir(path))
	if len(e) != 1 {
		t.Errorf("%d files", len(e))
	}
	if st, _ := os.Stat(path); st.Mode().Perm() != 0o640 {
		t.Errorf("mode %v", st.Mode())
	}
}
