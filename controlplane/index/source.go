package index

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	extensionsv1alpha1 "istio.io/client-go/pkg/apis/extensions/v1alpha1"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	networkingv1alpha3 "istio.io/client-go/pkg/apis/networking/v1alpha3"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"
	istio "istio.io/client-go/pkg/clientset/versioned"
	istioinformers "istio.io/client-go/pkg/informers/externalversions"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	kubenetworkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"
	gatewayclient "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"
	gatewayinformers "sigs.k8s.io/gateway-api/pkg/client/informers/externalversions"

	"github.com/warrenmesh/warren/controlplane/policy"
)

// Source feeds an Index from a cluster.
type Source struct {
	Kube  kubernetes.Interface
	Istio istio.Interface
	// Gateways reads the Gateway API; without it there are no waypoints.
	Gateways gatewayclient.Interface
	Log      *slog.Logger
	// Dynamic reads what has no typed client here: RateLimits, of which there are none without it, and APIServices and
	// CustomResourceDefinitions, whose calls get no exemption from STRICT without it.
	Dynamic dynamic.Interface

	// Settle is how long after a change others are waited for, so that a burst makes one Update. The first
	// change of a quiet time waits no longer than that.
	Settle time.Duration
	// CRDRetry is how often it is looked whether CRDs that were missing are there; 10 s.
	CRDRetry time.Duration

	index *Index
	core  informers.SharedInformerFactory
	pods  cache.SharedIndexInformer

	stores sync.Map // Kind → cache.Store

	mu      sync.Mutex
	changed map[ref]cache.Store           // what changed, and where its state is
	keys    map[policy.KeySource]KeyState // that were fetched since
	secrets map[SecretKey]*SecretState    // that changed since
	roots   map[RootsKey]*RootsState
	modules map[policy.ModuleSource]ModuleState
	wake    chan struct{}
}

// ref names an object.
type ref struct {
	kind Kind
	key
}

// NewSource returns a Source for an empty index.
func NewSource(kube kubernetes.Interface, istioClient istio.Interface, cfg Config, log *slog.Logger) (*Source, error) {
	x, err := New(cfg)
	if err != nil {
		return nil, err
	}
	s := &Source{
		Kube: kube, Istio: istioClient, Log: log, Settle: 5 * time.Millisecond, CRDRetry: 10 * time.Second,
		index: x, core: informers.NewSharedInformerFactory(kube, 0), changed: map[ref]cache.Store{}, wake: make(chan struct{}, 1),
	}
	s.pods = s.core.Core().V1().Pods().Informer()
	if err := s.pods.AddIndexers(cache.Indexers{indexPlacement: placementKeys, indexNode: nodeKeys}); err != nil {
		return nil, fmt.Errorf("index pods: %w", err)
	}
	return s, nil
}

// factories are those of the clients that custom resources are read with.
type factories struct {
	istioinformers.SharedInformerFactory
	gateways gatewayinformers.SharedInformerFactory       // nil without a client
	dynamic  dynamicinformer.DynamicSharedInformerFactory // nil without a client
}

// crd is a custom resource that is read.
type crd struct {
	kind     Kind
	resource schema.GroupVersionResource
	informer func(factories) cache.SharedIndexInformer
}

// readable reports whether there is a client for it.
func (f factories) readable(c crd) bool {
	switch c.resource.Group {
	case gatewayv1.GroupName:
		return f.gateways != nil
	case policy.RateLimitGroup:
		return f.dynamic != nil
	}
	return true
}

// crds are those that are read, which a cluster may not have (yet).
var crds = []crd{
	{AuthorizationPolicy, schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "authorizationpolicies"},
		func(f factories) cache.SharedIndexInformer {
			return f.Security().V1().AuthorizationPolicies().Informer()
		}},
	{PeerAuthentication, schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "peerauthentications"},
		func(f factories) cache.SharedIndexInformer {
			return f.Security().V1().PeerAuthentications().Informer()
		}},
	{RequestAuthentication, schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "requestauthentications"},
		func(f factories) cache.SharedIndexInformer {
			return f.Security().V1().RequestAuthentications().Informer()
		}},
	{Telemetry, schema.GroupVersionResource{Group: "telemetry.istio.io", Version: "v1", Resource: "telemetries"},
		func(f factories) cache.SharedIndexInformer { return f.Telemetry().V1().Telemetries().Informer() }},
	{ServiceEntry, schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "serviceentries"},
		func(f factories) cache.SharedIndexInformer {
			return f.Networking().V1().ServiceEntries().Informer()
		}},
	{WorkloadEntry, schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "workloadentries"},
		func(f factories) cache.SharedIndexInformer {
			return f.Networking().V1().WorkloadEntries().Informer()
		}},
	{VirtualService, schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "virtualservices"},
		func(f factories) cache.SharedIndexInformer { return f.Networking().V1().VirtualServices().Informer() }},
	{DestinationRule, schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "destinationrules"},
		func(f factories) cache.SharedIndexInformer { return f.Networking().V1().DestinationRules().Informer() }},
	{IstioGateway, schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "gateways"},
		func(f factories) cache.SharedIndexInformer { return f.Networking().V1().Gateways().Informer() }},
	{Gateway, schema.GroupVersionResource{Group: gatewayv1.GroupName, Version: "v1", Resource: "gateways"},
		func(f factories) cache.SharedIndexInformer { return f.gateways.Gateway().V1().Gateways().Informer() }},
	{ListenerSet, schema.GroupVersionResource{Group: gatewayv1.GroupName, Version: "v1", Resource: "listenersets"},
		func(f factories) cache.SharedIndexInformer {
			return f.gateways.Gateway().V1().ListenerSets().Informer()
		}},
	{GatewayClass, schema.GroupVersionResource{Group: gatewayv1.GroupName, Version: "v1", Resource: "gatewayclasses"},
		func(f factories) cache.SharedIndexInformer {
			return f.gateways.Gateway().V1().GatewayClasses().Informer()
		}},
	{HTTPRoute, schema.GroupVersionResource{Group: gatewayv1.GroupName, Version: "v1", Resource: "httproutes"},
		func(f factories) cache.SharedIndexInformer { return f.gateways.Gateway().V1().HTTPRoutes().Informer() }},
	{GRPCRoute, schema.GroupVersionResource{Group: gatewayv1.GroupName, Version: "v1", Resource: "grpcroutes"},
		func(f factories) cache.SharedIndexInformer { return f.gateways.Gateway().V1().GRPCRoutes().Informer() }},
	{TLSRoute, schema.GroupVersionResource{Group: gatewayv1.GroupName, Version: "v1", Resource: "tlsroutes"},
		func(f factories) cache.SharedIndexInformer { return f.gateways.Gateway().V1().TLSRoutes().Informer() }},
	{TCPRoute, schema.GroupVersionResource{Group: gatewayv1.GroupName, Version: "v1", Resource: "tcproutes"},
		func(f factories) cache.SharedIndexInformer { return f.gateways.Gateway().V1().TCPRoutes().Informer() }},
	{BackendTLSPolicy, schema.GroupVersionResource{Group: gatewayv1.GroupName, Version: "v1", Resource: "backendtlspolicies"},
		func(f factories) cache.SharedIndexInformer {
			return f.gateways.Gateway().V1().BackendTLSPolicies().Informer()
		}},
	{EnvoyFilter, schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1alpha3", Resource: "envoyfilters"},
		func(f factories) cache.SharedIndexInformer {
			return f.Networking().V1alpha3().EnvoyFilters().Informer()
		}},
	{WasmPlugin, schema.GroupVersionResource{Group: "extensions.istio.io", Version: "v1alpha1", Resource: "wasmplugins"},
		func(f factories) cache.SharedIndexInformer { return f.Extensions().V1alpha1().WasmPlugins().Informer() }},
	{RateLimit, policy.RateLimits, func(f factories) cache.SharedIndexInformer {
		return f.dynamic.ForResource(policy.RateLimits).Informer()
	}},
	// v1beta1 is what clusters with older definitions have too.
	{ReferenceGrant, schema.GroupVersionResource{Group: gatewayv1.GroupName, Version: "v1beta1", Resource: "referencegrants"},
		func(f factories) cache.SharedIndexInformer {
			return f.gateways.Gateway().V1beta1().ReferenceGrants().Informer()
		}},
}

// selectorsWait is how long the first Update waits for the NetworkPolicies.
const selectorsWait = 5 * time.Second

// Run watches until ctx ends. publish gets the first Update once everything that exists has been read, so that
// it never shows a mesh without its policies, and then one Update per change. It is called by one goroutine.
func (s *Source) Run(ctx context.Context, publish func(*Update)) error {
	inf := factories{SharedInformerFactory: istioinformers.NewSharedInformerFactory(s.Istio, 0)}
	if s.Gateways != nil {
		inf.gateways = gatewayinformers.NewSharedInformerFactory(s.Gateways, 0)
		defer inf.gateways.Shutdown()
	}
	var synced []cache.InformerSynced
	add := func(kind Kind, i cache.SharedIndexInformer) error {
		if err := i.SetTransform(strip); err != nil {
			return fmt.Errorf("watch %s: %w", kind, err)
		}
		h, err := i.AddEventHandler(s.handler(kind, i.GetStore()))
		if err != nil {
			return fmt.Errorf("watch %s: %w", kind, err)
		}
		synced = append(synced, h.HasSynced)
		s.stores.Store(kind, i.GetStore())
		return nil
	}
	for _, k := range []struct {
		kind Kind
		i    cache.SharedIndexInformer
	}{
		{Pod, s.pods},
		{Namespace, s.core.Core().V1().Namespaces().Informer()},
		{Service, s.core.Core().V1().Services().Informer()},
		{EndpointSlice, s.core.Discovery().V1().EndpointSlices().Informer()},
		{Node, s.core.Core().V1().Nodes().Informer()},
		{ValidatingWebhookConfiguration, s.core.Admissionregistration().V1().ValidatingWebhookConfigurations().Informer()},
		{MutatingWebhookConfiguration, s.core.Admissionregistration().V1().MutatingWebhookConfigurations().Informer()},
	} {
		if err := add(k.kind, k.i); err != nil {
			return err
		}
	}
	// Not waited for: to a control plane that may not read them every pod is one that they may select.
	if err := add(NetworkPolicy, s.core.Networking().V1().NetworkPolicies().Informer()); err != nil {
		return err
	}
	selectorsRead := synced[len(synced)-1]
	synced = synced[:len(synced)-1]
	if s.Dynamic != nil {
		inf.dynamic = dynamicinformer.NewDynamicSharedInformerFactory(s.Dynamic, 0)
		for kind, r := range map[Kind]schema.GroupVersionResource{
			APIService:               {Group: "apiregistration.k8s.io", Version: "v1", Resource: "apiservices"},
			CustomResourceDefinition: {Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
		} {
			if err := add(kind, inf.dynamic.ForResource(r).Informer()); err != nil {
				return err
			}
		}
		inf.dynamic.Start(ctx.Done())
		defer inf.dynamic.Shutdown()
	}
	missing := map[Kind]bool{}
	for _, c := range crds {
		if inf.readable(c) {
			missing[c.kind] = true
		}
	}
	attach := func() error {
		for _, c := range crds {
			if !missing[c.kind] {
				continue
			}
			ok, err := s.served(c.resource)
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			if err := add(c.kind, c.informer(inf)); err != nil {
				return err
			}
			delete(missing, c.kind)
		}
		inf.Start(ctx.Done())
		if inf.gateways != nil {
			inf.gateways.Start(ctx.Done())
		}
		if inf.dynamic != nil {
			inf.dynamic.Start(ctx.Done())
		}
		return nil
	}
	// Whether the CRDs exist has to be known: without them there are no policies, and without an answer there
	// may be.
	for {
		err := attach()
		if err == nil {
			break
		}
		s.Log.Warn("cannot tell which custom resources the cluster has", "error", err)
		if !sleep(ctx, time.Second) {
			return ctx.Err()
		}
	}
	if len(missing) > 0 {
		s.Log.Warn("custom resources are not installed and not read until they are", "missing", fmt.Sprint(kindsOf(missing)))
	}
	s.core.Start(ctx.Done())
	defer s.core.Shutdown()
	defer inf.Shutdown()
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return ctx.Err()
	}
	selectors := make(chan struct{})
	some, cancel := context.WithTimeout(ctx, selectorsWait)
	if cache.WaitForCacheSync(some.Done(), selectorsRead) {
		s.index.KnowNetworkPolicies()
	} else {
		s.Log.Warn("NetworkPolicies cannot be read: connections within a node are not redirected until they can")
		go func() {
			if cache.WaitForCacheSync(ctx.Done(), selectorsRead) {
				close(selectors)
			}
		}()
	}
	cancel()
	publish(s.commit())

	crdCheck := time.NewTicker(s.CRDRetry)
	defer crdCheck.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-crdCheck.C:
			if len(missing) == 0 {
				crdCheck.Stop()
			} else if err := attach(); err != nil {
				s.Log.Warn("cannot tell which custom resources the cluster has", "error", err)
			}
		case <-selectors:
			selectors = nil
			s.index.KnowNetworkPolicies()
			publish(s.commit())
		case <-s.wake:
			if !sleep(ctx, s.Settle) {
				return ctx.Err()
			}
			publish(s.commit())
		}
	}
}

func kindsOf(m map[Kind]bool) []string {
	var out []string
	for _, c := range crds {
		if m[c.kind] {
			out = append(out, c.kind.String())
		}
	}
	return out
}

func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// served asks the API server whether it has a resource.
func (s *Source) served(r schema.GroupVersionResource) (bool, error) {
	list, err := s.Kube.Discovery().ServerResourcesForGroupVersion(r.GroupVersion().String())
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("ask for the resources of %s: %w", r.GroupVersion(), err)
	}
	for _, have := range list.APIResources {
		if have.Name == r.Resource {
			return true, nil
		}
	}
	return false, nil
}

// handler notes which object changed; its state is read when the change is applied, so that a burst about one
// object costs one conversion.
func (s *Source) handler(kind Kind, store cache.Store) cache.ResourceEventHandler {
	note := func(obj any) {
		name, err := cache.DeletionHandlingObjectToName(obj)
		if err != nil {
			s.Log.Error("event without an object", "kind", kind.String(), "error", err)
			return
		}
		s.mu.Lock()
		s.changed[ref{kind, key{name.Namespace, name.Name}}] = store
		s.mu.Unlock()
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    note,
		UpdateFunc: func(_, obj any) { note(obj) },
		DeleteFunc: note,
	}
}

// SetKeys tells what came of fetching a key set.
func (s *Source) SetKeys(k policy.KeySource, state KeyState) { note(s, &s.keys, k, state) }

// SetSecret tells what a Secret holds that an Update asked for; nil where there is none.
func (s *Source) SetSecret(k SecretKey, state *SecretState) { note(s, &s.secrets, k, state) }

// SetRoots tells what a ConfigMap holds that an Update asked for; nil where there is none.
func (s *Source) SetRoots(k RootsKey, state *RootsState) { note(s, &s.roots, k, state) }

// SetModule tells what came of fetching a Wasm module.
func (s *Source) SetModule(k policy.ModuleSource, state ModuleState) { note(s, &s.modules, k, state) }

// note keeps what is told until the next commit, and asks for that.
func note[K comparable, V any](s *Source, in *map[K]V, k K, v V) {
	s.mu.Lock()
	if *in == nil {
		*in = map[K]V{}
	}
	(*in)[k] = v
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *Source) commit() *Update {
	s.mu.Lock()
	changed := s.changed
	s.changed = map[ref]cache.Store{}
	keys, secrets, roots, modules := s.keys, s.secrets, s.roots, s.modules
	s.keys, s.secrets, s.roots, s.modules = nil, nil, nil, nil
	s.mu.Unlock()
	for k, state := range secrets {
		s.index.SetSecret(k, state)
	}
	for k, state := range roots {
		s.index.SetRoots(k, state)
	}
	for k, state := range keys {
		s.index.SetKeys(k, state)
	}
	for k, state := range modules {
		s.index.SetModule(k, state)
	}
	for r, store := range changed {
		obj, exists, err := store.GetByKey(cache.NewObjectName(r.Namespace, r.Name).String())
		if err != nil || !exists {
			s.index.Delete(r.kind, r.Namespace, r.Name)
			continue
		}
		s.index.Set(obj)
	}
	return s.index.Commit()
}

// strip drops what is not read before an object is kept. It may be handed an object twice.
func strip(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Pod:
		return stripPod(o), nil
	case *corev1.Namespace:
		o.ManagedFields, o.Finalizers, o.Spec = nil, nil, corev1.NamespaceSpec{}
	case *corev1.Service:
		o.ManagedFields, o.Finalizers, o.OwnerReferences = nil, nil, nil
		o.Status = corev1.ServiceStatus{LoadBalancer: o.Status.LoadBalancer}
	case *discoveryv1.EndpointSlice:
		o.ManagedFields, o.OwnerReferences, o.Annotations = nil, nil, nil
	case *corev1.Node:
		stripNode(o)
	case *admissionv1.ValidatingWebhookConfiguration:
		o.ManagedFields = nil
		for i := range o.Webhooks {
			o.Webhooks[i] = admissionv1.ValidatingWebhook{ClientConfig: admissionv1.WebhookClientConfig{Service: o.Webhooks[i].ClientConfig.Service}}
		}
	case *admissionv1.MutatingWebhookConfiguration:
		o.ManagedFields = nil
		for i := range o.Webhooks {
			o.Webhooks[i] = admissionv1.MutatingWebhook{ClientConfig: admissionv1.WebhookClientConfig{Service: o.Webhooks[i].ClientConfig.Service}}
		}
	case *unstructured.Unstructured:
		if o.GetKind() == RateLimit.String() {
			r := policy.ReadRateLimit(o)
			r.ManagedFields = nil
			return r, nil
		}
		return stripUnstructured(o), nil
	case *securityv1.AuthorizationPolicy:
		o.ManagedFields = nil
	case *securityv1.PeerAuthentication:
		o.ManagedFields = nil
	case *securityv1.RequestAuthentication:
		o.ManagedFields = nil
	case *telemetryv1.Telemetry:
		o.ManagedFields = nil
	case *networkingv1alpha3.EnvoyFilter:
		o.ManagedFields = nil
	case *extensionsv1alpha1.WasmPlugin:
		o.ManagedFields = nil
	case *networkingv1.ServiceEntry:
		o.ManagedFields = nil
	case *networkingv1.WorkloadEntry:
		o.ManagedFields = nil
	case *networkingv1.VirtualService:
		o.ManagedFields = nil
	case *networkingv1.DestinationRule:
		o.ManagedFields = nil
	case *gatewayv1.Gateway:
		o.ManagedFields = nil
	case *gatewayv1.ListenerSet:
		o.ManagedFields = nil
	case *gatewayv1.GatewayClass:
		o.ManagedFields = nil
	case *gatewayv1.HTTPRoute:
		o.ManagedFields = nil
	case *gatewayv1.GRPCRoute:
		o.ManagedFields = nil
	case *gatewayv1.TLSRoute:
		o.ManagedFields = nil
	case *gatewayv1.TCPRoute:
		o.ManagedFields = nil
	case *gatewayv1.BackendTLSPolicy:
		o.ManagedFields = nil
	case *gatewayv1beta1.ReferenceGrant:
		o.ManagedFields = nil
	case *kubenetworkingv1.NetworkPolicy:
		o.ManagedFields, o.Spec = nil, kubenetworkingv1.NetworkPolicySpec{PodSelector: o.Spec.PodSelector}
	}
	return obj, nil
}

// stripNode keeps what nodeFactOf reads.
func stripNode(o *corev1.Node) {
	annotations := map[string]string{}
	for _, name := range overlayAnnotations {
		if v, ok := o.Annotations[name]; ok {
			annotations[name] = v
		}
	}
	o.ManagedFields, o.Annotations = nil, annotations
	o.Spec, o.Status = corev1.NodeSpec{PodCIDRs: o.Spec.PodCIDRs}, corev1.NodeStatus{Addresses: o.Status.Addresses}
}

// stripPod keeps what podFactOf and the placement read.
func stripPod(p *corev1.Pod) *corev1.Pod {
	out := &corev1.Pod{}
	out.Name, out.Namespace, out.UID, out.ResourceVersion = p.Name, p.Namespace, p.UID, p.ResourceVersion
	out.Labels, out.GenerateName, out.OwnerReferences = p.Labels, p.GenerateName, p.OwnerReferences
	out.CreationTimestamp, out.DeletionTimestamp = p.CreationTimestamp, p.DeletionTimestamp
	for _, k := range []string{annotationSidecar, AnnotationRedirection, annotationDNSCapture} {
		if v, ok := p.Annotations[k]; ok {
			if out.Annotations == nil {
				out.Annotations = map[string]string{}
			}
			out.Annotations[k] = v
		}
	}
	out.Spec.NodeName, out.Spec.ServiceAccountName, out.Spec.HostNetwork = p.Spec.NodeName, p.Spec.ServiceAccountName, p.Spec.HostNetwork
	for _, c := range p.Spec.Containers {
		if len(c.Ports) > 0 {
			out.Spec.Containers = append(out.Spec.Containers, corev1.Container{Ports: c.Ports})
		}
	}
	for _, c := range p.Spec.InitContainers {
		if len(c.Ports) > 0 {
			out.Spec.InitContainers = append(out.Spec.InitContainers, corev1.Container{Ports: c.Ports, RestartPolicy: c.RestartPolicy})
		}
	}
	out.Status.Phase, out.Status.PodIP, out.Status.PodIPs, out.Status.StartTime = p.Status.Phase, p.Status.PodIP, p.Status.PodIPs, p.Status.StartTime
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			out.Status.Conditions = []corev1.PodCondition{{Type: c.Type, Status: c.Status}}
		}
	}
	return out
}
