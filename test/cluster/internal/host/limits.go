package host

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// limit is a setting of the whole machine that its usual value makes too small
// for several nodes, all of whose processes belong to one user.
type limit struct {
	path    string
	atLeast int
}

// A node with thirty pods has about forty inotify instances (kubelet, containerd,
// agents); many machines allow a user 128.
func limits(nodes int) []limit {
	return []limit{
		{"/proc/sys/fs/inotify/max_user_instances", 256 + 128*nodes},
		{"/proc/sys/fs/inotify/max_user_watches", 32768 * (nodes + 1)},
	}
}

// RaiseLimits raises what would be too little for this many nodes, and says so.
// Such settings belong to the machine: they are never lowered, nor put back.
func RaiseLimits(nodes int, say func(string)) error { return raise(limits(nodes), say) }

func raise(l []limit, say func(string)) error {
	for _, l := range l {
		name := strings.ReplaceAll(strings.TrimPrefix(l.path, "/proc/sys/"), "/", ".")
		b, err := os.ReadFile(l.path)
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		have, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		if have >= l.atLeast {
			continue
		}
		if err := os.WriteFile(l.path, []byte(strconv.Itoa(l.atLeast)), 0); err != nil {
			return fmt.Errorf("%s is %d, and the nodes need %d: set it with sysctl -w %s=%d (here that fails: %w)",
				name, have, l.atLeast, name, l.atLeast, err)
		}
		say(fmt.Sprintf("raised %s from %d to %d for the nodes' kubelets and containerds", name, have, l.atLeast))
	}
	return nil
}
