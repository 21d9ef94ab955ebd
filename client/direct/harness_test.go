package direct_test

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	azlog "github.com/Azure/azure-sdk-for-go/sdk/azcore/log"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"go.uber.org/goleak"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/client/direct"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault/keyvault"
)

// heard gets the SDK's log, unless nil. What the SDK began in the background may still
// log when a test is over, so that all about the log is set once, before the first; the
// broker's vault has a part in that.
var heard atomic.Pointer[func(azlog.Event, string)]

func TestMain(m *testing.M) {
	_, err := keyvault.Open(context.Background(), keyvault.Config{
		URL: "https://acme.vault.azure.net/", Logger: slog.New(slog.DiscardHandler),
		Credential: func() (azcore.TokenCredential, error) { return nil, errors.New("none here") },
	})
	if err == nil {
		panic("a vault without a credential is open")
	}
	azlog.SetEvents() // all of them
	azlog.SetListener(func(event azlog.Event, line string) {
		if listener := heard.Load(); listener != nil {
			(*listener)(event, line)
		}
	})
	goleak.VerifyTestMain(m)
}

// canary is in every value, so that no error may have it.
const canary = "canary-5f0c"

// start runs a vault without limits in which nothing takes time.
func start(t *testing.T) *keyvaultfake.Fake {
	t.Helper()
	f, err := keyvaultfake.Start(keyvaultfake.Config{Transitions: &keyvaultfake.Transitions{}, Limits: &keyvaultfake.Limits{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// config leads to f as its principal p. Retries come soon.
func config(t *testing.T, f *keyvaultfake.Fake, p keyvaultfake.Principal) direct.Config {
	t.Helper()
	transport := f.Transport()
	t.Cleanup(transport.CloseIdleConnections)
	credential, err := azidentity.NewClientSecretCredential(p.TenantID, p.ClientID, p.ClientSecret, &azidentity.ClientSecretCredentialOptions{
		ClientOptions: azcore.ClientOptions{Transport: &http.Client{Transport: transport}, Retry: policy.RetryOptions{MaxRetries: -1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return direct.Config{Credential: credential, Transport: transport, Retry: policy.RetryOptions{RetryDelay: time.Millisecond}}
}

func open(t *testing.T, f *keyvaultfake.Fake, cfg direct.Config) *direct.Vault {
	t.Helper()
	v, err := direct.New(f.URL(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = v.Close() })
	return v
}

func keyOf(t *testing.T, name string) secret.Key {
	t.Helper()
	key, err := secret.ParseKey(name)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// wantReason checks that err is a *client.Error of this reason and tells no value.
func wantReason(t *testing.T, what string, err error, want secret.Reason) *client.Error {
	t.Helper()
	e, ok := errors.AsType[*client.Error](err)
	if !ok || e.Reason != want {
		t.Fatalf("%s: got %v, want %s", what, err, want)
	}
	noCanary(t, what, err)
	return e
}

// on gives a fault to every request of op.
func on(f *keyvaultfake.Fake, op keyvaultfake.Op, fault keyvaultfake.Fault) {
	f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op == op {
			return fault
		}
		return keyvaultfake.Fault{}
	})
}

func count(f *keyvaultfake.Fake, op keyvaultfake.Op) int {
	n := 0
	for _, r := range f.Journal() {
		if r.Op == op && !r.Challenge {
			n++
		}
	}
	return n
}

// await waits until the source holds what is wanted.
func await(t *testing.T, s *client.Source, what string, so func(client.Held) bool) client.Held {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for tick := time.NewTicker(5 * time.Millisecond); ; {
		if held := s.Value(); so(held) {
			tick.Stop()
			return held
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("not within 30 s: %s; got %+v", what, s.Value())
		}
	}
}
