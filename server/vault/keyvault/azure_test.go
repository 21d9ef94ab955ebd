package keyvault_test

import (
	"context"
	"errors"
	"flag"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/internal/keyvaultwire"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/keyvault"
	"github.com/exto/secrets-broker/server/vault/vaulttest"
)

// askedFor is how "make test-azure" asks for TestAzure. Nothing else runs it: it
// leaves names in a vault.
const askedFor = "^TestAzure$"

// TestAzure holds a real vault against the suite, as whom DefaultAzureCredential
// finds, and deletes what it made.
func TestAzure(t *testing.T) {
	url := os.Getenv("AZURE_KEY_VAULT_URL")
	if flag.Lookup("test.run").Value.String() != askedFor || os.Getenv("SECRET_STORE_PROVIDER") != "azure-keyvault" || url == "" {
		t.Skip("needs a real vault: set SECRET_STORE_PROVIDER=azure-keyvault and AZURE_KEY_VAULT_URL, then make test-azure")
	}
	// Tests that run at the same time share the vault's limits.
	share, err := strconv.ParseFloat(flag.Lookup("test.parallel").Value.String(), 64)
	if err != nil {
		t.Fatal(err)
	}
	var made names
	open := func(t *testing.T) vault.Vault {
		credential := keyvaultwire.NewTransport()
		t.Cleanup(credential.CloseIdleConnections)
		v, err := keyvault.Open(t.Context(), keyvault.Config{
			URL:             url,
			ReadsPerSecond:  perSecond(t, "BROKER_VAULT_READS_PER_SECOND", keyvault.DefaultReadsPerSecond) / share,
			WritesPerSecond: perSecond(t, "BROKER_VAULT_WRITES_PER_SECOND", keyvault.DefaultWritesPerSecond) / share,
			Logger:          quiet,
			Credential: func() (azcore.TokenCredential, error) {
				return azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{
					ClientOptions: azcore.ClientOptions{Transport: &http.Client{Transport: credential}},
				})
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Check(t.Context()); err != nil {
			_ = v.Close()
			t.Fatalf("the vault cannot be used now: %v", err)
		}
		return remembering{v, &made}
	}
	t.Run("Suite", func(t *testing.T) { vaulttest.Run(t, open) })

	v := open(t)
	t.Cleanup(func() { _ = v.Close() })
	var left []string
	var until time.Time
	for _, key := range made.all() {
		d, err := tidy(t.Context(), v, key)
		switch {
		case errors.Is(err, vault.ErrNotFound): // it was never stored
		case err != nil:
			t.Errorf("%s is left in the vault: %v; delete it with az keyvault secret delete", key, err)
		default:
			left = append(left, key.String())
			if d.PurgeAt.After(until) {
				until = d.PurgeAt
			}
		}
	}
	t.Logf("%d deleted secrets are left in the vault until its retention ends (%s), since the broker's role does not let it purge them: %s",
		len(left), until.Format(time.RFC3339), strings.Join(left, " "))
}

// perSecond is a budget as the broker's own setting has it.
func perSecond(t *testing.T, name string, otherwise float64) float64 {
	t.Helper()
	set := os.Getenv(name)
	if set == "" {
		return otherwise
	}
	n, err := strconv.ParseFloat(set, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// tidy deletes a name and gives what is left of it. States between take up to a
// minute, the vault's bad moments longer.
func tidy(ctx context.Context, v vault.Vault, key secret.Key) (vault.Deleted, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	for {
		d, err := v.Delete(ctx, key)
		switch {
		case errors.Is(err, vault.ErrNotFound):
			if err := v.Settle(ctx, key); err != nil {
				return d, err
			}
			if d, err = v.GetDeleted(ctx, key); !errors.Is(err, vault.ErrNotFound) {
				return d, err
			}
			// It is live: a recover came to its end meanwhile.
		case err == nil, !errors.Is(err, vault.ErrThrottled) && !errors.Is(err, vault.ErrUnavailable):
			return d, err
		}
		if err := vault.Wait(ctx, max(time.Second, vault.RetryAfter(err))); err != nil {
			return d, err
		}
	}
}

// names are those of the secrets that were made.
type names struct {
	mu   sync.Mutex
	keys map[secret.Key]bool
}

func (n *names) add(key secret.Key) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.keys == nil {
		n.keys = map[secret.Key]bool{}
	}
	n.keys[key] = true
}

func (n *names) all() (keys []secret.Key) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for key := range n.keys {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b secret.Key) int { return strings.Compare(a.String(), b.String()) })
	return keys
}

// remembering is a vault that keeps the names of what is stored in it.
type remembering struct {
	vault.Vault
	made *names
}

func (r remembering) Set(ctx context.Context, key secret.Key, v vault.NewVersion) (vault.Properties, error) {
	r.made.add(key)
	return r.Vault.Set(ctx, key, v)
}

// TestAzureOnAFake runs TestAzure as "make test-azure" does, in a process of its
// own that takes a fake for Azure.
func TestAzureOnAFake(t *testing.T) {
	t.Parallel()
	f, err := keyvaultfake.Start(atOnce())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, f.CAPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	f.PersonSet("instance-of-somebody", "x", nil)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run", askedFor, "-test.v")
	cmd.Env = slices.Concat(f.Env(), f.Broker().Env(), []string{
		"SSL_CERT_FILE=" + ca,
		"BROKER_VAULT_READS_PER_SECOND=100000",
		"BROKER_VAULT_WRITES_PER_SECOND=100000",
		"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "TMPDIR=" + t.TempDir(),
	})
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"--- PASS: TestAzure/Suite/SetAndGet", "--- PASS: TestAzure/Suite/Recover", "deleted secrets are left in the vault until"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("got no %q in\n%s", want, out)
		}
	}
	made := 0
	for _, r := range f.Journal() {
		if r.Op == keyvaultfake.OpSet && r.Status == http.StatusOK {
			made++
			if state := f.State(r.Name); state != keyvaultfake.Deleted {
				t.Errorf("%s is %s, want it deleted", r.Name, state)
			}
			if !strings.Contains(string(out), r.Name) {
				t.Errorf("%s is left, and nothing says so", r.Name)
			}
		}
	}
	if made == 0 {
		t.Error("nothing was stored")
	}
	if state := f.State("instance-of-somebody"); state != keyvaultfake.Live {
		t.Errorf("somebody else's secret is %s, want it live", state)
	}
	if refused := f.Refused(); len(refused) > 0 {
		t.Errorf("got connections to %v, want none", refused)
	}
}
