// Package analysis tells what is wrong with objects before, or without, a cluster that says so: it runs the control plane's own
// index and its judgement of policies over them, and adds what neither looks at, names that lead nowhere.
//
// It owns the codes of what it adds; those of policies are package policy's. It must not know where objects come from.
package analysis
