package deploy

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Names of Istio's, by which tools find waypoints.
const (
	Class           = index.WaypointClass
	controller      = "istio.io/mesh-controller"
	managed         = "istio.io-mesh-controller"
	managedIngress  = "istio.io-gateway-controller"
	annotationType  = "networking.istio.io/service-type"
	labelManaged    = "gateway.istio.io/managed"
	labelGateway    = "gateway.networking.k8s.io/gateway-name"
	labelClass      = "gateway.networking.k8s.io/gateway-class-name"
	labelFor        = "istio.io/waypoint-for"
	hboneProtocol   = gatewayv1.ProtocolType("HBONE")
	statusPort      = 15021
	telemetryPort   = 15020
	drainSeconds    = 30
	terminateWithin = drainSeconds + 15
	drainVariable   = "DRAIN_SECONDS"
)

// Settings are the same for all waypoints.
type Settings struct {
	Image       string
	PullPolicy  string
	PullSecrets []string
	Service     string // of the control plane: host and port
	ClusterID   string
	TrustDomain string
	Revision    string
}

type object = map[string]any

// manifest is one object and where it goes.
type manifest struct {
	kind kind
	body object
}

type kind uint8

const (
	serviceAccount kind = iota
	service
	deployment
	budget
	autoscaler
)

// isWaypoint tells the two kinds of Gateways apart.
func isWaypoint(g *gatewayv1.Gateway) bool { return g.Spec.GatewayClassName == Class }

// nameOf is the name of what is made for a Gateway.
func nameOf(g *gatewayv1.Gateway) string {
	if isWaypoint(g) {
		return g.Name
	}
	return index.IngressName(g)
}

// manifests are the objects of a Gateway, to which ListenerSets add ports, as Parameters wish them to be.
func (s Settings) manifests(g *gatewayv1.Gateway, added []gatewayv1.PortNumber, w wishes) ([]manifest, error) {
	labels, annotations := object{}, object{}
	if i := g.Spec.Infrastructure; i != nil {
		for k, v := range i.Labels {
			labels[string(k)] = string(v)
		}
		for k, v := range i.Annotations {
			annotations[string(k)] = string(v)
		}
	}
	name, by := nameOf(g), managed
	if !isWaypoint(g) {
		by = managedIngress
	}
	own := object{labelManaged: by, labelGateway: g.Name, labelClass: string(g.Spec.GatewayClassName)}
	for k, v := range own {
		labels[k] = v
	}
	meta := func(apiVersion, kind string) object {
		return object{
			"apiVersion": apiVersion, "kind": kind,
			"metadata": object{
				"name": name, "namespace": g.Namespace, "labels": labels, "annotations": annotations,
				"ownerReferences": []any{object{
					"apiVersion": gatewayv1.GroupVersion.String(), "kind": "Gateway", "name": g.Name, "uid": string(g.UID), "controller": true,
				}},
			},
		}
	}
	selector := object{labelGateway: g.Name}

	account := meta("v1", "ServiceAccount")

	svc := meta("v1", "Service")
	svc["spec"] = serviceSpec(g, added, selector, w)

	pod := object{}
	for k, v := range labels {
		pod[k] = v
	}
	for k, v := range (object{
		"istio.io/dataplane-mode": "none", "sidecar.istio.io/inject": "false",
		"service.istio.io/canonical-name": name, "service.istio.io/canonical-revision": "latest", "istio.io/rev": s.Revision,
	}) {
		pod[k] = v
	}
	if isWaypoint(g) {
		pod["networking.istio.io/tunnel"] = "http"
	}
	podAnnotations := object{"prometheus.io/scrape": "true", "prometheus.io/port": fmt.Sprint(telemetryPort), "prometheus.io/path": "/stats/prometheus"}
	for k, v := range annotations {
		podAnnotations[k] = v
	}
	dep := meta("apps/v1", "Deployment")
	dep["spec"] = object{
		"selector": object{"matchLabels": selector},
		"strategy": object{"type": "RollingUpdate", "rollingUpdate": object{"maxSurge": 1, "maxUnavailable": 0}},
		"template": object{
			"metadata": object{"labels": pod, "annotations": podAnnotations},
			"spec":     s.pod(g, selector),
		},
	}

	pdb := meta("policy/v1", "PodDisruptionBudget")
	pdb["spec"] = object{"maxUnavailable": 1, "selector": object{"matchLabels": selector}}

	all := []manifest{{serviceAccount, account}, {service, svc}, {deployment, dep}, {budget, pdb}}
	if w.scaled() {
		hpa := meta("autoscaling/v2", "HorizontalPodAutoscaler")
		hpa["spec"] = object{"scaleTargetRef": object{"apiVersion": "apps/v1", "kind": "Deployment", "name": name}}
		all = append(all, manifest{autoscaler, hpa})
	}
	for i := range all {
		var err error
		if all[i], err = w.on(all[i]); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func (s Settings) pod(g *gatewayv1.Gateway, selector object) object {
	field := func(name, path string) object {
		return object{"name": name, "valueFrom": object{"fieldRef": object{"fieldPath": path}}}
	}
	value := func(name, v string) object { return object{"name": name, "value": v} }
	mount := func(name, path string, readOnly bool) object {
		return object{"name": name, "mountPath": path, "readOnly": readOnly}
	}
	probe := object{"httpGet": object{"path": "/healthz/ready", "port": statusPort}, "periodSeconds": 2, "failureThreshold": 4}
	ports := []any{
		object{"name": "metrics", "containerPort": telemetryPort, "protocol": "TCP"},
		object{"name": "status-port", "containerPort": statusPort, "protocol": "TCP"},
	}
	if isWaypoint(g) {
		ports = append(ports, object{"name": "mesh", "containerPort": mesh.HBONEPort, "protocol": "TCP"})
	}
	spec := object{
		"serviceAccountName":            nameOf(g),
		"automountServiceAccountToken":  false,
		"enableServiceLinks":            false,
		"terminationGracePeriodSeconds": terminateWithin,
		"topologySpreadConstraints": []any{object{
			"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
			"labelSelector": object{"matchLabels": selector},
		}},
		"containers": []any{object{
			"name": "istio-proxy", "image": s.Image, "imagePullPolicy": s.PullPolicy,
			"env": []any{
				field("POD_NAME", "metadata.name"), field("POD_NAMESPACE", "metadata.namespace"),
				field("POD_IP", "status.podIP"), field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
				value("CONTROL_ADDRESS", s.Service), value("CLUSTER_ID", s.ClusterID), value("TRUST_DOMAIN", s.TrustDomain),
				value(drainVariable, fmt.Sprint(drainSeconds)),
			},
			"ports":          ports,
			"readinessProbe": probe,
			"resources":      object{"requests": object{"cpu": "100m", "memory": "96Mi"}},
			"securityContext": object{
				"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsNonRoot": true,
				"runAsUser": 65532, "runAsGroup": 65532, "capabilities": object{"drop": []any{"ALL"}},
				"seccompProfile": object{"type": "RuntimeDefault"},
			},
			"volumeMounts": []any{
				mount("run", "/run/waypoint", false), mount("token", "/var/run/secrets/tokens", true), mount("root", "/var/run/secrets/istio", true),
			},
		}},
		"volumes": []any{
			object{"name": "run", "emptyDir": object{"medium": "Memory"}},
			object{"name": "token", "projected": object{"sources": []any{object{
				"serviceAccountToken": object{"audience": "istio-ca", "expirationSeconds": 43200, "path": "istio-token"},
			}}}},
			object{"name": "root", "configMap": object{"name": "istio-ca-root-cert"}},
		},
	}
	if !isWaypoint(g) { // listens where its clients come, without any privilege of its own
		spec["securityContext"] = object{"sysctls": []any{object{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}}}
	}
	if len(s.PullSecrets) > 0 {
		var refs []any
		for _, n := range s.PullSecrets {
			refs = append(refs, object{"name": n})
		}
		spec["imagePullSecrets"] = refs
	}
	return spec
}

// serviceSpec is how clients reach a Gateway's pods.
func serviceSpec(g *gatewayv1.Gateway, added []gatewayv1.PortNumber, selector object, w wishes) object {
	ports := []any{object{"name": "status-port", "port": statusPort, "protocol": "TCP", "appProtocol": "tcp"}}
	spec := object{"selector": selector, "ipFamilyPolicy": "PreferDualStack"}
	if isWaypoint(g) {
		spec["ports"] = append(ports, object{"name": "mesh", "port": mesh.HBONEPort, "protocol": "TCP", "appProtocol": "tcp"})
		return spec
	}
	spec["type"] = cmp.Or(w.serviceType(g), "LoadBalancer")
	var asked []gatewayv1.PortNumber
	for _, l := range g.Spec.Listeners {
		asked = append(asked, l.Port)
	}
	seen := []gatewayv1.PortNumber{statusPort}
	for _, port := range append(asked, added...) {
		if slices.Contains(seen, port) {
			continue
		}
		seen = append(seen, port)
		// What is behind is the gateway, whatever the protocol: nodes hand its clients' connections on as they come.
		ports = append(ports, object{"name": "port-" + strconv.Itoa(int(port)), "port": int(port), "protocol": "TCP", "appProtocol": "tcp"})
	}
	spec["ports"] = ports
	if asked := addressesAsked(g); len(asked) > 0 {
		spec["loadBalancerIP"] = asked[0] // there is one; what becomes of the others, the status says
	}
	return spec
}

// addressesAsked are those that a Gateway asks to have.
func addressesAsked(g *gatewayv1.Gateway) (out []string) {
	for _, a := range g.Spec.Addresses {
		if a.Value != "" && !slices.Contains(out, a.Value) {
			out = append(out, a.Value)
		}
	}
	return out
}

// verdict says whether a Gateway can be a waypoint, and why not.
func verdict(g *gatewayv1.Gateway) (reason gatewayv1.GatewayConditionReason, message string) {
	switch f := g.Labels[labelFor]; f {
	case "", "service", "all", "none":
	case "workload":
		return gatewayv1.GatewayReasonInvalidParameters, "the label " + labelFor + ": workload is not supported: waypoints take what is sent to Services; use service or none"
	default:
		return gatewayv1.GatewayReasonInvalidParameters, fmt.Sprintf("the label %s has the value %q; use service or none", labelFor, f)
	}
	if len(g.Spec.Listeners) != 1 || g.Spec.Listeners[0].Protocol != hboneProtocol || g.Spec.Listeners[0].Port != mesh.HBONEPort {
		return gatewayv1.GatewayReasonListenersNotValid, fmt.Sprintf("a waypoint has one listener, with protocol HBONE and port %d", mesh.HBONEPort)
	}
	return gatewayv1.GatewayReasonAccepted, "the waypoint is made as the Deployment " + g.Name
}
