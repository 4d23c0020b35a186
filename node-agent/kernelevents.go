package nodeagent

import (
	"context"
	"errors"
	"time"

	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/proxy"
)

// reportKernel makes log lines and metrics of what the kernel decides without the agent. What it cannot read is no
// reason to stop: policy is enforced all the same.
func (a *agent) reportKernel(ctx context.Context) error {
	for ctx.Err() == nil {
		for e, err := range a.datapath.Events(ctx) {
			if err != nil {
				a.cfg.Log.Error("decisions of the kernel are not reported", "error", err)
				break
			}
			a.reportEvent(e)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return nil
}

// measureEvery is how often the bytes of open connections are read that the kernel carries.
const measureEvery = 10 * time.Second

// measureFlows keeps the metrics of long connections current.
func (a *agent) measureFlows(ctx context.Context) error {
	t := time.NewTicker(measureEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if err := a.proxy.MeasureFlows(); err != nil {
			a.cfg.Log.Debug("reading what direct connections carried", "error", err)
		}
	}
}

// How often it is looked what is attached to the node and its pods' interfaces, and captures packets there.
const (
	checkWaysEvery = 10
	captureEvery   = time.Second
)

// chooseWays keeps direct connections from passing what has to see them.
func (a *agent) chooseWays(ctx context.Context) error {
	t := time.NewTicker(captureEvery)
	defer t.Stop()
	told := ""
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		switch err := a.datapath.CheckWays(n%checkWaysEvery == 0); {
		case errors.Is(err, datapath.ErrYielded):
			return nil
		case err == nil:
			told = ""
		case err.Error() != told:
			told = err.Error()
			a.cfg.Log.Error("choosing the ways of direct connections", "error", err)
		}
	}
}

func (a *agent) reportEvent(e datapath.Event) {
	f := proxy.Flow{Client: e.Client, Server: e.Server, Service: e.Service, ClientPod: e.ClientPod, ServerPod: e.ServerPod, Source: e.Source}
	switch e.Kind {
	case datapath.Denied:
		a.proxy.FlowDenied(f, e.Time, e.Verdict)
	case datapath.Datagram:
		a.proxy.DatagramDenied(f, e.Time, e.Verdict)
	case datapath.Opened:
		a.proxy.FlowOpened(f, e.Time)
	case datapath.Closed:
		a.proxy.FlowClosed(f, e.Opened, e.Sent, e.Received)
	}
}
