package waypoint

import "github.com/envoyproxy/go-control-plane/pkg/resource/v3"

// TypeActive is how the process beside Envoy tells the control plane which resources Envoy uses, as it was read: a request
// of that type on Envoy's stream, whose initial_resource_versions are by [ActiveKey]: those of all resources where it
// subscribes to "*", or else what has changed; it unsubscribes from what is gone. Envoy's own acknowledgement says only that
// it has understood.
const TypeActive = "type.googleapis.com/warren.waypoint.v1.Active"

// ActiveTypes are the types of which that is told: those that decide about requests and connections.
var ActiveTypes = []string{resource.ListenerType, resource.RouteType, resource.ExtensionConfigType}

// ActiveKey names a resource among those of all types.
func ActiveKey(kind, name string) string {
	switch kind {
	case resource.ListenerType:
		return "listener/" + name
	case resource.ExtensionConfigType:
		return "extension/" + name
	}
	return "route/" + name
}
