package plan

// Object is something the supervisor creates once the API server is ready.
type Object struct {
	Path string // collection, as in the URL
	Body any
	// Status is written to the object's status afterwards, by name.
	Name   string
	Status any
}

// Objects are the nodes, so that their pod ranges and addresses are known before
// kubelet and kube-proxy ask, and the cluster's DNS service.
func (c *Cluster) Objects() []Object {
	type m = map[string]any
	var out []Object
	for _, n := range c.NodeList() {
		var cidrs []string
		for _, p := range c.PodCIDRs(n) {
			cidrs = append(cidrs, p.String())
		}
		addrs := []m{{"type": "Hostname", "address": n.Name}}
		for _, a := range c.Addrs(n) {
			addrs = append(addrs, m{"type": "InternalIP", "address": a.String()})
		}
		meta := m{"name": n.Name, "labels": m{"kubernetes.io/hostname": n.Name, "topology.kubernetes.io/region": "local", "topology.kubernetes.io/zone": n.Name}}
		out = append(out, Object{
			Path: "/api/v1/nodes",
			Name: n.Name,
			Body: m{
				"apiVersion": "v1", "kind": "Node", "metadata": meta,
				"spec": m{
					"podCIDR": cidrs[0], "podCIDRs": cidrs,
					"taints": []m{{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}},
				},
			},
			Status: m{"apiVersion": "v1", "kind": "Node", "metadata": meta, "status": m{"addresses": addrs}},
		})
	}
	ports := func(target bool) []m {
		var l []m
		for _, p := range []struct{ name, proto string }{{"dns", "UDP"}, {"dns-tcp", "TCP"}} {
			e := m{"name": p.name, "port": 53, "protocol": p.proto}
			if target {
				e["targetPort"] = 53
			}
			l = append(l, e)
		}
		return l
	}
	var vips []string
	for _, f := range c.Families() {
		vips = append(vips, f.Service(10).String())
		kind := "IPv4"
		if f.Host.Addr().Is6() {
			kind = "IPv6"
		}
		out = append(out, Object{
			Path: "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices",
			Body: m{
				"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
				"metadata":    m{"name": "kube-dns-" + map[string]string{"IPv4": "v4", "IPv6": "v6"}[kind], "labels": m{"kubernetes.io/service-name": "kube-dns"}},
				"addressType": kind, "ports": ports(false),
				"endpoints": []m{{"addresses": []string{f.Host.Addr().String()}, "conditions": m{"ready": true}}},
			},
		})
	}
	return append(out, Object{
		Path: "/api/v1/namespaces/kube-system/services",
		Body: m{
			"apiVersion": "v1", "kind": "Service",
			"metadata": m{"name": "kube-dns", "labels": m{"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"}},
			"spec":     m{"clusterIP": vips[0], "clusterIPs": vips, "ipFamilyPolicy": "PreferDualStack", "ports": ports(true)},
		},
	})
}
