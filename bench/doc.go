// Package bench is the benchmark: what is measured (workloads), through what (variants), in which order (rounds),
// and what is made of it (report, plots, comparison).
//
// It starts nothing itself: a Site sets variants up on Kubernetes or in network namespaces and runs the load
// program there. A variant is a folder of variants/, so that another mesh is another folder and no code.
package bench
