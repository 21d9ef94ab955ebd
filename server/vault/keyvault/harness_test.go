package keyvault_test

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"go.uber.org/goleak"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
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
				ClientOptions: azcore.ClientOptions{Transport: &http.Client{Transport: transport}},
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
