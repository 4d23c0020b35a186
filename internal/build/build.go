// Package build says which version a program is. It must not import anything of Warren.
package build

// Version is what was released, as v0.2.0: the tag of its images, and what its chart installs. It is set when a
// program is linked, with -X; what nobody released is "dev".
var Version = "dev"
