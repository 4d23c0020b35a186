// Command containerd-shim-runc-v2 is containerd's runtime shim, built from the
// module's own source. It is a binary of its own because containerd's plugin
// registry is global: linked together with the daemon's plugins the shim would
// start those and die with "ttrpc: closed".
package main

import (
	"context"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task/plugin"
	"github.com/containerd/containerd/v2/pkg/shim"
)

func main() {
	shim.RunShim(context.Background(), manager.NewShimManager("io.containerd.runc.v2"))
}
