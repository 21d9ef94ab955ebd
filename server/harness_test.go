package server_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/internal/pki"
	"github.com/exto/secrets-broker/internal/race"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
	"github.com/exto/secrets-broker/server/audit"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/embedded"
	"github.com/exto/secrets-broker/server/vault/keyvault"
	"github.com/exto/secrets-broker/server/vault/vaulttest"
)

// How many tests run at once: most of them wait for something most of the time, though less
// under the race detector.
const (
	atOnce       = "8"
	atOnceRacing = "6"
)

func TestMain(m *testing.M) {
	flag.Parse()
	set := false
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == "test.parallel" })
	switch {
	case set:
	case race.Enabled:
		_ = flag.Set("test.parallel", atOnceRacing)
	default:
		_ = flag.Set("test.parallel", atOnce)
	}
	debug.SetGCPercent(400)
	inMemory()
	goleak.VerifyTestMain(m)
}

// inMemory puts the files of these tests into memory where the system has room there, and
// nobody has said where else: a disk would make them wait for it. What a disk is asked to
// keep is looked at by the tests of the packages that ask it.
func inMemory() {
	const memory, room = "/dev/shm", 2 << 30
	var fs syscall.Statfs_t
	if os.Getenv("TMPDIR") == "" && syscall.Statfs(memory, &fs) == nil && fs.Bavail*uint64(fs.Bsize) > room {
		_ = os.Setenv("TMPDIR", memory)
	}
}

const policy = `
trust_domain: console.exto
rules:
  - identity: spiffe://console.exto/console-api
    allow: [put, get, rotate, delete, recover, verify, describe, list, watch]
  - identity: spiffe://console.exto/worker
    allow: [put, get, rotate, delete, recover, describe, list, watch]
  - identity: spiffe://console.exto/instance/{instance_id}
    allow: [get, watch]
    instances: ["{instance_id}"]
  - identity: spiffe://console.exto/operator
    allow: [describe, list, watch, debug]
`

// Names of callers in policy.
const (
	consoleAPI = "console-api"
	worker     = "worker"
	operator   = "operator"
)

// clock is the time of a test: it moves when the test says so.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func (c *clock) wait(ctx context.Context, d time.Duration) error {
	c.advance(d)
	return ctx.Err()
}

// logBuffer is a log that tests can read.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// system is a vault with a broker before it, on a real listener with real
// certificates.
type system struct {
	t      testing.TB
	dir    string
	clock  *clock
	ca     pki.Pair
	policy string
	log    *logBuffer
	// store is the vault itself, as somebody outside the broker uses it; vault is
	// what the broker sees, whose calls can be made to fail.
	store vault.Vault
	vault *vaulttest.Faulty
	// fake is the Key Vault behind them; nil when they are an embedded store. Each
	// broker has a client of its own there: own.
	fake *keyvaultfake.Fake
	own  func() vault.Vault
	addr string
	// config, unless nil, changes how the server is made, and trust whom it trusts.
	config func(*server.Config)
	trust  func(*server.TrustConfig)
	// metrics and trusted are those of the present broker.
	metrics *prometheus.Registry
	trusted *server.Trust
	// heart, unless nil, changes how the broker behind it is made.
	heart func(*broker.Config)
	face  *server.Server
	// auditFile is the audit log of the present broker, which is the generation-th.
	auditFile  string
	generation int
	// auditAgain, unless empty, is the file of the next one, and auditTo its standard
	// output for the audit log.
	auditAgain string
	auditTo    io.Writer
	// hurried, once set, lets the present broker wait for nothing any more, as if
	// its time were over.
	hurried *atomic.Bool
	// stop ends broker and server, but not the store.
	stop func()
}

// startSystem runs a broker on an embedded store of its own.
func startSystem(t *testing.T) *system {
	t.Helper()
	s := newSystem(t)
	s.startEmbedded()
	return s
}

// startEmbedded is startSystem for a system that was changed before.
func (s *system) startEmbedded() {
	s.t.Helper()
	store, err := embedded.Open(embedded.Config{Dir: filepath.Join(s.dir, "data"), Now: s.clock.Now, Logger: s.logger()})
	if err != nil {
		s.t.Fatal(err)
	}
	s.startOn(store)
}

// startKeyVault runs a broker on a Key Vault, in which store is a person.
func startKeyVault(t *testing.T) *system {
	t.Helper()
	s := newSystem(t)
	var err error
	if s.fake, err = keyvaultfake.Start(keyvaultfake.Config{Now: s.clock.Now}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.fake.Close(); err != nil {
			t.Errorf("closing the fake: %v", err)
		}
	})
	s.own = func() vault.Vault { return s.openKeyVault(s.fake.Broker()) }
	s.startOn(s.openKeyVault(s.fake.Person()))
	return s
}

// openKeyVault is a client of the fake, for which time passes when it waits.
func (s *system) openKeyVault(p keyvaultfake.Principal) vault.Vault {
	s.t.Helper()
	transport := s.fake.Transport()
	v, err := keyvault.Open(s.t.Context(), keyvault.Config{
		URL: s.fake.URL(), ReadsPerSecond: 100_000, WritesPerSecond: 100_000, Logger: s.logger(), Transport: transport,
		Credential: func() (azcore.TokenCredential, error) {
			return azidentity.NewClientSecretCredential(p.TenantID, p.ClientID, p.ClientSecret, &azidentity.ClientSecretCredentialOptions{
				ClientOptions: azcore.ClientOptions{Transport: &http.Client{Transport: transport}},
			})
		},
		Now: s.clock.Now, Wait: s.clock.wait,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

// notRacing leaves a test of many cases out under the race detector, in which calls come
// one after the other.
func notRacing(t *testing.T) {
	t.Helper()
	if race.Enabled {
		t.Skip("one call after the other: there is nothing to race")
	}
}

// onEachVault runs a test on an embedded store and on a Key Vault.
func onEachVault(t *testing.T, test func(t *testing.T, start func(*testing.T) *system)) {
	for name, start := range map[string]func(*testing.T) *system{"embedded": startSystem, "key vault": startKeyVault} {
		t.Run(name, func(t *testing.T) {
			// The detector makes everything several times as slow, and looks for other
			// things than what depends on the vault.
			if even := len(t.Name())%2 == 0; race.Enabled && even == (name == "embedded") {
				t.Skip("under the race detector half of the tests run on one vault, and half on the other")
			}
			t.Parallel()
			test(t, start)
		})
	}
}

func newSystem(t testing.TB) *system {
	t.Helper()
	s := &system{t: t, dir: t.TempDir(), clock: &clock{now: time.Now().UTC().Truncate(time.Second)}, policy: policy, log: &logBuffer{}}
	var err error
	if s.ca, err = pki.NewCA("test CA", time.Now(), 24*time.Hour); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *system) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// startOn runs a broker on store, which is closed with the test.
func (s *system) startOn(store vault.Vault) {
	s.t.Helper()
	s.store = store
	s.t.Cleanup(func() {
		if err := store.Close(); err != nil {
			s.t.Errorf("closing the store: %v", err)
		}
	})
	s.restart()
}

// restart runs another broker on the same store, as after the death of the one
// before, which gets no chance to end anything.
func (s *system) restart() {
	s.t.Helper()
	behind := s.store
	if s.own != nil {
		behind = s.own()
		s.t.Cleanup(func() { _ = behind.Close() }) // after the broker's own end
	}
	s.vault = vaulttest.NewFaulty(behind)
	cert := s.issue("server", x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, time.Hour)
	s.metrics = prometheus.NewRegistry()
	trustConfig := server.TrustConfig{Logger: s.logger(), Metrics: s.metrics, Files: server.Files{
		Cert: s.write("server.pem", cert.CertPEM()), Key: s.write("server-key.pem", s.keyPEM(cert)),
		ClientCA: s.write("ca.pem", s.ca.CertPEM()), Policy: s.write("policy.yaml", []byte(s.policy)),
	}}
	if s.trust != nil {
		s.trust(&trustConfig)
	}
	trust, err := server.OpenTrust(trustConfig)
	if err != nil {
		s.t.Fatal(err)
	}
	s.trusted = trust
	hurried := &atomic.Bool{}
	s.hurried = hurried
	wait := func(ctx context.Context, d time.Duration) error {
		if hurried.Load() {
			return context.DeadlineExceeded
		}
		return s.clock.wait(ctx, d)
	}
	heartConfig := broker.Config{Vault: s.vault, Logger: s.logger(), Now: s.clock.Now, Wait: wait}
	if s.heart != nil {
		s.heart(&heartConfig)
	}
	s.generation++
	s.auditFile = filepath.Join(s.dir, fmt.Sprintf("audit-%d.log", s.generation))
	if s.auditAgain != "" {
		s.auditFile = s.auditAgain
	}
	if s.auditTo != nil {
		s.auditFile = "-"
	}
	auditLog, err := audit.Open(audit.Config{Path: s.auditFile, Out: s.auditTo, Logger: s.logger(), Metrics: s.metrics, Now: s.clock.Now})
	if err != nil {
		s.t.Fatal(err)
	}
	heartConfig.Repairs = server.Repairs(auditLog)
	heart := broker.New(heartConfig)
	cfg := server.Config{Broker: heart, Audit: auditLog, Trust: trust, Logger: s.logger(), Metrics: s.metrics}
	if s.config != nil {
		s.config(&cfg)
	}
	face, err := server.New(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	s.addr, s.face = listener.Addr().String(), face
	served := make(chan error, 1)
	go func() { served <- face.Serve(listener) }()
	watched, unwatch := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { trust.Run(watched) })
	s.stop = sync.OnceFunc(func() {
		unwatch()
		watching.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		face.Shutdown(ctx)
		heart.Close(ctx)
		if err := <-served; err != nil {
			s.t.Errorf("Serve: %v", err)
		}
		if err := auditLog.Close(ctx); err != nil {
			s.t.Errorf("closing the audit log: %v", err)
		}
	})
	s.t.Cleanup(s.stop)
}

func (s *system) write(name string, content []byte) string {
	s.t.Helper()
	file := filepath.Join(s.dir, name)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return file
}

func (s *system) keyPEM(p pki.Pair) []byte {
	s.t.Helper()
	pem, err := p.KeyPEM()
	if err != nil {
		s.t.Fatal(err)
	}
	return pem
}

// issue makes a certificate of the system's CA.
func (s *system) issue(name string, template x509.Certificate, life time.Duration) pki.Pair {
	s.t.Helper()
	template.Subject.CommonName = name
	pair, err := s.ca.Issue(template, time.Now(), life)
	if err != nil {
		s.t.Fatal(err)
	}
	return pair
}

// certificate is a caller's, with these URI SANs.
func (s *system) certificate(uris ...string) pki.Pair {
	s.t.Helper()
	template := x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, uri := range uris {
		u, err := url.Parse(uri)
		if err != nil {
			s.t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	return s.issue("caller", template, time.Hour)
}

// as is a client with the SPIFFE ID of this path, such as console-api.
func (s *system) as(path string) secretsv1.SecretsBrokerServiceClient {
	s.t.Helper()
	return secretsv1.NewSecretsBrokerServiceClient(s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + path))))
}

func (s *system) clientTLS(certs ...pki.Pair) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(s.ca.Cert)
	cfg := &tls.Config{RootCAs: roots}
	for _, c := range certs {
		cfg.Certificates = append(cfg.Certificates, c.TLS())
	}
	return cfg
}

func (s *system) dial(cfg *tls.Config) *grpc.ClientConn {
	s.t.Helper()
	conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func key(t *testing.T, id string, kind secret.Kind) secret.Key {
	t.Helper()
	instance, err := secret.ParseInstanceID(id)
	if err != nil {
		t.Fatal(err)
	}
	k, err := secret.NewKey(instance, kind)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func ref(id string, kind secretsv1.SecretKind) *secretsv1.SecretRef {
	return &secretsv1.SecretRef{InstanceId: id, Kind: kind}
}

// failure is what an error says.
type failure struct {
	code    codes.Code
	reason  secret.Reason
	commit  secret.CommitState
	field   string
	auditID string
	status  *status.Status
}

func failed(t *testing.T, err error) failure {
	t.Helper()
	st, ok := status.FromError(err)
	if err == nil || !ok {
		t.Fatalf("got error %v, want a status", err)
	}
	f := failure{code: st.Code(), status: st}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			f.reason, f.commit, f.auditID = secret.Reason(d.Reason), secret.CommitState(d.Metadata["commit_state"]), d.Metadata["audit_id"]
		case *errdetails.BadRequest:
			f.field = d.FieldViolations[0].Field
		}
	}
	return f
}

// wantReason checks the reason of an error and, on writes, what became of it.
func wantReason(t *testing.T, err error, reason secret.Reason, commit secret.CommitState) {
	t.Helper()
	if f := failed(t, err); f.reason != reason || f.commit != commit {
		t.Fatalf("got %q with commit state %q (%v), want %q with %q", f.reason, f.commit, err, reason, commit)
	}
}

func callContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func contains(s, part string) bool { return strings.Contains(s, part) }

func durationOf(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

// lookAgain is how often a test looks whether something has come about: not so often that
// what it waits for has to wait for it.
const lookAgain = 5 * time.Millisecond

// eventually looks until so is true.
func eventually(t testing.TB, what string, so func() bool) {
	t.Helper()
	ctx := callContext(t)
	again := time.NewTicker(lookAgain)
	defer again.Stop()
	for !so() {
		select {
		case <-again.C:
		case <-ctx.Done():
			t.Fatalf("%s: not so in time", what)
		}
	}
}
