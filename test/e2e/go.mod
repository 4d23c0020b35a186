module github.com/warrenmesh/warren/test/e2e

go 1.26.0

require (
	github.com/warrenmesh/warren v0.0.0
	github.com/warrenmesh/warren/test/cluster v0.0.0
	golang.org/x/sys v0.49.0
)

require (
	github.com/vishvananda/netlink v1.3.1 // indirect
	github.com/vishvananda/netns v0.0.5 // indirect
)

replace (
	github.com/warrenmesh/warren => ../..
	github.com/warrenmesh/warren/test/cluster => ../cluster
)
