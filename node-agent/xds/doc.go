// Package xds keeps a node's picture of the mesh: it subscribes to the control plane, decodes what comes,
// commits it to the Store, and only then acknowledges it.
//
// It owns the stream, the versions, the last good state on disk and the report back. It must not know what is
// done with the state: pods, sockets and certificates belong to others, who watch the Store or are called back.
//
// Only Run's goroutine touches the state in the making. Its stages follow one response:
//
//	receive → decode every resource → build → commit → Store.Swap → callbacks → ACK or NACK → save
//
// A resource that cannot be decoded is named in the NACK and keeps its last state; the others of the response
// are applied, because nobody sends them again. A policy that has no last state denies instead.
package xds
