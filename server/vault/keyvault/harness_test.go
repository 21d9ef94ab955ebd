package keyvault_test

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/keyvault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// clock is the time of a test: it moves when somebody waits.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Now().UTC().Truncate(time.Second)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) wait(ctx context.Context, d time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
	return ctx.Err()
}

func (c *clock) advance(d time.Duration) { _ = c.wait(context.Background(), d) }

// start runs a fake vault whose clock is the test's.
func start(t *testing.T, cfg keyvaultfake.Config) (*keyvaultfake.Fake, *clock) {
	t.Helper()
	c := newClock()
	cfg.Now = c.Now
	f, err := keyvaultfake.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f, c
}

// config leads to the fake as its principal p. The budget is large, so that no
// test waits for it by chance.
func config(f *keyvaultfake.Fake, c *clock, p keyvaultfake.Principal) keyvault.Config {
	transport := f.Transport()
	return keyvault.Config{
		URL:             f.URL(),
		ReadsPerSecond:  100_000,
		WritesPerSecond: 100_000,
		Logger:          quiet,
		Transport:       transport,
		Credential: func() (azcore.TokenCredential, error) {
			return azidentity.NewClientSecretCredential(p.TenantID, p.ClientID, p.ClientSecret, &azidentity.ClientSecretCredentialOptions{
				ClientOptions: azcore.ClientOptions{
					Transport: &http.Client{Transport: transport},
					Retry:     policy.RetryOptions{MaxRetries: -1}, // no test waits for the SDK's retries
				},
			})
		},
		Now:  c.Now,
		Wait: c.wait,
	}
}

// open is a vault on the fake, closed with the test.
func open(t *testing.T, cfg keyvault.Config) *keyvault.Vault {
	t.Helper()
	v, err := keyvault.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	return v
}

// atOnce is a vault without limits in which nothing takes time.
func atOnce() keyvaultfake.Config {
	return keyvaultfake.Config{Transitions: &keyvaultfake.Transitions{}, Limits: &keyvaultfake.Limits{}}
}

// newKey names a secret that nobody else has.
func newKey(t *testing.T) secret.Key {
	t.Helper()
	id, err := secret.ParseInstanceID(uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	key, err := secret.NewKey(id, secret.DatabaseURI)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// set stores a version of key through v.
func set(t *testing.T, v *keyvault.Vault, key secret.Key, value string) vault.Properties {
	t.Helper()
	p, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue(value)})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// on gives a fault to the first so many requests of op.
func on(f *keyvaultfake.Fake, op keyvaultfake.Op, times int64, fault keyvaultfake.Fault) {
	var left atomic.Int64
	left.Store(times)
	f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op == op && left.Add(-1) >= 0 {
			return fault
		}
		return keyvaultfake.Fault{}
	})
}

// always is more often than any test asks.
const always = 1 << 40

// sent are the requests of op in the journal, without the probes and those by which
// Settle looks.
func sent(f *keyvaultfake.Fake, op keyvaultfake.Op) []keyvaultfake.Request {
	var all []keyvaultfake.Request
	for _, r := range f.Journal() {
		if r.Op == op && r.Name != keyvault.Probed && (op != keyvaultfake.OpUpdate || r.Version != "") {
			all = append(all, r)
		}
	}
	return all
}

func wantSent(t *testing.T, f *keyvaultfake.Fake, op keyvaultfake.Op, want int) {
	t.Helper()
	if got := len(sent(f, op)); got != want {
		t.Errorf("got %d requests %s, want %d", got, op, want)
	}
}
