package host

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// packages maps the programs a cluster takes from the machine to the Debian
// packages they come in.
var packages = []struct{ program, pkg string }{
	{"runc", "runc"},
	{"iptables", "iptables"},
	{"nft", "nftables"},
	{"ip", "iproute2"},
	{"mount", "mount"},
}

const pluginPackage = "containernetworking-plugins"

var pluginDirs = []string{"/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni", "/usr/local/lib/cni"}

// CNIPlugin finds a standard CNI plugin on the machine.
func CNIPlugin(name string) (string, error) {
	for _, d := range pluginDirs {
		p := filepath.Join(d, name)
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("CNI plugin %s is in none of %s", name, strings.Join(pluginDirs, ", "))
}

// MissingPackages lists the Debian packages that would provide what is absent.
func MissingPackages(plugins []string) []string {
	var l []string
	for _, p := range packages {
		if _, err := exec.LookPath(p.program); err != nil {
			l = append(l, p.pkg)
		}
	}
	for _, p := range plugins {
		if _, err := CNIPlugin(p); err != nil {
			return append(l, pluginPackage)
		}
	}
	return l
}
