// Package why explains what becomes of a connection: which node captures it, where it goes, through which tunnel, and
// which policy decides at the other end.
//
// It asks the functions that the data path asks, mesh.Snapshot's Resolve and Authorize, on the states that the nodes
// themselves hold. It owns the explanation. It must not know where the states come from or how it is printed.
package why
