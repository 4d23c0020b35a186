package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/environ"
)

// from reads a configuration from name=value pairs.
func from(pairs ...string) *environment {
	values := map[string]string{}
	for _, p := range pairs {
		k, v, _ := strings.Cut(p, "=")
		values[k] = v
	}
	return &environment{Reader: environ.Reader{Get: func(k string) string { return values[k] }}}
}

func TestAZtunnelManifestConfiguresTheAgent(t *testing.T) {
	e := from("NODE_NAME=node1", "POD_NAME=ztunnel-x", "POD_NAMESPACE=mesh", "INSTANCE_IP=10.0.0.1", "SERVICE_ACCOUNT=ztunnel",
		"ISTIO_META_CLUSTER_ID=c1", "CA_ADDRESS=https://istiod.mesh.svc:15012", "XDS_ADDRESS=istiod.mesh.svc:15012",
		"TERMINATION_GRACE_PERIOD_SECONDS=30", "RUST_LOG=warn,ztunnel=debug", "SECRET_TTL=1h", "WARREN_EXEMPT_NAMESPACES=kube-system,cni")
	c := e.config()
	if err := errors.Join(e.Err(), c.Validate()); err != nil {
		t.Fatal(err)
	}
	if c.Node != "node1" || c.Cluster != "c1" || c.CAAddress != "istiod.mesh.svc:15012" || c.XDSAddress != c.CAAddress {
		t.Errorf("%+v", c)
	}
	if c.Grace != 28*time.Second || c.SecretTTL != time.Hour || c.Level.Level() != slog.LevelWarn || len(c.Exempt) != 2 {
		t.Errorf("grace %s, TTL %s, level %s, exempt %q", c.Grace, c.SecretTTL, c.Level.Level(), c.Exempt)
	}
}

func TestWhatIsWrongIsSaidAllAtOnce(t *testing.T) {
	e := from("INSTANCE_IP=nowhere", "SECRET_TTL=soon", "XDS_ADDRESS=http://istiod:15012", "LOG_LEVEL=loud")
	c := e.config()
	err := errors.Join(e.Err(), c.Validate())
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"INSTANCE_IP", "SECRET_TTL", "LOG_LEVEL", "NODE_NAME is empty", "only https is supported"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not mention %q:\n%s", want, err)
		}
	}
}

// TestNoConnectionWaitsForALogThatNobodyReads: lines beyond a limit are left out and counted instead.
func TestNoConnectionWaitsForALogThatNobodyReads(t *testing.T) {
	r, w := io.Pipe()
	_, access, flush := loggers(w, false, slog.LevelInfo)
	line := strings.Repeat("x", 1<<10)
	for range 3 * batchMost >> 10 {
		access.Info(line)
	}
	go func() {
		flush()
		w.Close()
	}()
	all, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	told, left := strings.Count(string(all), line), 0
	if i := strings.Index(string(all), "lines="); i < 0 {
		t.Fatal("nobody was told of lines that were left out")
	} else if _, err := fmt.Sscanf(string(all[i:]), "lines=%d", &left); err != nil {
		t.Fatal(err)
	}
	if told == 0 || left == 0 || told+left != 3*batchMost>>10 {
		t.Errorf("%d lines are there and %d said to be left out, of %d", told, left, 3*batchMost>>10)
	}
}

func TestTheAccessLogTellsItselfApart(t *testing.T) {
	var out strings.Builder
	log, access, flush := loggers(&out, true, slog.LevelInfo)
	log.Info("starting")
	access.Error("connection complete", "src.addr", "10.0.0.1:1")
	flush()
	lines := strings.Split(out.String(), "\n")
	if strings.Contains(lines[0], "access") || !strings.Contains(lines[0], `"message":"starting"`) {
		t.Errorf("the agent's line is %s", lines[0])
	}
	if !strings.Contains(lines[1], `"scope":"access"`) || !strings.Contains(lines[1], `"level":"error"`) {
		t.Errorf("the access log's line is %s", lines[1])
	}
}
