# make demo                      the mesh on a Kubernetes of its own, with an application, proven by figures
# make demo KUBECONFIG=file      the same on a cluster you have
# make test                      every test: the house, units with the race detector, kernel, cluster, end to end
SHELL := /bin/bash
# One way to compile for checks, tests, images and peers: what they have in common is compiled once. What a debugger reads of a program
# takes a sixth of compiling it: GOFLAGS= brings it back.
export GOFLAGS ?= -buildvcs=false -trimpath -gcflags=all=-dwarf=false
export CGO_ENABLED ?= 0
CLUSTER := cd test/cluster && go run ./cmd/cluster
ifeq ($(origin KUBECONFIG),command line)
ON := -kubeconfig $(abspath $(KUBECONFIG))
endif

.PHONY: conformance bench bench-netns fuzz demo test test-kernels test-cni soak lint unit e2e generate images release cluster cluster-down deps

demo: deps
	@cd test/e2e && go run ./cmd/demo $(ON)

test: deps
	@go run ./test/run

lint: deps                      # format, vet, staticcheck, generated files, chart
	@go run ./test/run house

unit: deps                      # with the race detector; kernel tests need root
	@go run ./test/run unit

e2e: deps                       # on the two-node cluster, or with KUBECONFIG=file on that
	@WARREN_E2E_KUBECONFIG=$(if $(ON),$(abspath $(KUBECONFIG))) go run ./test/run e2e

test-kernels: deps              # the kernel side on Debian's 6.1 and 6.12, in QEMU; then a node of a cluster with a kernel of its own
	@command -v qemu-system-x86_64 xz >/dev/null || apt-get install -y --no-install-recommends qemu-system-x86 xz-utils
	@go run ./test/kernels
	@cd test/e2e && go test -count=1 -v -timeout 1h -run TestNodeWithAKernelOfItsOwn . -machine=6.12

# Without power cuts, which end Cilium's agents too, and without what shows the way from veth to veth, which it is not for.
ON_CILIUM := APIServerC|DNSCapture|Egress$$|LabelCaptures|NewPodsAre|Probes|Escapes|Manners|Headless|Gateway$$|NetworkPolic|InANamespace|SameNode$$|Addresses|TCPManners|IdentityIn|OutsideThe|AuthorizationPolicy|NothingIn|UDPPolicy|Waypoint$$
test-cni: deps                  # the mesh on a cluster whose network plugin is Cilium, beside kube-proxy and in its place
	@command -v clang-19 >/dev/null && command -v ipset >/dev/null || apt-get install -y --no-install-recommends clang-19 ipset
	@cd test/e2e && for mode in cilium cilium-kubeproxy; do go test -count=1 -v -timeout 1h -run '^Test($(ON_CILIUM))' . -cni=$$mode || exit; done

soak: export WARREN_RECORD = 1
soak: deps                      # the suites with the numbers of a long run
	@go test -count=1 -v -timeout 1h -run TestPeersThatMustBeRefused ./test/interop -long
	@go test -count=1 -v -timeout 1h ./test/reference -long
	@go test -count=1 -v -timeout 1h ./test/images -long
	@go test -count=1 -v -timeout 1h -run TestValidationIsIstiods ./test/interop -istiod=build
	@go test -count=1 -v -timeout 2h -run 'TestPolicyDifferential|TestKernelVerdictCost' ./node-agent/datapath -cases 1000000
	@go test -count=1 -v -timeout 30m -run 'ShortWay|TestShortConnections|TestBytesAreExact' ./node-agent/datapath -long
	@go test -count=1 -v -timeout 3h ./node-agent/proxy -long
	@cd test/e2e && go test -count=1 -v -timeout 6h . -long

conformance: deps               # the Gateway API's conformance suite on the cluster, or with KUBECONFIG=file on that; report in test/conformance
	@cd test/conformance && WARREN_E2E_KUBECONFIG=$(if $(ON),$(abspath $(KUBECONFIG))) go test -count=1 -v -timeout 1h .

bench: deps                     # what the mesh costs against none and against sidecars; report in bench/results; BENCH='--rounds 9 --workloads http-c16'
	@cd test/e2e && WARREN_E2E_KUBECONFIG=$(if $(ON),$(abspath $(KUBECONFIG))) go run ./cmd/bench --results $(CURDIR)/bench/results $(BENCH)

bench-netns: deps               # the same without Kubernetes, in network namespaces; report in bench/results/netns
	@go run ./bench/netns --results $(CURDIR)/bench/results/netns --workloads rr-c1,http-1000qps,http-c1,http-c16,http-c64,new-conn-200,new-conn-c1,new-conn-c16,bulk-1,bulk-4,idle-15k $(BENCH)

fuzz: export FUZZTIME ?= 2m
fuzz: deps                      # every fuzz target for minutes, guided by coverage; FUZZTIME=10m for longer
	@go run ./test/run fuzz

generate: deps
	go generate ./...

images: deps                    # archives of all images for amd64 and arm64 in out/images
	@$(CLUSTER) images --out $(CURDIR)/out/images --platform linux/amd64,linux/arm64 $(if $(FIPS),--fips)

release: deps                   # what is published of a version, in out/release: images, bills of materials, charts, the command line; VERSION=v0.2.0
	@go run ./test/release --version "$(VERSION)" --out $(CURDIR)/out/release

cluster: deps
	@$(CLUSTER) up

cluster-down:
	@$(CLUSTER) down

deps:
	@.ci/deps
