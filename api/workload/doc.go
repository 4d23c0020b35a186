// Package workload is the wire form of workloads and services, istio.workload.
package workload
