// Package bpf holds the kernel side of the data path: the C sources, what the compiler made of them, and the
// Go types of everything that both sides share. Only node-agent/datapath imports it.
//
// It owns the kernel ABI: maps, their keys and values, the outcomes that are counted. It does nothing: loading,
// attaching and writing maps is datapath's.
package bpf

//go:generate go tool bpf2go -go-package bpf -no-global-types -type pod -type owner -type guarded -type flow -type ticket -type prefix -type addr -type verdict -type fate -type listener -type outcome -type words -type ruleset -type rules_flags -type rules_identity -type rules_port -type rules_source -type gate -type gate_flags -type direct -type event -type event_kind -type event_budget -type udp_gate -type udp_source -type udp_flow -type udp_peer -type dns_key -type dns_answer -type dns_client -type near -type way -type target -type service_draw -type endpoint -output-stem mesh -target bpfel Mesh mesh.c -- -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-variable

// Schema names the directory that maps and links are pinned in. It changes with any key, value, size or type
// of a map, so that programs of two versions never meet in one map. The map agent_sockets has the same layout in all
// of them: agents of two versions that overlap tag their sockets in both.
const Schema = "v5"
