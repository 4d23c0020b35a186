// Package holder keeps file descriptors and last-good state for the node agent while the agent is away.
//
// A holder process owns duplicates of what must not die with the agent: per pod the network namespace and its
// listeners, and sealed memfds with the last good snapshot and the certificates. The kernel goes on queueing
// connections on a listener as long as one process has it open, so an agent that is killed, restarted or
// upgraded costs its clients time and no refusals.
//
//	agent ── SOCK_SEQPACKET, one JSON record per request, SCM_RIGHTS ──► holder (/run/warren/holder.sock)
//	 Keeper: what should be held, re-put when the holder was away         Server: what is held
//
// One agent at a time may write. A new one takes over by Hello and gets the next generation; from then on
// the old one may only read.
//
// The package must not know what an item means: no pods, no certificates. It never logs content.
package holder
