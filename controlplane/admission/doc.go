// Package admission answers the API server's question whether an object of the security API may be stored, and
// tells its author what will surprise.
//
//	server.go    the HTTPS side: bounds on size, number and time; AdmissionReview in and out
//	bundle.go    the ValidatingWebhookConfiguration trusts the mesh's root
//	problem.go   what can be wrong: code, severity and explanation of each, of which the docs page is made
//	source.go    an object as it was written, with what a typed one loses
//	authorization.go, peer.go, request.go   what is wrong with an object, by itself
//	surroundings.go                         what is wrong with it in this cluster
//
// Nothing is enforced here. The API server goes on without an answer (failurePolicy Ignore), an object may be older
// than this webhook, and the index turns what it cannot compile into deny by itself.
//
// Package admission owns judgement, words and limits. It knows the cluster only through [Cluster].
package admission
