package cni

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
)

// FuzzStdin runs the plugin on what a runtime could pass. A pod of an enrolled namespace starts only with the
// agent's word, and nobody answers here; a DEL never fails; a configuration that cannot be read lets none start.
func FuzzStdin(f *testing.F) {
	const prev = `,"prevResult":{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"address":"10.0.0.5/24","interface":0}]}`
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"net","type":"warren-cni"`+prev+`}`), "K8S_POD_UID=u;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=ui")
	f.Add([]byte(`{"cniVersion":"0.3.1","name":"net","type":"warren-cni","exemptNamespaces":["kube-system"]`+strings.Replace(prev, "1.0.0", "0.3.1", 1)+`}`), "IgnoreUnknown=1;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns")
	f.Add([]byte(`{"cniVersion":"9.9","prevResult":{"cniVersion":"9.9"}}`), "K8S_POD_NAMESPACE=shop;K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=ui")
	f.Add([]byte(`{"prevResult":{"ips":[{"address":"10.0.0.5"}]}}`), "K8S_POD_NAME=")
	f.Add([]byte(`{"exemptNamespaces":"shop"}`), ";;=;")
	f.Add([]byte(``), "")
	dir := f.TempDir()
	stateFile := filepath.Join(dir, "enrolled.json")
	if err := WriteLastKnown(stateFile, []string{"shop"}); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, stdin []byte, cniArgs string) {
		var here map[string]json.RawMessage
		if json.Unmarshal(stdin, &here) == nil && here != nil {
			for k := range here { // keys match whatever their case
				if strings.EqualFold(k, "socket") || strings.EqualFold(k, "stateFile") {
					delete(here, k)
				}
			}
			here["socket"], _ = json.Marshal(filepath.Join(dir, "none.sock"))
			here["stateFile"], _ = json.Marshal(stateFile)
			stdin, _ = json.Marshal(here)
		}
		var out, errs bytes.Buffer
		p := Plugin{Stdout: &out, Stderr: &errs}
		args := &skel.CmdArgs{ContainerID: "c", Netns: "/none", IfName: "eth0", Args: cniArgs, StdinData: stdin}
		err := p.Add(args)
		c, perr := parse(stdin)
		if perr != nil && err == nil {
			t.Errorf("started with a configuration that cannot be read: %v", perr)
		}
		_, ns, name := podArgs(cniArgs)
		if err == nil && ns == "shop" && name != "" && c.set.SystemNamespace != ns {
			exempt := false
			for _, e := range c.set.Exempt {
				exempt = exempt || e == ns
			}
			if !exempt {
				t.Error("a pod of an enrolled namespace started without the agent")
			}
		}
		if err == nil && !json.Valid(out.Bytes()) {
			t.Errorf("the result is %q", out.Bytes())
		}
		if err := p.Del(args); err != nil {
			t.Errorf("a pod cannot go: %v", err)
		}
	})
}

// FuzzLastKnown: a state file that is not whole enrols everybody by being an error; one that is written is read
// back.
func FuzzLastKnown(f *testing.F) {
	for _, s := range []string{`{"version":1,"enrolledNamespaces":["shop"]}`, `{"version":2}`, `{"version":1,"enrolledNamespaces":null}`, `{"version":1`, `[]`, ``, "\x00\x00\x00"} {
		f.Add([]byte(s))
	}
	file := filepath.Join(f.TempDir(), "state")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := ReadLastKnown(file)
		if err != nil {
			if l != nil {
				t.Errorf("%v, and %+v", err, l)
			}
			return
		}
		if err := WriteLastKnown(file, l.Namespaces); err != nil {
			t.Fatal(err)
		}
		again, err := ReadLastKnown(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, ns := range l.Namespaces {
			if !again.Enrolled(ns) {
				t.Errorf("%q is not enrolled any more", ns)
			}
		}
	})
}
