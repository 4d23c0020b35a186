// Package ca issues the mesh's certificates.
//
// It owns the signing key ([Signer]: self-signed and kept in a Secret, or plugged in as files), who may get which
// certificate ([Server], [Authorizer]), and the control plane's own serving certificate ([Serving]).
//
// A node agent asks on behalf of the pods it runs. It gets a certificate for a service account only while a
// pod of that account runs on its own node, so that a stolen agent token is worth no more than its node.
package ca
