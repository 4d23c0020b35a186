// Package ca is the wire form of certificate signing, istio.v1.auth.
package ca
