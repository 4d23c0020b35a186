// Command validate says what Istio's own validation says of security objects: it reads one per line, as JSON
// {"kind","namespace","name","annotations","spec"}, and writes one line for each, "" for a valid one, else the error as a
// JSON string.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	security "istio.io/api/security/v1beta1"
	"istio.io/istio/pkg/config"
	"istio.io/istio/pkg/config/validation"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "validate:", err)
		os.Exit(1)
	}
}

func run() error {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 16<<20)
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	for in.Scan() {
		var o struct {
			Kind, Namespace, Name string
			Annotations           map[string]string
			Spec                  json.RawMessage
		}
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			return err
		}
		c := config.Config{Meta: config.Meta{Namespace: o.Namespace, Name: o.Name, Annotations: o.Annotations}}
		check := validation.ValidateAuthorizationPolicy
		var spec proto.Message = &security.AuthorizationPolicy{}
		if o.Kind == "PeerAuthentication" {
			check, spec = validation.ValidatePeerAuthentication, &security.PeerAuthentication{}
		}
		err := protojson.Unmarshal(o.Spec, spec)
		if err == nil {
			c.Spec = spec
			_, err = check(c)
		}
		text := ""
		if err != nil {
			text = err.Error()
		}
		line, err := json.Marshal(text)
		if err != nil {
			return err
		}
		if _, err := out.Write(append(line, '\n')); err != nil {
			return err
		}
	}
	return in.Err()
}
