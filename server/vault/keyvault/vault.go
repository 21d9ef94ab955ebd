// Package keyvault is Azure Key Vault as a vault: secrets with versions and tags,
// asked over azsecrets with whatever DefaultAzureCredential finds.
//
// What the service and the SDK do differently from what one expects, and what
// this package makes of it:
//
//   - The SDK repeats any method whose answer was lost, and the vault would store
//     a value twice. Nothing is repeated here but reads and refusals.
//   - For 10 to 60 s after a delete, a recover or a purge, a name is found neither
//     live nor deleted, and then refused with 409. That is waited out.
//   - A goroutine that waits in the SDK for another's token waits beyond its own
//     deadline. Tokens are fetched in the background (tokens.go).
//   - The vault has a limit of requests. A budget stands before it (budget.go).
package keyvault

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"
	"golang.org/x/sync/singleflight"

	"github.com/exto/secrets-broker/internal/keyvaultwire"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// The share of a vault's limits that is used by default: of 400 requests and 30
// new versions a second, counted over 10 s.
// https://learn.microsoft.com/azure/key-vault/general/service-limits
const (
	DefaultReadsPerSecond  = 320
	DefaultWritesPerSecond = 24
)

// Config says which vault, and how much of it.
type Config struct {
	// URL is the vault's, such as https://NAME.vault.azure.net/. Required.
	URL string
	// ReadsPerSecond and WritesPerSecond are how many requests a second may be
	// sent on average, and a quarter more at once; everything that changes
	// something counts as a write. Zero means the defaults.
	ReadsPerSecond, WritesPerSecond float64
	// Logger takes what no caller is told. Required.
	Logger *slog.Logger

	// Credential makes what tokens are asked of; it is called again when the vault
	// refuses a token that has yet to expire. nil means DefaultAzureCredential.
	Credential func() (azcore.TokenCredential, error)
	// Transport carries the requests to the vault; nil means one that honours
	// HTTPS_PROXY and the system's certificates.
	Transport *http.Transport
	// RequestTimeout bounds each single request; zero means 10 s.
	RequestTimeout time.Duration
	// Now is the wall clock, and Wait lets time pass until ctx ends; nil means the
	// system's.
	Now  func() time.Time
	Wait func(ctx context.Context, d time.Duration) error
}

// Vault implements vault.Vault on Azure Key Vault.
type Vault struct {
	cfg    Config
	url    string
	name   string
	client *azsecrets.Client
	http   *http.Transport
	tokens *tokens
	reads  *budget
	writes *budget
	log    *slog.Logger

	warm      atomic.Bool // the challenge was answered once
	handshake singleflight.Group
	state     atomic.Pointer[condition]
	wake      chan struct{}

	closed  atomic.Bool
	running context.Context
	stop    context.CancelFunc
	ended   sync.WaitGroup

	mu sync.Mutex
	// gone holds what was deleted here and is not visible among the deleted yet.
	gone map[secret.Key]vanished
}

var _ vault.Vault = (*Vault)(nil)

// Open makes a Vault and asks it once, so that no caller waits for the first
// token. It fails when waiting would not help: for a wrong URL, no such vault, no
// credential or no permission, with an error that says what to do. A vault that
// cannot be reached now is no error: it is asked until it answers.
func Open(ctx context.Context, cfg Config) (*Vault, error) {
	url, name, err := keyvaultwire.ParseURL(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("AZURE_KEY_VAULT_URL (--azure-key-vault-url): %w", err)
	}
	if cfg.ReadsPerSecond == 0 {
		cfg.ReadsPerSecond = DefaultReadsPerSecond
	}
	if cfg.WritesPerSecond == 0 {
		cfg.WritesPerSecond = DefaultWritesPerSecond
	}
	if cfg.RequestTimeout == 0 {
		cfg.RequestTimeout = 10 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Wait == nil {
		cfg.Wait = vault.Wait
	}
	if cfg.Transport == nil {
		cfg.Transport = keyvaultwire.NewTransport()
	}
	if cfg.Credential == nil {
		cfg.Credential = func() (azcore.TokenCredential, error) {
			// Few retries: who waits for the token is told, and the next one asks again.
			return azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{
				ClientOptions: azcore.ClientOptions{Retry: policy.RetryOptions{MaxRetries: 1}},
			})
		}
	}
	v := &Vault{
		cfg:    cfg,
		url:    url,
		name:   name,
		http:   cfg.Transport,
		reads:  newBudget(cfg.ReadsPerSecond),
		writes: newBudget(cfg.WritesPerSecond),
		log:    cfg.Logger,
		wake:   make(chan struct{}, 1),
		gone:   map[secret.Key]vanished{},
	}
	v.running, v.stop = context.WithCancel(context.Background())
	v.tokens = newTokens(v.running, cfg.Credential, cfg.Logger)
	quietSDK()
	v.client, err = azsecrets.NewClient(url, v.tokens, &azsecrets.ClientOptions{ClientOptions: azcore.ClientOptions{
		Transport:        &http.Client{Transport: v.http, CheckRedirect: keyvaultwire.NoRedirect},
		Retry:            policy.RetryOptions{MaxRetries: -1}, // one try
		PerCallPolicies:  []policy.Policy{policyFunc(addQuery)},
		PerRetryPolicies: []policy.Policy{policyFunc(v.transmit)}, // after the SDK's own authorization
	}})
	if err != nil {
		v.stop()
		return nil, err
	}
	if err := v.begin(ctx); err != nil {
		_ = v.Close()
		return nil, err
	}
	v.tokens.started.Store(true)
	v.ended.Go(v.watch)
	return v, nil
}

// Info names the vault by its URL.
func (v *Vault) Info() vault.Info {
	return vault.Info{Name: "azure key vault", Location: slog.String("vault", v.url)}
}

// Close ends the background work. Calls under way end with their contexts.
func (v *Vault) Close() error {
	v.closed.Store(true)
	v.stop()
	v.ended.Wait()
	v.tokens.wait()
	v.http.CloseIdleConnections()
	return nil
}

// Set stores a new version.
func (v *Vault) Set(ctx context.Context, key secret.Key, nv vault.NewVersion) (vault.Properties, error) {
	if err := nv.Tags.Check(); err != nil {
		return vault.Properties{}, err
	}
	value, enabled := nv.Value.Reveal(), true
	params := azsecrets.SetSecretParameters{
		Value:            &value,
		Tags:             pointers(nv.Tags),
		SecretAttributes: &azsecrets.SecretAttributes{Enabled: &enabled},
	}
	if nv.ContentType != "" {
		params.ContentType = &nv.ContentType
	}
	var p vault.Properties
	set := func(ctx context.Context) error {
		resp, err := v.client.SetSecret(ctx, key.String(), params, nil)
		if err == nil {
			p, err = properties(key, resp.ID, resp.Attributes, resp.ContentType, resp.Tags)
		}
		return err
	}
	var err error
	if nv.First {
		// A name that is being recovered must not get it as one more version.
		err = v.do(ctx, &call{op: "Set", change: true}, set)
	} else {
		err = v.change(ctx, key, "Set", set)
	}
	if err == nil {
		v.seenLive(key)
	}
	var c *conflictError
	if errors.As(err, &c) {
		// Being deleted, or deleted: Settle tells when it can be recovered.
		err = fmt.Errorf("%w: %w", vault.ErrDeleted, err)
	}
	return orZero(p, err)
}

// Get reads one version; the empty one is the current.
func (v *Vault) Get(ctx context.Context, key secret.Key, version string) (vault.Properties, secret.Value, error) {
	var (
		p     vault.Properties
		value secret.Value
	)
	if version != "" && !isVersion(version) {
		return p, value, fmt.Errorf("%w: no version looks like this", vault.ErrNotFound)
	}
	err := v.read(ctx, "Get", func(ctx context.Context) error {
		resp, err := v.client.GetSecret(ctx, key.String(), version, nil)
		if err != nil {
			return err
		}
		if resp.Value != nil {
			value = secret.NewValue(*resp.Value)
		}
		p, err = properties(key, resp.ID, resp.Attributes, resp.ContentType, resp.Tags)
		return err
	})
	if err == nil || errors.Is(err, vault.ErrDisabled) {
		v.seenLive(key)
	}
	if err != nil {
		return vault.Properties{}, secret.Value{}, err
	}
	return p, value, nil
}

// Update sets the attributes and replaces the tags of one version.
func (v *Vault) Update(ctx context.Context, key secret.Key, version string, patch vault.Patch) (vault.Properties, error) {
	if err := patch.Tags.Check(); err != nil {
		return vault.Properties{}, err
	}
	if !isVersion(version) {
		return vault.Properties{}, fmt.Errorf("%w: no version looks like this", vault.ErrNotFound)
	}
	tags := pointers(patch.Tags)
	if tags == nil {
		tags = map[string]*string{} // absent would leave them as they are
	}
	params := azsecrets.UpdateSecretPropertiesParameters{
		SecretAttributes: &azsecrets.SecretAttributes{Enabled: &patch.Enabled},
		Tags:             tags,
	}
	var p vault.Properties
	err := v.change(ctx, key, "Update", func(ctx context.Context) error {
		resp, err := v.client.UpdateSecretProperties(ctx, key.String(), version, params, nil)
		if err == nil {
			p, err = properties(key, resp.ID, resp.Attributes, resp.ContentType, resp.Tags)
		}
		return err
	})
	if err == nil {
		v.seenLive(key)
	}
	return orZero(p, absentIfGone(err))
}

// Delete soft-deletes the name. It does not wait until the vault shows it among
// the deleted; GetDeleted answers from memory until then.
func (v *Vault) Delete(ctx context.Context, key secret.Key) (vault.Deleted, error) {
	var d vault.Deleted
	err := v.change(ctx, key, "Delete", func(ctx context.Context) error {
		resp, err := v.client.DeleteSecret(ctx, key.String(), nil)
		if err == nil {
			d, err = deleted(key, resp.ID, resp.Attributes, resp.ContentType, resp.Tags, resp.DeletedDate, resp.ScheduledPurgeDate)
		}
		return err
	})
	if err == nil {
		v.vanish(key, d)
	}
	return orZero(d, absentIfGone(err))
}

// GetDeleted reads what is left of a deleted name.
func (v *Vault) GetDeleted(ctx context.Context, key secret.Key) (vault.Deleted, error) {
	d, err := v.getDeleted(ctx, key)
	if errors.Is(err, vault.ErrNotFound) {
		if d, ok := v.vanished(key); ok {
			return d, nil
		}
	}
	return d, err
}

func (v *Vault) getDeleted(ctx context.Context, key secret.Key) (vault.Deleted, error) {
	var d vault.Deleted
	err := v.read(ctx, "GetDeleted", func(ctx context.Context) error {
		resp, err := v.client.GetDeletedSecret(ctx, key.String(), nil)
		if err == nil {
			d, err = deleted(key, resp.ID, resp.Attributes, resp.ContentType, resp.Tags, resp.DeletedDate, resp.ScheduledPurgeDate)
		}
		return err
	})
	return orZero(d, err)
}

// absentIfGone: what is being deleted is gone for who wanted to change it.
func absentIfGone(err error) error {
	var c *conflictError
	if errors.As(err, &c) {
		return fmt.Errorf("%w: %w", vault.ErrNotFound, err)
	}
	return err
}

func deleted(key secret.Key, id *azsecrets.ID, a *azsecrets.SecretAttributes, contentType *string, tags map[string]*string, at, purge *time.Time) (vault.Deleted, error) {
	p, err := properties(key, id, a, contentType, tags)
	d := vault.Deleted{Properties: p}
	if at != nil {
		d.DeletedAt = at.UTC()
	}
	if purge != nil {
		d.PurgeAt = purge.UTC()
	}
	return d, err
}

func pointers(t vault.Tags) map[string]*string {
	if t == nil {
		return nil
	}
	p := make(map[string]*string, len(t))
	for name, value := range t {
		p[name] = &value
	}
	return p
}

// isVersion keeps what a caller named from becoming a part of a path.
func isVersion(s string) bool {
	if s == "" || len(s) > 32 {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z') {
			return false
		}
	}
	return true
}

// orZero gives no result beside an error.
func orZero[T any](result T, err error) (T, error) {
	if err != nil {
		var zero T
		return zero, err
	}
	return result, nil
}
