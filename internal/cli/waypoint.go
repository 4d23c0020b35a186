package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/revision"
)

// Names by which waypoints are asked for, Istio's.
const (
	waypointClass     = "istio-waypoint"
	useLabel          = "istio.io/use-waypoint"
	useNamespaceLabel = "istio.io/use-waypoint-namespace"
	forLabel          = "istio.io/waypoint-for"
	gatewayLabel      = "gateway.networking.k8s.io/gateway-name"
	boundCondition    = "istio.io/WaypointBound"
	fieldManager      = "warren"
)

var gatewayResource = schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "gateways"}

// waypointOptions are the flags of the waypoint commands.
type waypointOptions struct {
	namespace string // of the waypoint
	all       bool   // namespaces, or waypoints where some are deleted
	name, use string
	revision  string // or a tag
	enroll    bool
	overwrite bool
	wait      bool
	detach    bool
	force     bool
	limit     time.Duration
}

// waypointStatus is one waypoint, as list and status print it.
type waypointStatus struct {
	Namespace  string   `json:"namespace"`
	Name       string   `json:"name"`
	For        string   `json:"for"`
	Revision   string   `json:"revision,omitempty"` // or tag that it asks for itself
	Programmed string   `json:"programmed"`         // True, False or Unknown
	Message    string   `json:"message"`
	Pods       ratio    `json:"pods"`
	Bound      []string `json:"bound"` // namespaces and services that ask for it
	Waiting    []string `json:"waiting,omitempty"`
}

func (a *app) waypointCommand() *cobra.Command {
	o := &waypointOptions{}
	cmd := &cobra.Command{
		Use: "waypoint", Short: "Make, see and remove waypoints",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVarP(&o.namespace, "namespace", "n", "", "namespace of the waypoint (default: the context's)")
	cmd.AddCommand(a.waypointGenerate(o), a.waypointApply(o), a.waypointList(o), a.waypointState(o), a.waypointDelete(o))
	return cmd
}

// form adds the flags that say what a waypoint is.
func (o *waypointOptions) form(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.name, "name", "waypoint", "name of the waypoint")
	cmd.Flags().StringVar(&o.use, "for", "service", "what it takes: service, all or none")
	cmd.Flags().StringVar(&o.revision, "revision", "", "revision or tag of the control plane that makes and configures it (default what its namespace asks for, or the mesh's)")
	_ = cmd.RegisterFlagCompletionFunc("for", cobra.FixedCompletions([]string{"service", "all", "none"}, cobra.ShellCompDirectiveNoFileComp))
}

func (a *app) waypointGenerate(o *waypointOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use: "generate", Short: "Write the Gateway that asks for a waypoint", Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			g, err := o.gateway(o.namespace)
			if err != nil {
				return err
			}
			if a.output == "json" {
				return a.print(g.Object, nil)
			}
			b, err := yaml.Marshal(g.Object)
			if err != nil {
				return err
			}
			_, err = a.env.Out.Write(b)
			return err
		},
	}
	o.form(cmd)
	return cmd
}

// gateway is the object that asks for a waypoint.
func (o *waypointOptions) gateway(namespace string) (*unstructured.Unstructured, error) {
	if msgs := validation.IsDNS1035Label(o.name); len(msgs) > 0 { // its Service has the name
		return nil, usageError{fmt.Errorf("%q is no name for a waypoint: %s", o.name, msgs[0])}
	}
	switch o.use {
	case "service", "all", "none":
	case "workload":
		return nil, usageError{errors.New("--for workload is not supported: waypoints take what is sent to Services; use service")}
	default:
		return nil, usageError{fmt.Errorf("--for %s is none of service, all, none", o.use)}
	}
	labels := map[string]any{forLabel: o.use}
	if o.revision != "" {
		if err := revision.Check(o.revision); err != nil {
			return nil, usageError{fmt.Errorf("--revision: %w", err)}
		}
		labels[revision.Label] = o.revision
	}
	meta := map[string]any{"name": o.name, "labels": labels}
	if namespace != "" {
		meta["namespace"] = namespace
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": gatewayResource.GroupVersion().String(), "kind": "Gateway", "metadata": meta,
		"spec": map[string]any{
			"gatewayClassName": waypointClass,
			"listeners":        []any{map[string]any{"name": "mesh", "port": int64(15008), "protocol": "HBONE"}},
		},
	}}, nil
}

func (a *app) waypointApply(o *waypointOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use: "apply", Short: "Make a waypoint, or make one what the flags say", Args: args(cobra.NoArgs),
		Long: "Make a waypoint, or make one what the flags say. What is sent to a Service goes through it where the Service or its namespace\n" +
			"asks for it with the label " + useLabel + "; --enroll-namespace sets that of the namespace.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := o.gateway(o.namespace); err != nil {
				return err
			}
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			return a.applyWaypoint(cmd.Context(), c, o)
		},
	}
	o.form(cmd)
	cmd.Flags().BoolVar(&o.enroll, "enroll-namespace", false, "have all Services of the namespace go through it")
	cmd.Flags().BoolVar(&o.overwrite, "overwrite", false, "take over what others have set, and a namespace that has another waypoint")
	cmd.Flags().BoolVarP(&o.wait, "wait", "w", false, "wait until it works")
	cmd.Flags().DurationVar(&o.limit, "timeout", 90*time.Second, "for --wait")
	return cmd
}

func (a *app) applyWaypoint(ctx context.Context, c *conn, o *waypointOptions) error {
	p, namespace := a.progress(), o.in(c)
	g, err := o.gateway(namespace)
	if err != nil {
		return err
	}
	ns, err := c.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("reading namespace %s: %w", namespace, err)
	}
	was, wasIn := ns.Labels[useLabel], ns.Labels[useNamespaceLabel]
	enrolled := was == o.name && (wasIn == "" || wasIn == namespace)
	if o.enroll && was != "" && !enrolled && !o.overwrite {
		return fmt.Errorf("namespace %s has the label %s=%s already; --overwrite replaces it", namespace, useLabel, was)
	}
	gateways := c.objects.Client.Resource(gatewayResource).Namespace(namespace)
	switch there, err := gateways.Get(ctx, o.name, metav1.GetOptions{}); {
	case err == nil:
		if class, _, _ := unstructured.NestedString(there.Object, "spec", "gatewayClassName"); class != waypointClass {
			return fmt.Errorf("the Gateway %s/%s is no waypoint: it is of class %q; choose another --name", namespace, o.name, class)
		}
	case !apierrors.IsNotFound(err):
		return fmt.Errorf("reading the Gateway %s/%s: %w", namespace, o.name, err)
	}
	b, err := json.Marshal(g.Object)
	if err != nil {
		return err
	}
	_, err = gateways.Patch(ctx, o.name, types.ApplyPatchType, b, metav1.PatchOptions{FieldManager: fieldManager, Force: &o.overwrite})
	switch {
	case apierrors.IsConflict(err):
		return fmt.Errorf("somebody else has set the waypoint %s/%s in another way: %w; --overwrite takes it over", namespace, o.name, err)
	case apierrors.IsNotFound(err):
		return fmt.Errorf("the cluster has no Gateways: %s install brings their definition: %w", a.name(), err)
	case err != nil:
		return fmt.Errorf("applying the waypoint %s/%s: %w", namespace, o.name, err)
	}
	p.done("waypoint %s/%s applied", namespace, o.name)
	// Services that ask for a waypoint which is not there yet are refused: so they ask for it last.
	if o.wait {
		if err := a.awaitWaypoint(ctx, c, p, o, namespace); err != nil {
			return err
		}
	}
	if !o.enroll || enrolled {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]any{useLabel: o.name, useNamespaceLabel: nil}}})
	if err != nil {
		return err
	}
	if _, err := c.CoreV1().Namespaces().Patch(ctx, namespace, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager}); err != nil {
		return fmt.Errorf("labelling namespace %s: %w", namespace, err)
	}
	p.done("namespace %s labelled with %s=%s", namespace, useLabel, o.name)
	if ns.Labels[modeLabel] != "ambient" {
		p.done("its pods are not in the mesh: kubectl label namespace %s %s=ambient", namespace, modeLabel)
	}
	return nil
}

func (a *app) awaitWaypoint(ctx context.Context, c *conn, p *progress, o *waypointOptions, namespace string) error {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, o.limit)
	defer cancel()
	for {
		g, err := c.objects.Client.Resource(gatewayResource).Namespace(namespace).Get(ctx, o.name, metav1.GetOptions{})
		state, message := "Unknown", ""
		if err == nil {
			state, message = condition(g, "Programmed")
		} else {
			message = err.Error()
		}
		if state == "True" {
			p.done("waypoint %s/%s works after %s", namespace, o.name, time.Since(start).Round(100*time.Millisecond))
			return nil
		}
		p.now("waiting for %s/%s: %s", namespace, o.name, message)
		select {
		case <-ctx.Done():
			return fmt.Errorf("waypoint %s/%s does not work: %s; see %s waypoint status %[2]s -n %[1]s", namespace, o.name, message, a.name())
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// condition reads a condition of an object, "Unknown" where it is not about the object as it is now.
func condition(o *unstructured.Unstructured, kind string) (status, message string) {
	list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, item := range list {
		c, ok := item.(map[string]any)
		if !ok || c["type"] != kind {
			continue
		}
		if seen, ok := c["observedGeneration"].(int64); ok && seen < o.GetGeneration() {
			return "Unknown", "nothing has been said about its last change yet"
		}
		status, _ = c["status"].(string)
		message, _ = c["message"].(string)
		return status, message
	}
	return "Unknown", "no control plane has said anything about it yet"
}

func (o *waypointOptions) in(c *conn) string {
	if o.namespace != "" {
		return o.namespace
	}
	if c.namespace != "" {
		return c.namespace
	}
	return "default"
}

// waypoints reads the waypoints of a namespace, "" for all.
func (a *app) waypoints(ctx context.Context, c *conn, namespace string) ([]waypointStatus, error) {
	list, err := c.objects.Client.Resource(gatewayResource).Namespace(namespace).List(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("the cluster has no Gateways: %s install brings their definition", a.name())
	}
	if err != nil {
		return nil, fmt.Errorf("listing Gateways: %w", err)
	}
	users, waiting, err := waypointUsers(ctx, c)
	if err != nil {
		return nil, err
	}
	out := []waypointStatus{}
	for i := range list.Items {
		g := &list.Items[i]
		if class, _, _ := unstructured.NestedString(g.Object, "spec", "gatewayClassName"); class != waypointClass {
			continue
		}
		w := waypointStatus{Namespace: g.GetNamespace(), Name: g.GetName(), For: g.GetLabels()[forLabel], Revision: g.GetLabels()[revision.Label]}
		if w.For == "" {
			w.For = "service"
		}
		w.Programmed, w.Message = condition(g, "Accepted")
		if w.Programmed == "True" {
			w.Programmed, w.Message = condition(g, "Programmed")
		}
		pods, err := c.CoreV1().Pods(w.Namespace).List(ctx, metav1.ListOptions{LabelSelector: gatewayLabel + "=" + w.Name})
		if err != nil {
			return nil, fmt.Errorf("listing the pods of waypoint %s/%s: %w", w.Namespace, w.Name, err)
		}
		for i := range pods.Items {
			if pods.Items[i].DeletionTimestamp != nil {
				continue
			}
			w.Pods.Want++
			if ready(&pods.Items[i]) {
				w.Pods.Ready++
			}
		}
		key := w.Namespace + "/" + w.Name
		w.Bound, w.Waiting = users[key], waiting[key]
		if w.Bound == nil {
			w.Bound = []string{}
		}
		out = append(out, w)
	}
	slices.SortFunc(out, func(x, y waypointStatus) int {
		return strings.Compare(x.Namespace+"/"+x.Name, y.Namespace+"/"+y.Name)
	})
	return out, nil
}

// waypointUsers says who asks for each waypoint, by its namespace and name: namespaces that are labelled, and services with
// a label of their own. waiting are services of either kind that the control plane says are not behind it yet.
func waypointUsers(ctx context.Context, c *conn) (users, waiting map[string][]string, err error) {
	users, waiting = map[string][]string{}, map[string][]string{}
	asked := func(labels map[string]string, namespace string) string {
		name := labels[useLabel]
		if name == "" || name == "none" {
			return name
		}
		if ns := labels[useNamespaceLabel]; ns != "" {
			namespace = ns
		}
		return namespace + "/" + name
	}
	namespaces, err := c.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, fmt.Errorf("listing namespaces: %w", err)
	}
	byNamespace := map[string]string{}
	for _, ns := range namespaces.Items {
		if w := asked(ns.Labels, ns.Name); w != "" && w != "none" {
			byNamespace[ns.Name] = w
			users[w] = append(users[w], "namespace "+ns.Name)
		}
	}
	services, err := c.CoreV1().Services("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, fmt.Errorf("listing services: %w", err)
	}
	for _, s := range services.Items {
		w := asked(s.Labels, s.Namespace)
		if w != "" && w != "none" {
			users[w] = append(users[w], "service "+s.Namespace+"/"+s.Name)
		}
		if w == "" {
			w = byNamespace[s.Namespace]
		}
		for _, x := range s.Status.Conditions {
			if x.Type == boundCondition && x.Status != metav1.ConditionTrue && w != "" {
				waiting[w] = append(waiting[w], "service "+s.Namespace+"/"+s.Name)
			}
		}
	}
	for _, m := range []map[string][]string{users, waiting} {
		for l := range maps.Values(m) {
			slices.Sort(l)
		}
	}
	return users, waiting, nil
}

func (a *app) waypointList(o *waypointOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use: "list", Short: "List waypoints", Aliases: []string{"ls"}, Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			namespace := ""
			if !o.all {
				namespace = o.in(c)
			}
			list, err := a.waypoints(cmd.Context(), c, namespace)
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) error { return a.printWaypoints(w, list, namespace) })
		},
	}
	cmd.Flags().BoolVarP(&o.all, "all-namespaces", "A", false, "of all namespaces")
	return cmd
}

func (a *app) printWaypoints(w io.Writer, list []waypointStatus, namespace string) error {
	if len(list) == 0 {
		where := "the cluster"
		if namespace != "" {
			where = "namespace " + namespace
		}
		fmt.Fprintf(w, "no waypoint in %s: %s waypoint apply\n", where, a.name())
		return nil
	}
	head := []string{"NAMESPACE", "NAME", "FOR", "PROGRAMMED", "PODS", "ASKED FOR BY"}
	revised := slices.ContainsFunc(list, func(x waypointStatus) bool { return x.Revision != "" })
	if revised {
		head = append(head, "REVISION")
	}
	t := table{head: head}
	for _, x := range list {
		programmed := a.paint(red, x.Programmed)
		if x.Programmed == "True" {
			programmed = a.paint(green, x.Programmed)
		}
		row := []string{x.Namespace, x.Name, x.For, programmed, x.Pods.String(), dash(some(x.Bound))}
		if revised {
			row = append(row, dash(x.Revision))
		}
		t.add(row...)
	}
	return t.write(w)
}

func (a *app) waypointState(o *waypointOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use: "status [NAME]", Short: "Say whether waypoints work, and why not", Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			namespace := o.in(c)
			var list []waypointStatus
			for start := time.Now(); ; {
				if list, err = a.waypoints(cmd.Context(), c, namespace); err != nil {
					return err
				}
				if len(names) == 1 {
					list = slices.DeleteFunc(list, func(w waypointStatus) bool { return w.Name != names[0] })
					if len(list) == 0 {
						return fmt.Errorf("there is no waypoint %s in namespace %s: see %s waypoint list -A", names[0], namespace, a.name())
					}
				}
				if !o.wait || allWork(list) || time.Since(start) > o.limit {
					break
				}
				select {
				case <-cmd.Context().Done():
					return cmd.Context().Err()
				case <-time.After(500 * time.Millisecond):
				}
			}
			if err := a.print(list, func(w io.Writer) error { return a.printWaypointStates(w, list, namespace) }); err != nil {
				return err
			}
			if !allWork(list) {
				return errFound
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&o.wait, "wait", "w", false, "wait until they work")
	cmd.Flags().DurationVar(&o.limit, "timeout", 90*time.Second, "for --wait")
	return cmd
}

func allWork(list []waypointStatus) bool {
	return !slices.ContainsFunc(list, func(w waypointStatus) bool { return w.Programmed != "True" || len(w.Waiting) > 0 })
}

func (a *app) printWaypointStates(w io.Writer, list []waypointStatus, namespace string) error {
	if err := a.printWaypoints(w, list, namespace); err != nil {
		return err
	}
	for _, x := range list {
		if x.Programmed != "True" {
			fmt.Fprintf(w, "\n%s/%s: %s\n", x.Namespace, x.Name, x.Message)
		}
		if len(x.Waiting) > 0 {
			fmt.Fprintf(w, "\n%s/%s: not behind it yet: %s\n", x.Namespace, x.Name, strings.Join(x.Waiting, ", "))
		}
	}
	return nil
}

func (a *app) waypointDelete(o *waypointOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use: "delete NAME...", Short: "Remove waypoints", Args: args(cobra.ArbitraryArgs),
		Long: "Remove waypoints. Connections to a Service that asks for a waypoint which is not there are refused, so that one that is asked\n" +
			"for stays, unless --detach takes the labels away first or --force says that this is meant.",
		RunE: func(cmd *cobra.Command, names []string) error {
			if (len(names) == 0) != o.all {
				return usageError{errors.New("name the waypoints to delete, or say --all")}
			}
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			return a.deleteWaypoints(cmd.Context(), c, o, names)
		},
	}
	cmd.Flags().BoolVar(&o.all, "all", false, "all of the namespace")
	cmd.Flags().BoolVar(&o.detach, "detach", false, "take away the labels that ask for it, from namespaces and services")
	cmd.Flags().BoolVar(&o.force, "force", false, "though it is asked for")
	return cmd
}

func (a *app) deleteWaypoints(ctx context.Context, c *conn, o *waypointOptions, names []string) error {
	p, namespace := a.progress(), o.in(c)
	list, err := a.waypoints(ctx, c, namespace)
	if err != nil {
		return err
	}
	at := func(name string) int {
		return slices.IndexFunc(list, func(w waypointStatus) bool { return w.Name == name })
	}
	if o.all {
		for _, w := range list {
			names = append(names, w.Name)
		}
	}
	for _, name := range names { // all or nothing, as far as can be known before
		i := at(name)
		if i < 0 {
			return fmt.Errorf("there is no waypoint %s in namespace %s: see %s waypoint list -A", name, namespace, a.name())
		}
		if used := list[i].Bound; len(used) > 0 && !o.detach && !o.force {
			return fmt.Errorf("waypoint %s/%s is asked for by %s, which would be refused without it; --detach takes the labels away first, --force deletes it nevertheless",
				namespace, name, some(used))
		}
	}
	patch := []byte(fmt.Sprintf(`{"metadata":{"labels":{%q:null,%q:null}}}`, useLabel, useNamespaceLabel))
	for _, name := range names {
		for _, user := range list[at(name)].Bound {
			if !o.detach {
				break
			}
			var err error
			if ns, ok := strings.CutPrefix(user, "namespace "); ok {
				_, err = c.CoreV1().Namespaces().Patch(ctx, ns, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
			} else {
				ns, svc, _ := strings.Cut(strings.TrimPrefix(user, "service "), "/")
				_, err = c.CoreV1().Services(ns).Patch(ctx, svc, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
			}
			if err != nil && !apierrors.IsNotFound(err) {
				return fmt.Errorf("taking the label away from %s: %w", user, err)
			}
			p.done("%s no longer asks for %s/%s", user, namespace, name)
		}
		err := c.objects.Client.Resource(gatewayResource).Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("deleting waypoint %s/%s: %w", namespace, name, err)
		}
		p.done("waypoint %s/%s deleted", namespace, name)
	}
	return nil
}
