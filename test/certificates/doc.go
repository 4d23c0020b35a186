// Package certificates tests the life of certificates across both components: a control plane's CA, xDS and status
// service over gRPC, two nodes with the agent's own clients and certificate manager, and requests through the
// agent's tunnels all the while. It has no kernel and no Kubernetes: the API server is client-go's fake.
package certificates
