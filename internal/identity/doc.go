// Package identity owns certificates: it gets them from the CA, keeps them fresh, hands them out as TLS
// configurations and checks those of peers.
//
// It knows identities and X.509. It must not know pods, connections or policies: whether a verified peer may
// do something is decided elsewhere. Private keys never leave a [Bundle] but through [Bundle.Marshal], and no
// way of printing a value shows one.
package identity
