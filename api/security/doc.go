// Package security is the wire form of L4 authorization policies, istio.security.
package security
