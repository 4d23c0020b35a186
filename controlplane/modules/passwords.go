package modules

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Keys of Secrets with passwords of registries, as Kubernetes has them for images of pods: the kinds kubernetes.io/dockerconfigjson and
// kubernetes.io/dockercfg.
const (
	dockerConfig    = ".dockerconfigjson"
	dockerConfigOld = ".dockercfg"
)

// account is what such a Secret says of a registry.
type account struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"` // base64 of username:password
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// accountFor finds what a Secret has for an image: of several the one whose address has most of the image's. Nothing of what is in the Secret is in
// its errors.
func accountFor(data map[string][]byte, ref registry.Reference) (out auth.Credential, err error) {
	accounts := map[string]account{}
	switch {
	case data[dockerConfig] != nil:
		var c struct {
			Auths map[string]account `json:"auths"`
		}
		if json.Unmarshal(data[dockerConfig], &c) != nil {
			return out, errors.New("its " + dockerConfig + " cannot be read")
		}
		accounts = c.Auths
	case data[dockerConfigOld] != nil:
		if json.Unmarshal(data[dockerConfigOld], &accounts) != nil {
			return out, errors.New("its " + dockerConfigOld + " cannot be read")
		}
	default:
		return out, errors.New("it has no " + dockerConfig + "; make it by kubectl create secret docker-registry")
	}
	best := -1
	for address, a := range accounts {
		_, rest, schemed := strings.Cut(address, "://")
		if !schemed {
			rest = address
		}
		host, path, _ := strings.Cut(strings.TrimSuffix(rest, "/"), "/")
		if path == "v1" || path == "v2" { // of the protocol, as docker login writes them
			path = ""
		}
		if host == "index.docker.io" {
			host = "docker.io"
		}
		under := path == "" || ref.Repository == path || strings.HasPrefix(ref.Repository, path+"/")
		if host != ref.Registry || !under || len(path) <= best {
			continue
		}
		if a.Auth != "" && a.Username == "" {
			b, err := base64.StdEncoding.DecodeString(a.Auth)
			name, password, ok := strings.Cut(string(b), ":")
			if err != nil || !ok {
				return out, fmt.Errorf("what it has for %s cannot be read", ref.Registry)
			}
			a.Username, a.Password = name, password
		}
		best = len(path)
		out = auth.Credential{Username: a.Username, Password: a.Password, RefreshToken: a.IdentityToken, AccessToken: a.RegistryToken}
	}
	if best < 0 {
		return out, fmt.Errorf("it has nothing for %s/%s", ref.Registry, ref.Repository)
	}
	return out, nil
}
