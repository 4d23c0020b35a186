package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"log/slog"
	"net/http"
	"strings"
	"time"
)

// runHook is what an API server calls: a validating webhook that refuses objects labelled refuse=yes, an
// aggregated API without resources, and a webhook that converts objects between versions that differ in name only.
func runHook(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("hook", flag.ContinueOnError)
	addr := flags.String("addr", ":8443", "address to listen on")
	dir := flags.String("cert", "/cert", "directory of tls.crt and tls.key")
	if err := flags.Parse(args); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /review", review)
	mux.HandleFunc("POST /convert", convert)
	mux.HandleFunc("GET /apis/{group}/{version}", func(w http.ResponseWriter, r *http.Request) {
		answer(w, map[string]any{"kind": "APIResourceList", "apiVersion": "v1",
			"groupVersion": r.PathValue("group") + "/" + r.PathValue("version"), "resources": []any{}})
	})
	srv := &http.Server{Addr: *addr, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	if err := srv.ListenAndServeTLS(*dir+"/tls.crt", *dir+"/tls.key"); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func review(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Request struct {
			UID    string `json:"uid"`
			Object struct {
				Metadata struct {
					Labels map[string]string `json:"labels"`
				} `json:"metadata"`
			} `json:"object"`
		} `json:"request"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<20)).Decode(&in); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	refused := in.Request.Object.Metadata.Labels["refuse"] == "yes"
	from, _, _ := strings.Cut(r.RemoteAddr, "%")
	slog.Info("reviewed", "from", from, "refused", refused)
	answer(w, map[string]any{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "response": map[string]any{
		"uid": in.Request.UID, "allowed": !refused, "status": map[string]any{"message": "refused by the hook, called from " + from},
	}})
}

func convert(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Request struct {
			UID               string           `json:"uid"`
			DesiredAPIVersion string           `json:"desiredAPIVersion"`
			Objects           []map[string]any `json:"objects"`
		} `json:"request"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<20)).Decode(&in); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	for _, o := range in.Request.Objects {
		o["apiVersion"] = in.Request.DesiredAPIVersion
	}
	slog.Info("converted", "from", r.RemoteAddr, "objects", len(in.Request.Objects), "to", in.Request.DesiredAPIVersion)
	answer(w, map[string]any{"kind": "ConversionReview", "apiVersion": "apiextensions.k8s.io/v1", "response": map[string]any{
		"uid": in.Request.UID, "convertedObjects": in.Request.Objects, "result": map[string]any{"status": "Success"},
	}})
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		slog.Warn("answer not sent", "error", err)
	}
}
