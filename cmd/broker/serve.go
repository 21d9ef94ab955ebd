package main

import (
	"context"
	"crypto/fips140"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/exto/secrets-broker/server"
	"github.com/exto/secrets-broker/server/audit"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/embedded"
	"github.com/exto/secrets-broker/server/vault/keyvault"
	"github.com/exto/secrets-broker/server/vault/noop"
)

// serveCommand is a broker in production. Its fields are the variables that the
// README's table lists.
type serveCommand struct {
	SecretStoreProvider string `name:"secret-store-provider" env:"SECRET_STORE_PROVIDER" placeholder:"NAME" help:"Where the secrets are: azure-keyvault, embedded, or noop (keeps nothing), which is also the default."`
	AzureKeyVaultURL    string `name:"azure-key-vault-url" env:"AZURE_KEY_VAULT_URL" placeholder:"URL" help:"The vault of azure-keyvault, such as https://NAME.vault.azure.net/. Required by it."`
	ListenAddress       string `name:"listen-address" env:"BROKER_LISTEN_ADDRESS" default:":7443" help:"Address of the gRPC server."`
	TLSCertFile         string `name:"tls-cert-file" env:"BROKER_TLS_CERT_FILE" placeholder:"FILE" help:"PEM file of the server's certificate. Required."`
	TLSKeyFile          string `name:"tls-key-file" env:"BROKER_TLS_KEY_FILE" placeholder:"FILE" help:"PEM file of its private key. Required."`
	TLSClientCAFile     string `name:"tls-client-ca-file" env:"BROKER_TLS_CLIENT_CA_FILE" placeholder:"FILE" help:"PEM file of the CA that issues the callers' certificates. Required."`
	TLSRevokedFile      string `name:"tls-revoked-file" env:"BROKER_TLS_REVOKED_FILE" placeholder:"FILE" help:"What is revoked of the callers' certificates: serial numbers in hex or SPIFFE IDs, one a line. Unset: nothing is."`
	AuditFile           string `name:"audit-file" env:"BROKER_AUDIT_FILE" default:"-" placeholder:"FILE" help:"The audit log: a file, or - for standard output, which is no journal of unfinished writes."`
	PolicyFile          string `name:"policy-file" env:"BROKER_POLICY_FILE" placeholder:"FILE" help:"YAML file that says who may call what. Required."`
	DataDir             string `name:"data-dir" env:"BROKER_DATA_DIR" placeholder:"DIR" help:"Folder of the embedded store. Required by it."`
	EmbeddedKeyFile     string `name:"embedded-key-file" env:"BROKER_EMBEDDED_KEY_FILE" placeholder:"FILE" help:"Key of the embedded store, made on first start; store.key in its folder by default."`
	serverSettings
}

// serverSettings are the same for serve and dev.
type serverSettings struct {
	MetricsAddress          string        `name:"metrics-address" env:"BROKER_METRICS_ADDRESS" default:"127.0.0.1:9464" help:"Address of /metrics, /healthz and /readyz."`
	EmbeddedRetention       time.Duration `name:"embedded-retention" env:"BROKER_EMBEDDED_RETENTION" default:"2160h" help:"How long the embedded store keeps what was deleted."`
	VaultReadsPerSecond     float64       `name:"vault-reads-per-second" env:"BROKER_VAULT_READS_PER_SECOND" default:"320" help:"Requests a second that may read from Azure Key Vault."`
	VaultWritesPerSecond    float64       `name:"vault-writes-per-second" env:"BROKER_VAULT_WRITES_PER_SECOND" default:"24" help:"Requests a second that may change something there."`
	CacheTTL                time.Duration `name:"cache-ttl" env:"BROKER_CACHE_TTL" default:"30s" help:"How old an answer may be when the caller names no bound."`
	StaleOnError            time.Duration `name:"stale-on-error" env:"BROKER_STALE_ON_ERROR" default:"15m" help:"How old it may be when moreover the vault cannot be reached; 0: no older."`
	CallerRequestsPerSecond float64       `name:"caller-requests-per-second" env:"BROKER_CALLER_REQUESTS_PER_SECOND" default:"0" help:"Requests a second that each caller may make; 0: any number."`
	AuditMaxBytes           int64         `name:"audit-max-bytes" env:"BROKER_AUDIT_MAX_BYTES" default:"1073741824" help:"At this size the audit log begins a new file; the full one is named FILE.N."`
	AuditKeep               int           `name:"audit-keep" env:"BROKER_AUDIT_KEEP" default:"0" help:"How many full files of the audit log to keep; 0: all."`
	ShutdownTimeout         time.Duration `name:"shutdown-timeout" env:"BROKER_SHUTDOWN_TIMEOUT" default:"15s" help:"How long a shutdown waits for the calls under way."`
	logSettings
}

// Run serves until ctx ends.
func (c serveCommand) Run(ctx context.Context, s streams) error {
	return c.serve(ctx, s, func(net.Addr) {})
}

// trustFile is the setting of a file by which callers are known.
type trustFile struct {
	field, value string // of server.Files
	name         string
	meaning      string
}

func (c serveCommand) trustFiles() []trustFile {
	return []trustFile{
		{"Cert", c.TLSCertFile, "BROKER_TLS_CERT_FILE (--tls-cert-file)", "the PEM file of the server's certificate"},
		{"Key", c.TLSKeyFile, "BROKER_TLS_KEY_FILE (--tls-key-file)", "the PEM file of the server's private key"},
		{"ClientCA", c.TLSClientCAFile, "BROKER_TLS_CLIENT_CA_FILE (--tls-client-ca-file)", "the PEM file of the CA that issues the callers' certificates"},
		{"Policy", c.PolicyFile, "BROKER_POLICY_FILE (--policy-file)", "the YAML file that says who may call what"},
		{"Revoked", c.TLSRevokedFile, "BROKER_TLS_REVOKED_FILE (--tls-revoked-file)", "the file that lists what is revoked, or leave it unset when nothing is"},
	}
}

// openTrust reads the files by which callers are known. The error names the setting.
func (c serveCommand) openTrust(log *slog.Logger, metrics prometheus.Registerer, onChange func(server.Hashes)) (*server.Trust, error) {
	trust, err := server.OpenTrust(server.TrustConfig{Logger: log, Metrics: metrics, OnChange: onChange, Files: server.Files{
		Cert: c.TLSCertFile, Key: c.TLSKeyFile, ClientCA: c.TLSClientCAFile, Revoked: c.TLSRevokedFile, Policy: c.PolicyFile,
	}})
	if bad := (*server.FileError)(nil); errors.As(err, &bad) {
		for _, f := range c.trustFiles() {
			if f.field == bad.Field {
				return nil, &fileError{f.name, "set it to " + f.meaning, err}
			}
		}
	}
	return trust, err
}

// fileError is why a file or folder that a setting names will not do.
type fileError struct {
	setting, advice string
	error
}

func (e *fileError) Error() string { return e.setting + ": " + e.error.Error() + "; " + e.advice }

func (e *fileError) Unwrap() error { return e.error }

// leastAuditBytes has room for what each file begins with, and for some lines.
const leastAuditBytes = 4 << 10

// maxCallerRequests is more than a broker answers.
const maxCallerRequests = 1e6

// check names the first setting that is missing or out of range.
func (c serveCommand) check() error {
	for _, f := range c.trustFiles() {
		if f.value == "" && f.field != "Revoked" {
			return fmt.Errorf("%s is not set: set it to %s, or run broker dev, which makes one", f.name, f.meaning)
		}
	}
	switch {
	case c.SecretStoreProvider == "embedded" && c.DataDir == "":
		return errors.New("BROKER_DATA_DIR (--data-dir) is not set: set it to the folder of the embedded store")
	case c.SecretStoreProvider == "azure-keyvault" && c.AzureKeyVaultURL == "":
		return errors.New("AZURE_KEY_VAULT_URL (--azure-key-vault-url) is not set: set it to the vault's URL, such as https://NAME.vault.azure.net/")
	case !slices.Contains([]string{"", "noop", "embedded", "azure-keyvault"}, c.SecretStoreProvider):
		return errors.New("SECRET_STORE_PROVIDER (--secret-store-provider) is not one of the stores: set it to azure-keyvault, embedded or noop")
	case !(c.VaultReadsPerSecond >= 1 && c.VaultReadsPerSecond <= 4000):
		return errors.New("BROKER_VAULT_READS_PER_SECOND (--vault-reads-per-second) is out of range: set it to 1 to 4000; the default is 320")
	case !(c.VaultWritesPerSecond >= 1 && c.VaultWritesPerSecond <= 4000):
		return errors.New("BROKER_VAULT_WRITES_PER_SECOND (--vault-writes-per-second) is out of range: set it to 1 to 4000; the default is 24")
	case !(c.CallerRequestsPerSecond >= 0 && c.CallerRequestsPerSecond <= maxCallerRequests):
		return fmt.Errorf("BROKER_CALLER_REQUESTS_PER_SECOND (--caller-requests-per-second) is out of range: set it to a number up to %d, or to 0 for no limit", int(maxCallerRequests))
	case c.AuditMaxBytes < leastAuditBytes:
		return fmt.Errorf("BROKER_AUDIT_MAX_BYTES (--audit-max-bytes) is too small: set it to %d or more, such as 1073741824", leastAuditBytes)
	case c.AuditKeep < 0:
		return errors.New("BROKER_AUDIT_KEEP (--audit-keep) is negative: set it to the number of full files to keep, or to 0 for all")
	case c.AuditFile == "":
		return errors.New("BROKER_AUDIT_FILE (--audit-file) is empty: set it to a file, or to - for standard output")
	case c.ListenAddress == "": // which net.Listen takes for any port of all addresses
		return errors.New("BROKER_LISTEN_ADDRESS (--listen-address) is empty: set it to an address such as :7443")
	case c.MetricsAddress == "":
		return errors.New("BROKER_METRICS_ADDRESS (--metrics-address) is empty: set it to an address such as 127.0.0.1:9464")
	case c.EmbeddedRetention <= 0:
		return errors.New("BROKER_EMBEDDED_RETENTION (--embedded-retention) is not positive: set it to a duration such as 2160h")
	case c.CacheTTL <= 0:
		return errors.New("BROKER_CACHE_TTL (--cache-ttl) is not positive: set it to a duration such as 30s; a caller that wants no answer from memory sets max_staleness to 0s")
	case c.StaleOnError < 0:
		return errors.New("BROKER_STALE_ON_ERROR (--stale-on-error) is negative: set it to a duration such as 15m, or to 0 for none")
	case c.ShutdownTimeout <= 0:
		return errors.New("BROKER_SHUTDOWN_TIMEOUT (--shutdown-timeout) is not positive: set it to a duration such as 15s")
	}
	return nil
}

// gcPercent is how much the heap may grow between two collections. Most of it is the
// cache, which is bounded and lives long, so that collecting it more often costs each
// call and frees little. GOGC, where it is set, goes first.
const gcPercent = 400

// maxBallast is memory that is never touched, so that the machine has not to find it,
// but counts for gcPercent: the heap of a broker with little in its cache would else be
// collected several times a second under load, which costs the calls that it meets most.
// Go has no other way to say how small a heap is not worth collecting.
const maxBallast = 32 << 20

// serve runs the broker until ctx ends and everything is closed again. listening
// is called once with the address of the gRPC server, when it takes calls.
func (c serveCommand) serve(ctx context.Context, s streams, listening func(net.Addr)) (err error) {
	log, err := c.logger(s.err)
	if err != nil {
		return err
	}
	if err := c.check(); err != nil {
		return err
	}
	// The collector works harder from nine tenths of the container's memory on, where it
	// has a limit: a flood is to cost time, not the process. GOMEMLIMIT goes first.
	if _, err := memlimit.Set(); err != nil {
		log.Debug("no memory limit is set", "cause", err)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
		ballast := make([]byte, min(maxBallast, debug.SetMemoryLimit(-1)/16))
		defer runtime.KeepAlive(ballast)
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	force := &inForce{log: log}
	trust, err := c.openTrust(log, metrics, force.changed)
	if err != nil {
		return err
	}
	// Before the store: a start that fails for its address makes no store.
	grpcListener, err := listen("BROKER_LISTEN_ADDRESS (--listen-address)", c.ListenAddress)
	if err != nil {
		return err
	}
	defer func() { _ = grpcListener.Close() }()
	opsListener, err := listen("BROKER_METRICS_ADDRESS (--metrics-address)", c.MetricsAddress)
	if err != nil {
		return err
	}
	defer func() { _ = opsListener.Close() }()
	store, err := c.openVault(ctx, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	auditLog, err := c.openAudit(force, s.out, log, metrics)
	if err != nil {
		return err
	}
	defer func() {
		// It outlives the calls, whose records it takes; and it says itself what is amiss.
		bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), auditTimeout)
		defer cancel()
		_ = auditLog.Close(bound)
	}()
	log.LogAttrs(ctx, slog.LevelInfo, "broker starts", buildAttrs()...)
	if !audit.Recording {
		log.Warn("this build is for measuring alone: it keeps no record of reads and refusals")
	}
	logStore(log, store.Info())

	stale := c.StaleOnError
	if stale == 0 {
		stale = broker.NoStaleOnError
	}
	heart := broker.New(broker.Config{Vault: store, CacheTTL: c.CacheTTL, StaleOnError: stale, Logger: log, Repairs: server.Repairs(auditLog)})
	face, err := server.New(server.Config{Broker: heart, Audit: auditLog, Trust: trust, Logger: log, Metrics: metrics, CallerRequestsPerSecond: c.CallerRequestsPerSecond})
	if err != nil {
		return err
	}

	ops := newOperations(metrics, heart.Check, auditLog.Check)

	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return face.Serve(grpcListener) })
	group.Go(func() error { trust.Run(groupCtx); return nil })
	group.Go(func() error { reopenOnHangup(groupCtx, auditLog); return nil })
	group.Go(func() error { return ops.serve(opsListener) })
	group.Go(func() error {
		<-groupCtx.Done() // a signal, or one of the two failed
		log.Info("shutting down", "at_most", c.ShutdownTimeout)
		ops.notReady()
		bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.ShutdownTimeout)
		defer cancel()
		// Writes that are not done by then are cut off a little before their calls
		// are, so that the callers hear what became of them.
		last, end := context.WithTimeout(bound, c.ShutdownTimeout-min(time.Second, c.ShutdownTimeout/10))
		defer end()
		ended := context.AfterFunc(last, func() { heart.Close(last) })
		face.Shutdown(bound)
		ended()
		heart.Close(bound)
		ops.close()
		return nil
	})
	log.Info("listening", "grpc", grpcListener.Addr().String(), "metrics", opsListener.Addr().String())
	listening(grpcListener.Addr())
	err = group.Wait()
	log.Info("broker stopped")
	return err
}

// listen takes connections from now on; what they ask waits until somebody serves.
func listen(setting, address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; set it to an address of this machine that is free", setting, err)
	}
	return l, nil
}

// openVault opens the store that the settings name, which check has judged.
func (c serveCommand) openVault(ctx context.Context, log *slog.Logger) (vault.Vault, error) {
	switch c.SecretStoreProvider {
	case "azure-keyvault":
		store, err := keyvault.Open(ctx, keyvault.Config{
			URL:             c.AzureKeyVaultURL,
			ReadsPerSecond:  c.VaultReadsPerSecond,
			WritesPerSecond: c.VaultWritesPerSecond,
			Logger:          log,
		})
		if err != nil {
			return nil, fmt.Errorf("azure key vault: %w", err)
		}
		return store, nil
	case "embedded":
		store, err := embedded.Open(embedded.Config{Dir: c.DataDir, KeyFile: c.EmbeddedKeyFile, Retention: c.EmbeddedRetention, Logger: log})
		if err != nil {
			return nil, &fileError{"BROKER_DATA_DIR (--data-dir), BROKER_EMBEDDED_KEY_FILE (--embedded-key-file)", "set them to the folder of one broker's store and to the file of its key", err}
		}
		return store, nil
	}
	return noop.New(log), nil
}

func logStore(log *slog.Logger, info vault.Info) {
	if info.Discards {
		log.Warn("secret store: "+info.Name, "means", "no secret is kept; set SECRET_STORE_PROVIDER to keep them")
		return
	}
	log.Info("secret store: "+info.Name, info.Location)
}

// buildAttrs says which build this is.
func buildAttrs() []slog.Attr {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return nil
	}
	attrs := []slog.Attr{slog.String("version", info.Main.Version), slog.String("go", info.GoVersion)}
	if fips140.Enabled() {
		attrs = append(attrs, slog.Bool("fips140", true))
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			attrs = append(attrs, slog.String("revision", s.Value))
		}
	}
	return attrs
}
