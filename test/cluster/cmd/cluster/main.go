// Command cluster runs a real Kubernetes on this machine. See the module's
// README.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	cluster "github.com/warrenmesh/warren/test/cluster"
	"github.com/warrenmesh/warren/test/cluster/internal/boot"
)

const usage = `usage: cluster COMMAND [argument...]

  up [--nodes N] [--dual-stack=false] [--cni bridge|ptp] [IMAGE.tar...]
                            start a cluster and wait until its nodes are ready
  down                      end it and delete everything it left
  status                    say what runs
  kubeconfig                print the path of a kubeconfig that works here
  kubectl|helm ARGUMENT...  run it against the cluster
  node NAME PROGRAM...      run a program on a node, as if started there
  outside PROGRAM...        run a program on the link between the nodes, in none
  kill-node NAME            cut a node's power
  start-node NAME           boot it again from its disk
  reboot-node NAME          both
  load IMAGE.tar...         import image archives on every node
  images [--out DIR] [--platform linux/amd64,linux/arm64] [--tag T] [--fips]
                            build Warren's images as archives
  programs                  build Kubernetes' programs, and print where they are
  pcap FILE                 record the frames between nodes until interrupted
  deps                      install missing programs with apt-get

The cluster lives in $WARREN_CLUSTER_DIR (default /var/lib/warren-cluster).
`

func main() {
	args := os.Args[1:]
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	boot.Main(args)
	// Interrupts end children through their terminal; go on to clean up.
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	err := run(ctx, args[0], args[1:])
	if err == nil {
		return
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() > 0 {
		os.Exit(exit.ExitCode())
	}
	fmt.Fprintln(os.Stderr, "cluster:", err)
	os.Exit(1)
}

func run(ctx context.Context, verb string, args []string) error {
	switch verb {
	case "up":
		return up(ctx, args)
	case "down":
		return down(ctx)
	case "deps":
		return cluster.Deps(ctx, os.Stderr)
	case "images":
		return images(ctx, args)
	case "programs":
		return programs(ctx)
	case cluster.EnterCommand:
		if len(args) < 3 {
			return errors.New("want a directory, a node and a program")
		}
		return cluster.Enter(args[0], args[1], args[2:])
	case cluster.OutsideCommand:
		if len(args) < 2 {
			return errors.New("want a directory and a program")
		}
		return cluster.EnterOutside(args[0], args[1:])
	case "help", "-h", "--help":
		fmt.Print(usage)
		return nil
	}
	c, err := cluster.Attach("")
	if err != nil {
		return err
	}
	switch verb {
	case "kubeconfig":
		fmt.Println(c.Kubeconfig())
		return nil
	case "kubectl", "helm":
		cmd := c.Command(context.Background(), verb, args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		return cmd.Run()
	case "status":
		return status(ctx, c)
	case "load":
		if len(args) == 0 {
			return errors.New("load: name at least one image archive")
		}
		return c.LoadImages(ctx, args...)
	case "node":
		if len(args) < 2 {
			return errors.New("node: want a node and a program")
		}
		return cluster.Enter(c.Dir(), args[0], args[1:])
	case "outside":
		if len(args) == 0 {
			return errors.New("outside: want a program")
		}
		return cluster.EnterOutside(c.Dir(), args)
	case "kill-node", "start-node", "reboot-node":
		if len(args) != 1 {
			return fmt.Errorf("%s: want one node", verb)
		}
		return power(ctx, c, verb, args[0])
	case "pcap":
		if len(args) != 1 {
			return errors.New("pcap: want one file")
		}
		return c.Pcap(ctx, args[0])
	}
	return fmt.Errorf("unknown command %q: see `cluster help`", verb)
}

func programs(ctx context.Context) error {
	dir, err := cluster.Binaries(ctx, func(s string) { fmt.Fprintln(os.Stderr, s) })
	if err == nil {
		fmt.Println(dir)
	}
	return err
}

func up(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("up", flag.ExitOnError)
	nodes := f.Int("nodes", 2, "number of nodes")
	dual := f.Bool("dual-stack", true, "IPv4 and IPv6")
	cni := f.String("cni", "", "bridge or ptp (default: bridge if the kernel can filter bridged packets)")
	_ = f.Parse(args)
	start := time.Now()
	c, err := cluster.Start(ctx, cluster.Options{
		Nodes: *nodes, SingleIPv4: !*dual, CNI: *cni, Images: f.Args(), IsLauncher: true,
		Log: func(s string) { fmt.Fprintln(os.Stderr, s) },
	})
	if err != nil {
		return err
	}
	fmt.Printf("%d nodes ready in %.1f s\nexport KUBECONFIG=%s\n", *nodes, time.Since(start).Seconds(), c.Kubeconfig())
	return nil
}

func down(ctx context.Context) error {
	start := time.Now()
	if err := cluster.Remove(ctx, cluster.Dir(), true); err != nil {
		return err
	}
	fmt.Printf("gone in %.1f s\n", time.Since(start).Seconds())
	return nil
}

func power(ctx context.Context, c *cluster.Cluster, verb, name string) error {
	n, err := c.Node(name)
	if err != nil {
		return err
	}
	switch verb {
	case "kill-node":
		return n.Kill(ctx)
	case "start-node":
		err = n.Start(ctx)
	default:
		err = n.Reboot(ctx)
	}
	if err != nil {
		return err
	}
	return c.WaitReady(ctx)
}

func status(ctx context.Context, c *cluster.Cluster) error {
	st, err := c.Status(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("directory   %s\nkubeconfig  %s\n", c.Dir(), c.Kubeconfig())
	for _, s := range st {
		n, err := c.Node(s.Name)
		if err != nil {
			return err
		}
		var addrs []string
		for _, a := range n.Addrs() {
			addrs = append(addrs, a.String())
		}
		state := "stopped"
		if s.Running {
			pid, err := n.PID()
			if err != nil {
				return err
			}
			state = fmt.Sprintf("running, pid %d", pid)
		}
		fmt.Printf("%-11s %s  %s\n", s.Name, state, strings.Join(addrs, " "))
	}
	return nil
}

func images(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("images", flag.ExitOnError)
	out := f.String("out", "out/images", "directory for the archives")
	platforms := f.String("platform", "", "comma-separated platforms (default: this machine's)")
	tag := f.String("tag", "dev", "tag of the images")
	fips := f.Bool("fips", false, "with the certified FIPS 140-3 module; -fips is added to the tag")
	_ = f.Parse(args)
	return cluster.BuildImages(ctx, cluster.ImageOptions{
		Out: *out, Platforms: *platforms, Tag: *tag, FIPS: *fips, Waypoint: true,
		Log: func(s string) { fmt.Println(s) },
	})
}
