package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// checkTimeout bounds what /readyz waits for the vault, and healthcheckTimeout
// what broker healthcheck waits for the answer: it exits within 2 s.
const (
	checkTimeout       = time.Second
	healthcheckTimeout = 1800 * time.Millisecond
)

// operations serves what monitoring asks, in clear HTTP: nothing there is secret.
type operations struct {
	http     *http.Server
	check    func(context.Context) error
	audit    func() error
	stopping atomic.Bool
}

// newOperations makes the server; check says whether the vault can be used, and audit
// whether what is done can be recorded.
func newOperations(metrics *prometheus.Registry, check func(context.Context) error, audit func() error) *operations {
	o := &operations{check: check, audit: audit}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", o.readyz)
	o.http = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	return o
}

func (o *operations) readyz(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), checkTimeout)
	defer cancel()
	switch {
	case o.stopping.Load():
		http.Error(w, "not ready: shutting down", http.StatusServiceUnavailable)
	case o.audit() != nil:
		http.Error(w, "not ready: the audit log cannot be written", http.StatusServiceUnavailable)
	case o.check(ctx) != nil:
		http.Error(w, "not ready: the vault cannot be used", http.StatusServiceUnavailable)
	default:
		_, _ = fmt.Fprintln(w, "ok")
	}
}

// serve answers on l until close.
func (o *operations) serve(l net.Listener) error {
	if err := o.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// notReady makes /readyz fail from now on.
func (o *operations) notReady() { o.stopping.Store(true) }

func (o *operations) close() { _ = o.http.Close() }

type healthcheckCommand struct {
	MetricsAddress string `name:"metrics-address" env:"BROKER_METRICS_ADDRESS" default:"127.0.0.1:9464" help:"Address of the broker's /readyz and /healthz."`
	Live           bool   `name:"live" help:"Ask /healthz, whether it runs, instead of /readyz, whether it can serve."`
}

// Run asks the broker, and is nil when it says yes.
func (c healthcheckCommand) Run(ctx context.Context, s streams) error {
	host, port, err := net.SplitHostPort(c.MetricsAddress)
	if err != nil {
		return fmt.Errorf("BROKER_METRICS_ADDRESS (--metrics-address): %w", err)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1" // it listens on all addresses
		if ip != nil && ip.To4() == nil {
			host = "::1"
		}
	}
	path := "/readyz"
	if c.Live {
		path = "/healthz"
	}
	ctx, cancel := context.WithTimeout(ctx, healthcheckTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+path, nil)
	if err != nil {
		return err
	}
	// Not the default client: HTTP_PROXY must not lead the question elsewhere.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("healthcheck: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("healthcheck: %s says %s", path, resp.Status)
	}
	_, err = fmt.Fprintln(s.out, "ok")
	return err
}
