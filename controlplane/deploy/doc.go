// Package deploy makes the pods of waypoints: for each Gateway of their class a Deployment, a Service, a service account
// and a disruption budget, applied server-side so that others may own what is not said here (the number of replicas, for
// one), and a status that says how far it has come.
//
// It knows Kubernetes and nothing of what a waypoint does.
package deploy
