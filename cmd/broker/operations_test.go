package main

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestReadiness: ready is who can serve, and what keeps it from that is named.
func TestReadiness(t *testing.T) {
	t.Parallel()
	fine, fault := func() error { return nil }, func() error { return errors.New("a path, which is told to nobody") }
	for name, tt := range map[string]struct {
		vault, audit func() error
		stopping     bool
		code         int
		says         string
	}{
		"all well":      {fine, fine, false, http.StatusOK, "ok"},
		"no vault":      {fault, fine, false, http.StatusServiceUnavailable, "not ready: the vault cannot be used"},
		"no audit log":  {fine, fault, false, http.StatusServiceUnavailable, "not ready: the audit log cannot be written"},
		"shutting down": {fine, fine, true, http.StatusServiceUnavailable, "not ready: shutting down"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := newOperations(prometheus.NewRegistry(), func(context.Context) error { return tt.vault() }, tt.audit)
			if tt.stopping {
				o.notReady()
			}
			w := httptest.NewRecorder()
			o.http.Handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
			if got := strings.TrimSpace(w.Body.String()); w.Code != tt.code || got != tt.says {
				t.Errorf("got %d %q, want %d %q", w.Code, got, tt.code, tt.says)
			}
		})
	}
}
