package main

import (
	"context"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/exto/secrets-broker/server"
	"github.com/exto/secrets-broker/server/audit"
)

// What is waited for the audit log beside calls: when something else is to be in force,
// which must not wait long for it, and at the end.
const (
	reloadTimeout = time.Second
	auditTimeout  = 2 * time.Second
)

// inForce tells the audit log by which build and which files calls are judged.
type inForce struct {
	log    *slog.Logger
	system audit.System
	audit  *audit.Log // nil until it is open
}

func (f *inForce) changed(h server.Hashes) {
	f.system.Policy, f.system.Revoked, f.system.ClientCA, f.system.Certificate = h.Policy, h.Revoked, h.ClientCA, h.Certificate
	if f.audit != nil {
		f.record("reload")
	}
}

func (f *inForce) record(action string) {
	ctx, cancel := context.WithTimeout(context.Background(), reloadTimeout)
	defer cancel()
	if err := f.audit.System(ctx, action, f.system); err != nil {
		f.log.Error("what is in force now is not recorded yet; it will be before the next call is answered", "action", action, "error", err)
	}
}

// openAudit opens the audit log and records the start.
func (c serveCommand) openAudit(f *inForce, stdout io.Writer, log *slog.Logger, metrics prometheus.Registerer) (*audit.Log, error) {
	f.system.Build = build()
	auditLog, err := audit.Open(audit.Config{
		Path: c.AuditFile, Out: stdout, MaxBytes: c.AuditMaxBytes, Keep: c.AuditKeep, System: f.system, Logger: log, Metrics: metrics,
	})
	if err != nil {
		return nil, &fileError{"BROKER_AUDIT_FILE (--audit-file)", "set it to a file of its own in a folder that is there, or to - for standard output", err}
	}
	f.audit = auditLog
	f.record("start")
	return auditLog, nil
}

// build names this build in one word.
func build() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return info.Main.Version + " " + s.Value
		}
	}
	return info.Main.Version
}

// reopenOnHangup begins a new file of the audit log when the process is told that the
// present one was moved.
func reopenOnHangup(ctx context.Context, log *audit.Log) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	for {
		select {
		case <-hangups:
			log.Reopen()
		case <-ctx.Done():
			return
		}
	}
}
