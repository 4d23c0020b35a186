// Package release turns values into the objects of a Warren installation and the objects into a release in a
// cluster: profiles and files are merged and checked, the chart is rendered, what it yields is applied in order,
// and a record is kept as Helm keeps it, so that helm can go on from there.
//
// It owns the chart's way into a cluster. It must not know what an operator sees of it: no flags, no terminal.
package release
