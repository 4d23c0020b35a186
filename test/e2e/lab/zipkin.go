package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Zipkin's server as its makers publish it, with all that it needs but Java 17.
const (
	zipkinVersion  = "3.5.1"
	zipkinArtifact = "io.zipkin:zipkin-server:" + zipkinVersion + ":jar:exec"
	zipkinSum      = "7ac633a6832647e71e50012a5e3e91fbc7054414955261724526030faf271d8d" // SHA-256
	// mavenCopy is the goal that fetches an artifact without a project, of a fixed version of its plugin.
	mavenCopy = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy"
)

// Zipkin returns Zipkin's jar, which Maven fetches into the user's cache the first time.
func (l *Lab) Zipkin(ctx context.Context) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	name := "zipkin-server-" + zipkinVersion + "-exec.jar"
	dir := filepath.Join(cache, "warren", "zipkin-"+zipkinVersion)
	jar := filepath.Join(dir, name)
	if _, err := os.Stat(jar); err == nil {
		return jar, nil
	}
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	l.log("fetching Zipkin " + zipkinVersion)
	cmd := exec.CommandContext(ctx, "mvn", "--batch-mode", "--quiet", "--strict-checksums", mavenCopy, "-Dartifact="+zipkinArtifact, "-DoutputDirectory="+tmp)
	cmd.Dir = os.TempDir() // where no project is
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("fetch %s: %w\n%s", zipkinArtifact, err, out)
	}
	sum, err := fileSum(filepath.Join(tmp, name))
	if err != nil {
		return "", err
	}
	if sum != zipkinSum {
		return "", fmt.Errorf("%s has the SHA-256 %s, want %s: it is not what was published; look at where Maven fetches from", name, sum, zipkinSum)
	}
	return jar, os.Rename(tmp, dir)
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// zipkinDir is where nodes have Zipkin's jar and the machine's Java.
const zipkinDir = "/var/lib/warren-zipkin"

// RunZipkin runs the jar as a pod on a node of our own cluster, behind a Service of the name zipkin, with the machine's Java and
// what that is linked with. Spans are in its memory. It does not wait.
func (l *Lab) RunZipkin(ctx context.Context, jar, namespace, node string) error {
	if err := l.install(jar, node, zipkinDir, "zipkin.jar"); err != nil {
		return err
	}
	n, err := l.Cluster.Node(node)
	if err != nil {
		return err
	}
	if err := copyJava(filepath.Join(n.Disk(), zipkinDir, "java")); err != nil {
		return fmt.Errorf("bring Java to %s: %w", node, err)
	}
	var mounts, volumes strings.Builder
	for i, dir := range []string{"/lib", "/lib64", "/usr/lib"} { // nodes have them of the machine
		if _, err := os.Stat(dir); err == nil {
			fmt.Fprintf(&mounts, "\n        - {name: lib%d, mountPath: %s, readOnly: true}", i, dir)
			fmt.Fprintf(&volumes, "\n    - {name: lib%d, hostPath: {path: %s}}", i, dir)
		}
	}
	return l.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: zipkin, namespace: %[1]s}
spec: {selector: {app: zipkin}, ports: [{name: http, port: 9411}]}
---
apiVersion: v1
kind: Pod
metadata: {name: zipkin, namespace: %[1]s, labels: {app: zipkin}}
spec:
  nodeSelector: {kubernetes.io/hostname: %[2]s}
  terminationGracePeriodSeconds: 1
  enableServiceLinks: false
  securityContext: {runAsNonRoot: true, runAsUser: 65534}
  containers:
    - name: zipkin
      image: %[3]s
      imagePullPolicy: IfNotPresent
      command: [%[4]s/java/bin/java, -Xmx256m, -XX:TieredStopAtLevel=1, -XX:+UseSerialGC, -jar, %[4]s/zipkin.jar]
      env: [{name: STORAGE_TYPE, value: mem}]
      readinessProbe: {httpGet: {path: /health, port: 9411}, periodSeconds: 1}
      volumeMounts:
        - {name: program, mountPath: %[4]s, readOnly: true}
        - {name: tmp, mountPath: /tmp}%[5]s
  volumes:
    - {name: program, hostPath: {path: %[4]s}}
    - {name: tmp, emptyDir: {}}%[6]s
`, namespace, node, Image, zipkinDir, mounts.String(), volumes.String()))
}

// copyJava copies the machine's Java, with its configuration, which distributions have in /etc, and without what only those
// need who write programs.
func copyJava(to string) error {
	java, err := exec.LookPath("java")
	if err != nil {
		return err
	}
	if java, err = filepath.EvalSymlinks(java); err != nil {
		return err
	}
	home := filepath.Dir(filepath.Dir(java))
	if _, err := os.Stat(filepath.Join(to, "bin", "java")); err == nil {
		return nil // copied before; the program comes last
	}
	err = filepath.WalkDir(home, func(from string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(home, from)
		if err != nil {
			return err
		}
		switch rel {
		case "bin", "demo", "docs", "include", "jmods", "legal", "man":
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := os.Stat(from) // of what a link names
		switch {
		case errors.Is(err, fs.ErrNotExist): // of a package that is not installed
			return nil
		case err != nil:
			return err
		case e.Type()&fs.ModeSymlink != 0 && info.IsDir():
			return os.CopyFS(filepath.Join(to, rel), os.DirFS(from))
		case info.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		return copyProgram(from, filepath.Join(to, rel))
	})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(to, "bin"), 0o755); err != nil {
		return err
	}
	return copyProgram(java, filepath.Join(to, "bin", "java"))
}

// AskZipkin calls the API of the Zipkin of a namespace, through the API server, and decodes the answer.
func (l *Lab) AskZipkin(ctx context.Context, namespace, path string, answer any) error {
	out, err := l.Kubectl(ctx, "get", "--raw", "/api/v1/namespaces/"+namespace+"/pods/zipkin:9411/proxy/api/v2/"+path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), answer); err != nil {
		return fmt.Errorf("Zipkin says %q: %w", out, err)
	}
	return nil
}
