package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/warrenmesh/warren/test/cluster/image"
)

const (
	argoModule = "github.com/argoproj/argo-rollouts"
	// argoImage is what the manifests of the module ask for.
	argoImage = "quay.io/argoproj/argo-rollouts:latest"
	// ArgoNamespace is where its makers have users install it.
	ArgoNamespace = "argo-rollouts"
)

// InstallArgoRollouts installs Argo Rollouts into our own cluster as its makers have users do it, from the manifests of the
// module in test/e2e/argo-rollouts, of which the controller is built; the first time that takes minutes of both cores. It
// waits until the controller runs. What it returns takes everything away again.
func (l *Lab) InstallArgoRollouts(ctx context.Context) (remove func(context.Context) error, err error) {
	program, err := l.Peer(ctx, "argo-rollouts")
	if err != nil {
		return nil, err
	}
	manifest, err := l.argoManifest(ctx)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "warren-images-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	im := image.Image{Name: argoImage, Config: image.Config{Entrypoint: []string{"/bin/rollouts-controller"}, User: "999"},
		Variants: []image.Variant{{Platform: image.Platform{Arch: runtime.GOARCH}, Files: map[string]string{"bin/rollouts-controller": program}}}}
	archive := filepath.Join(dir, "argo-rollouts.tar")
	if _, err := im.WriteFile(archive); err != nil {
		return nil, err
	}
	if err := l.Cluster.LoadImages(ctx, archive); err != nil {
		return nil, err
	}
	namespace := "apiVersion: v1\nkind: Namespace\nmetadata: {name: " + ArgoNamespace + "}\n"
	remove = func(ctx context.Context) error {
		_, err := l.run(ctx, strings.NewReader(manifest), l.kubectl, "-n", ArgoNamespace, "delete", "--ignore-not-found", "--timeout=60s", "-f", "-")
		if err == nil {
			_, err = l.Kubectl(ctx, "delete", "namespace", ArgoNamespace, "--ignore-not-found", "--timeout=60s")
		}
		return err
	}
	if err := l.Apply(ctx, namespace); err != nil {
		return remove, err
	}
	// Applied by the server: the definitions are too long for the annotation that kubectl would keep them in.
	if _, err := l.run(ctx, strings.NewReader(manifest), l.kubectl, "-n", ArgoNamespace, "apply", "--server-side", "-f", "-"); err != nil {
		return remove, err
	}
	return remove, l.Rollout(ctx, ArgoNamespace, "deploy/argo-rollouts")
}

// argoManifest is what its makers have users apply, but that the image is not looked for in a registry.
func (l *Lab) argoManifest(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", argoModule)
	cmd.Dir = filepath.Join(l.root, "test", "e2e", "argo-rollouts")
	cmd.Env = append(os.Environ(), "GOWORK=off")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("find the sources of %s: %w\n%s", argoModule, err, out)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		return "", err
	}
	b, err := os.ReadFile(filepath.Join(module.Dir, "manifests", "install.yaml"))
	if err != nil {
		return "", err
	}
	const always = "imagePullPolicy: Always\n"
	if !strings.Contains(string(b), "image: "+argoImage+"\n") || strings.Count(string(b), always) != 1 {
		return "", fmt.Errorf("the manifests of %s do not ask for the image %s", argoModule, argoImage)
	}
	return strings.Replace(string(b), always, "imagePullPolicy: Never\n", 1), nil
}
