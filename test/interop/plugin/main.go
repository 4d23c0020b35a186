//go:build wasip1

// Command plugin is a Wasm module that tests have proxies run. It adds to requests and to answers what it is told, refuses the
// requests that ask for it, and tries what modules may not.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/proxy-wasm/proxy-wasm-go-sdk/proxywasm"
	"github.com/proxy-wasm/proxy-wasm-go-sdk/proxywasm/types"
)

func main() {}

func init() {
	proxywasm.SetPluginContext(func(uint32) types.PluginContext { return &plugin{} })
}

// plugin is what it is told.
type plugin struct {
	types.DefaultPluginContext
	Says string `json:"says"`
	Path string `json:"path"` // that requests get
	Bad  bool   `json:"bad"`  // the configuration is refused
}

func (p *plugin) OnPluginStart(int) types.OnPluginStartStatus {
	b, err := proxywasm.GetPluginConfiguration()
	if err == nil && len(b) > 0 {
		err = json.Unmarshal(b, p)
	}
	if err != nil || p.Bad {
		return types.OnPluginStartStatusFailed
	}
	return types.OnPluginStartStatusOK
}

func (p *plugin) NewHttpContext(uint32) types.HttpContext { return &request{plugin: p} }

type request struct {
	types.DefaultHttpContext
	plugin *plugin
}

func (r *request) OnHttpRequestHeaders(int, bool) types.Action {
	what, _ := proxywasm.GetHttpRequestHeader("x-do")
	switch what {
	case "refuse":
		_ = proxywasm.SendHttpResponse(418, [][2]string{{"x-says", r.plugin.Says}}, []byte("short and stout"), -1)
		return types.ActionPause
	case "fail":
		panic("it was asked to")
	}
	if r.plugin.Path != "" {
		_ = proxywasm.ReplaceHttpRequestHeader(":path", r.plugin.Path)
	}
	path, _ := proxywasm.GetHttpRequestHeader(":path")
	_ = proxywasm.AddHttpRequestHeader("x-passed", path)
	return types.ActionContinue
}

func (r *request) OnHttpResponseHeaders(int, bool) types.Action {
	_ = proxywasm.AddHttpResponseHeader("x-says", r.plugin.Says)
	_ = proxywasm.AddHttpResponseHeader("x-env", os.Getenv("WHO"))
	_ = proxywasm.AddHttpResponseHeader("x-leaks", r.leaks())
	return types.ActionContinue
}

// leaks are the ways out that are open.
func (r *request) leaks() (out string) {
	try := func(what string, err error) {
		if err == nil {
			out += what + " "
		}
	}
	for _, cluster := range []string{"agent", "outbound|80|http|inventory.shop.svc.cluster.local"} {
		_, err := proxywasm.DispatchHttpCall(cluster, [][2]string{{":method", "GET"}, {":path", "/"}, {":authority", "x"}}, nil, nil, 1000, func(int, int, int) {})
		try("call "+cluster, err)
	}
	_, err := proxywasm.CallForeignFunction("set_envoy_filter_state", []byte("x"))
	try("foreign", err)
	_, err = proxywasm.CallForeignFunction("clear_route_cache", nil)
	try("foreign2", err)
	_, err = proxywasm.RegisterSharedQueue("q")
	try("queue", err)
	for _, name := range []string{"HOSTNAME", "PATH"} {
		if v := os.Getenv(name); v != "" {
			out += fmt.Sprintf("%s=%s ", name, v)
		}
	}
	_, err = os.ReadFile("/etc/passwd")
	try("file", err)
	return out
}
