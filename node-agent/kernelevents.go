package nodeagent

import (
	"context"
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

func (a *agent) reportEvent(e datapath.Event) {
	f := proxy.Flow{Client: e.Client, Server: e.Server, ClientPod: e.ClientPod, ServerPod: e.ServerPod, Source: e.Source}
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
