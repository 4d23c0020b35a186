// Package node is the wire form of what a node learns beyond Istio's types and reports back, warren.node.v1.
package node
