package bench

import "time"

// Outcome is what one run of the load program prints.
type Outcome struct {
	Done    int64    `json:"done"`   // requests answered, or connections
	Failed  int64    `json:"failed"` // and not
	Bytes   int64    `json:"bytes"`  // carried by the bulk workloads
	Seconds float64  `json:"seconds"`
	Latency *Latency `json:"latency,omitempty"`
	Late    float64  `json:"late,omitempty"` // µs by which the generator itself was late, 99th percentile
	Errors  []string `json:"errors,omitempty"`
}

// Latency is the distribution of one run, in µs.
type Latency struct {
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p999"`
}

// Reading is what one kernel has used so far.
type Reading struct {
	Busy      time.Duration `json:"busy"`     // of all cores: not idle and not waiting for a disk
	SoftIRQ   time.Duration `json:"softirq"`  // of that
	Switches  uint64        `json:"switches"` // context switches since the boot: tells kernels apart
	BootTime  int64         `json:"bootTime"`
	Processes []Process     `json:"processes"` // those that were asked for
}

// Process is one process of a proxy.
type Process struct {
	PID     int           `json:"pid"`
	Name    string        `json:"name"`
	CPU     time.Duration `json:"cpu"`
	RSS     int64         `json:"rss"`     // bytes
	RSSAnon int64         `json:"rssAnon"` // of these not of files
	Files   int           `json:"files"`   // descriptors it may have
}
