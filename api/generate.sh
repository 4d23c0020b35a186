#!/bin/sh
# Writes the Go code of every .proto below api/. Run by `go generate ./api`.
set -eu
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
go build -o "$out" google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
protoc -I . \
	--plugin="$out/protoc-gen-go" --go_out=. --go_opt=paths=source_relative \
	--plugin="$out/protoc-gen-go-grpc" --go-grpc_out=. --go-grpc_opt=paths=source_relative \
	api/workload/workload.proto api/security/authorization.proto api/ca/ca.proto api/node/node.proto
