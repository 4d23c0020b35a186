// Command limiter is the rate limit service of the Envoy project, which counts in a store of its own process in place of a Redis.
package main

import (
	"log"
	"os"

	"github.com/alicebob/miniredis/v2"
	"github.com/envoyproxy/ratelimit/src/service_cmd/runner"
	"github.com/envoyproxy/ratelimit/src/settings"
)

func main() {
	store, err := miniredis.Run()
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	for k, v := range map[string]string{
		"BACKEND_TYPE": "redis", "REDIS_SOCKET_TYPE": "tcp", "REDIS_TYPE": "SINGLE", "REDIS_URL": store.Addr(), "USE_STATSD": "false", "USE_PROMETHEUS": "false",
		"RUNTIME_WATCH_ROOT": "false", "RUNTIME_IGNOREDOTFILES": "true", "GRPC_PORT": "8081", "PORT": "8080", "DEBUG_PORT": "6070",
	} {
		if err := os.Setenv(k, v); err != nil {
			log.Fatal(err)
		}
	}
	s := settings.NewSettings()
	r := runner.NewRunner(s)
	r.Run()
}
