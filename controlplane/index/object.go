package index

import "k8s.io/client-go/tools/cache"

// Object returns an object as the watch has it now. It is not to be changed.
func (s *Source) Object(kind Kind, namespace, name string) (any, bool) {
	store, ok := s.stores.Load(kind)
	if !ok {
		return nil, false
	}
	o, ok, err := store.(cache.Store).GetByKey(cache.NewObjectName(namespace, name).String())
	return o, ok && err == nil
}
