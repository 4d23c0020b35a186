// Package charts carries the Helm chart and the profiles inside of programs, so that `warren install` needs neither
// helm nor a download. It knows nothing of how they are rendered.
package charts

import "embed"

// Files holds the chart under warren/ and one values file for each profile under profiles/.
//
//go:embed all:warren profiles
var Files embed.FS
