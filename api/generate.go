package api

// The generators are the versions in go.mod; protoc and the well-known types come from the system
// (Debian: protobuf-compiler, libprotobuf-dev).
//
//go:generate sh generate.sh
