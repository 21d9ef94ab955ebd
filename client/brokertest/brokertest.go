// Package brokertest is a secrets broker inside another program's test:
//
//	b := brokertest.New(t)
//	c := b.Client("console-api")
//
// It is the broker itself, policy, audit log and mutual TLS included, over an
// embedded store and connections in memory. It uses no port and no process; its
// few files are in a folder of the test, and all of it ends with the test.
// Any number of brokers may run at once.
//
// The switches (VaultOutage, SetLatency, Revoke, RevokeClient, Deny, SetPolicy)
// are in force when they return, for calls on open connections too. Person is
// somebody who uses the vault without the broker.
package brokertest

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/internal/devdir"
	"github.com/exto/secrets-broker/internal/pki"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
	"github.com/exto/secrets-broker/server/audit"
	"github.com/exto/secrets-broker/server/authz"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/embedded"
	"github.com/exto/secrets-broker/server/vault/vaulttest"
)

const (
	// host is in the server's certificate, and no name of any network.
	host = "broker.test"
	// defaultCacheTTL lets what a person does show soon.
	defaultCacheTTL = 50 * time.Millisecond
	// life is longer than any test.
	life = 24 * time.Hour
	// shutdownTimeout is for calls that are still under way when the test ends.
	shutdownTimeout = 10 * time.Second
)

// Option changes how New makes a Broker.
type Option func(*config)

type config struct {
	policy              string
	cacheTTL, staleness time.Duration
	loopback            bool
}

// Policy sets who may call what, in the form of the broker's policy file. Without
// it there are console-api, worker, instance/{instance_id} and operator, with the
// rights that they have in the policy of broker dev.
func Policy(yaml string) Option { return func(c *config) { c.policy = yaml } }

// CacheTTL sets how old an answer from the broker's memory may be, and with it how
// soon it sees what a Person did. 50 ms without it, and 30 s in production.
func CacheTTL(d time.Duration) Option { return func(c *config) { c.cacheTTL = d } }

// StaleOnError sets how old an answer may be during an outage of the vault; 0: no
// older than CacheTTL. 15 minutes without it, as in production.
func StaleOnError(d time.Duration) Option {
	return func(c *config) {
		if c.staleness = d; d == 0 {
			c.staleness = broker.NoStaleOnError
		}
	}
}

// Loopback lets the broker listen on a free port of 127.0.0.1, for programs that
// take an address and no dial options.
func Loopback() Option { return func(c *config) { c.loopback = true } }

// Broker is a running broker. Its methods fail the test that made it when they
// can't do what they say; those are for its goroutine, as t.Fatal is. What the
// broker logs stands in the test's output.
type Broker struct {
	t       testing.TB
	dir     string
	ca      pki.Pair
	target  string
	options []grpc.DialOption
	// store is the vault itself; the broker reaches it unless there is an outage.
	store   vault.Vault
	outages atomic.Int64
	latency latency

	mu      sync.Mutex
	trust   *server.Trust
	files   server.Files
	policy  policyFile
	denied  map[string][]string // identity, as in the policy → permissions
	revoked map[string]bool
	serials map[*client.Client]string
	issued  int
}

// New runs a broker until t ends.
func New(t testing.TB, options ...Option) *Broker {
	t.Helper()
	cfg := config{policy: string(devdir.Policy), cacheTTL: defaultCacheTTL}
	for _, o := range options {
		o(&cfg)
	}
	b := &Broker{
		t: t, dir: t.TempDir(), latency: latency{changed: make(chan struct{})},
		denied: map[string][]string{}, revoked: map[string]bool{}, serials: map[*client.Client]string{},
	}
	var err error
	if b.ca, err = pki.NewCA("brokertest CA", time.Now(), life); err != nil {
		b.fatal("making a CA", err)
	}
	cert, key, _ := b.issue("server", x509.Certificate{
		DNSNames: []string{host}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if b.policy, err = parsePolicy(cfg.policy); err != nil {
		b.fatal("the policy", err)
	}
	b.files = server.Files{Cert: cert, Key: key, ClientCA: b.path("ca.pem"), Policy: b.path("policy.yaml"), Revoked: b.path("revoked")}
	b.write(b.files.ClientCA, b.ca.CertPEM())
	b.writeTrust()
	b.start(cfg)
	return b
}

// start puts the parts together as cmd/broker does.
func (b *Broker) start(cfg config) {
	b.t.Helper()
	log := slog.New(slog.NewTextHandler(b.t.Output(), nil))
	metrics := prometheus.NewRegistry()
	var err error
	if b.trust, err = server.OpenTrust(server.TrustConfig{Files: b.files, Logger: log}); err != nil {
		b.fatal("whom to trust", err)
	}
	listener, err := b.listen(cfg.loopback)
	if err != nil {
		b.fatal("listening", err)
	}
	store, err := embedded.Open(embedded.Config{Dir: b.path("data"), Logger: log})
	if err != nil {
		b.fatal("opening the store", err)
	}
	b.store = store
	b.t.Cleanup(func() { _ = store.Close() })
	auditLog, err := audit.Open(audit.Config{Path: b.path("audit.log"), Logger: log})
	if err != nil {
		b.fatal("opening the audit log", err)
	}
	reached := vaulttest.NewFaulty(store)
	reached.SetBefore(func(context.Context, string, secret.Key) error {
		if b.outages.Load() > 0 {
			return fmt.Errorf("%w: an outage of the test's", vault.ErrUnavailable)
		}
		return nil
	})
	heart := broker.New(broker.Config{Vault: reached, CacheTTL: cfg.cacheTTL, StaleOnError: cfg.staleness, Logger: log, Repairs: server.Repairs(auditLog)})
	face, err := server.New(server.Config{Broker: heart, Audit: auditLog, Trust: b.trust, Logger: log, Metrics: metrics})
	if err != nil {
		b.fatal("making the server", err)
	}
	served := make(chan error, 1)
	go func() { served <- face.Serve(lateListener{listener, &b.latency}) }()
	b.t.Cleanup(func() {
		b.latency.set(0) // nor is the end late
		ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
		defer cancel()
		face.Shutdown(ctx)
		heart.Close(ctx)
		if err := <-served; err != nil {
			b.t.Errorf("brokertest: serving: %v", err)
		}
		if err := auditLog.Close(ctx); err != nil {
			b.t.Errorf("brokertest: closing the audit log: %v", err)
		}
	})
}

func (b *Broker) listen(loopback bool) (net.Listener, error) {
	if loopback {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err == nil {
			b.target = l.Addr().String()
		}
		return l, err
	}
	l := bufconn.Listen(256 << 10)
	b.target = "passthrough:///" + host
	b.options = []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })}
	return l, nil
}

// Client is a client of the broker for this identity, which ends with the test: the
// path of a SPIFFE ID, such as console-api or instance/demo, in the policy's trust
// domain, or all of the ID. One that the policy does not know is refused call by
// call. Each has a certificate of its own.
func (b *Broker) Client(identity string) *client.Client {
	b.t.Helper()
	target, cfg, serial := b.configure(identity)
	c, err := client.New(target, cfg, b.options...)
	if err != nil {
		b.fatal("making a client", err)
	}
	b.t.Cleanup(func() { _ = c.Close() })
	b.mu.Lock()
	defer b.mu.Unlock()
	b.serials[c] = serial
	return c
}

// Instance is the Client of the instance with this id.
func (b *Broker) Instance(id string) *client.Client {
	b.t.Helper()
	return b.Client("instance/" + id)
}

// Config is what client.New takes to call as this identity, together with
// DialOptions. Identities are as for Client.
func (b *Broker) Config(identity string) (target string, cfg client.Config) {
	b.t.Helper()
	target, cfg, _ = b.configure(identity)
	return target, cfg
}

// DialOptions lead to the broker. With Loopback there are none, and none are
// needed.
func (b *Broker) DialOptions() []grpc.DialOption { return slices.Clone(b.options) }

func (b *Broker) configure(identity string) (target string, cfg client.Config, serial string) {
	b.t.Helper()
	id := b.id(identity)
	b.mu.Lock()
	b.issued++
	name := fmt.Sprintf("client-%d", b.issued)
	b.mu.Unlock()
	cert, key, serial := b.issue(name, x509.Certificate{URIs: []*url.URL{id.URL()}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return b.target, client.Config{CertFile: cert, KeyFile: key, CAFile: b.files.ClientCA}, serial
}

func (b *Broker) id(identity string) spiffeid.ID {
	b.t.Helper()
	id, err := spiffeid.FromString(b.spiffeID(identity))
	if err != nil {
		b.fatal("an identity is a SPIFFE ID or its path, such as console-api", err)
	}
	return id
}

// spiffeID is all of an identity's name.
func (b *Broker) spiffeID(identity string) string {
	if strings.Contains(identity, "://") {
		return identity
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return "spiffe://" + b.policy.TrustDomain + "/" + identity
}

// issue makes a certificate and writes it and its key to files.
func (b *Broker) issue(name string, template x509.Certificate) (certFile, keyFile, serial string) {
	b.t.Helper()
	template.Subject.CommonName = name
	pair, err := b.ca.Issue(template, time.Now(), life)
	if err != nil {
		b.fatal("making a certificate", err)
	}
	key, err := pair.KeyPEM()
	if err != nil {
		b.fatal("making a certificate", err)
	}
	certFile, keyFile = b.path(name+".pem"), b.path(name+"-key.pem")
	b.write(certFile, pair.CertPEM())
	b.write(keyFile, key)
	return certFile, keyFile, authz.Serial(pair.Cert.SerialNumber)
}

func (b *Broker) path(name string) string { return filepath.Join(b.dir, name) }

func (b *Broker) write(file string, content []byte) {
	b.t.Helper()
	if err := os.WriteFile(file, content, 0o600); err != nil {
		b.fatal("writing a file", err)
	}
}

func (b *Broker) fatal(what string, err error) {
	b.t.Helper()
	b.t.Fatalf("brokertest: %s: %v", what, err)
}
