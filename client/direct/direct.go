// Package direct reads secrets from Azure Key Vault itself, for instances that have
// nothing but their managed identity. A Vault is a client.Getter, so that Sources and
// Instances work over it as they do over a client.Client:
//
//	vault, err := direct.New("https://NAME.vault.azure.net/", direct.Config{})
//	instance, err := client.NewInstance(ctx, vault, id, client.InstanceOptions{})
//
// Where there is a broker that the program can reach, read from the broker: it answers
// from memory, tells of changes at once, records who read what, and needs one role
// assignment for all instances instead of three for each.
//
// # What is the same, and what is not
//
// Answers and errors are those of a client.Client: a secret that the broker has marked
// as deleted is client.ErrNotFound although the vault still holds it, a version past
// its grace is client.ErrVersionExpired, and so on. All answers are client.Live, so
// that each meets any MaxStaleness. But
//
//   - there is nothing to watch: a change is seen at the next read;
//   - a version that the vault committed late may be read until the broker puts it
//     down;
//   - whether a grace is over is judged by this machine's clock;
//   - there is no audit record but the vault's own log;
//   - client.ErrVaultRefused says that the vault refuses this program, or that there is
//     no credential: what the message says is for whoever grants roles.
//
// # What it costs the vault
//
// Each Get is one request, with KnownVersion too: Key Vault has no conditional read. A
// Get of another version than the current one, or of a disabled secret, lists the
// versions as well, 25 in a request. A failed request is sent again by Config.Retry.
//
// A vault takes 400 reads a second from all who use it. 1,000 instances that hold three
// secrets each and read them every 30 s, which is the default of
// client.SourceOptions.Interval, ask 100 times a second. An Interval of 5 minutes, as
// long as a rotation's grace is longer, makes that 10: recommended from some hundred
// instances on. client.Source.Unauthorized reads at once, whatever the Interval is, so
// that a value that is refused does not stay for so long.
package direct

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"
	"google.golang.org/grpc/codes"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/internal/keyvaultwire"
	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
)

const (
	// readTimeout is what a Get whose context has no deadline gets, as with a
	// client.Client.
	readTimeout = 30 * time.Second
	// Bounds of one request, and of the pause before the next: Key Vault counts its
	// limits over 10 s.
	tryTimeout    = 10 * time.Second
	maxRetryDelay = 10 * time.Second
	// looks is how often a secret is looked at that changes meanwhile.
	looks = 4
)

// Config says how a Vault is reached. The zero value is good for most.
type Config struct {
	// Credential is who the program is to the vault. Nil: what
	// azidentity.DefaultAzureCredential finds, such as a managed identity.
	Credential azcore.TokenCredential
	// Transport carries the requests to the vault. Nil: one that honours HTTPS_PROXY
	// and trusts the system's certificates. No redirect is followed.
	Transport *http.Transport
	// Retry is how often and after which pauses a request is sent again that was not
	// answered, or with 408, 429 or 5xx, within the context of the Get. The zero value
	// of each field is the SDK's own, 3 retries after about 1, 2 and 6 s, but for
	// TryTimeout and MaxRetryDelay, which are 10 s. A Retry-After beyond MaxRetryDelay
	// ends it: the error has it as RetryAfter.
	Retry policy.RetryOptions
}

// Vault reads secrets from one Key Vault. It is made by New. All methods are safe for
// concurrent use; one Vault serves a whole program.
type Vault struct {
	client *azsecrets.Client
	own    *http.Transport // nil if it is the caller's
	now    func() time.Time
}

var _ client.Getter = (*Vault)(nil)

// New makes a Vault of https://NAME.vault.azure.net/ or of a host of another Azure
// cloud's vaults; other URLs are refused, since the host is where tokens go. It asks
// nothing yet: the first Get does.
func New(vaultURL string, cfg Config) (*Vault, error) {
	url, _, err := keyvaultwire.ParseURL(vaultURL)
	if err != nil {
		return nil, fmt.Errorf("key vault: %w", err)
	}
	if cfg.Credential == nil {
		// Few retries: those of the request come on top.
		cfg.Credential, err = azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{
			ClientOptions: azcore.ClientOptions{Retry: policy.RetryOptions{MaxRetries: 1}},
		})
		if err != nil {
			return nil, fmt.Errorf("key vault: no credential: %s", keyvaultwire.OneLine(err))
		}
	}
	if cfg.Retry.TryTimeout == 0 {
		cfg.Retry.TryTimeout = tryTimeout
	}
	if cfg.Retry.MaxRetryDelay == 0 {
		cfg.Retry.MaxRetryDelay = maxRetryDelay
	}
	v := &Vault{now: time.Now}
	if cfg.Transport == nil {
		v.own = keyvaultwire.NewTransport()
		cfg.Transport = v.own
	}
	// Logging is left as it is, without bodies.
	v.client, err = azsecrets.NewClient(url, credential{cfg.Credential}, &azsecrets.ClientOptions{ClientOptions: azcore.ClientOptions{
		Transport:        &http.Client{Transport: cfg.Transport, CheckRedirect: keyvaultwire.NoRedirect},
		Retry:            cfg.Retry,
		PerCallPolicies:  []policy.Policy{policyFunc(stay(url))},
		PerRetryPolicies: []policy.Policy{policyFunc(witness)}, // after the SDK's own authorization
	}})
	if err != nil {
		return nil, fmt.Errorf("key vault: %s", keyvaultwire.OneLine(err))
	}
	return v, nil
}

// Close ends the connections that no Get uses. Sources end with their contexts.
func (v *Vault) Close() error {
	if v.own != nil {
		v.own.CloseIdleConnections()
	}
	return nil
}

// Get reads a value from the vault. It blocks until it is answered, its retries are
// used up or ctx ends, after 30 s if that has no deadline.
//
// Errors, all of them *client.Error: those of client.Client.Get, and
// client.ErrKeyMismatch and client.ErrVaultRefused.
func (v *Vault) Get(ctx context.Context, key secret.Key, o client.GetOptions) (client.GetResult, error) {
	switch {
	case key == (secret.Key{}):
		return client.GetResult{}, refuse(codes.InvalidArgument, secret.InvalidRequest, "a key is required")
	case o.Version != "" && o.MinGeneration != 0:
		return client.GetResult{}, refuse(codes.InvalidArgument, secret.InvalidRequest, "Version and MinGeneration exclude each other: set one of them")
	case o.MinGeneration < 0 || o.MaxStaleness != nil && *o.MaxStaleness < 0:
		return client.GetResult{}, refuse(codes.InvalidArgument, secret.InvalidRequest, "MinGeneration and MaxStaleness are not negative")
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, readTimeout)
		defer cancel()
	}
	for range looks {
		result, err := v.look(ctx, key, o)
		if !errors.Is(err, errChanged) {
			return result, err
		}
	}
	return client.GetResult{}, refuse(codes.Unavailable, secret.VaultUnavailable, "the secret was changed in the vault meanwhile; try again")
}

// errChanged: a secret was changed between two requests about it.
var errChanged = errors.New("direct: changed meanwhile")

// look is Get, as far as the secret stays as it is.
func (v *Vault) look(ctx context.Context, key secret.Key, o client.GetOptions) (client.GetResult, error) {
	now, err := v.current(ctx, key)
	if err != nil {
		return client.GetResult{}, err
	}
	version := now.version
	switch {
	case version.Copied():
		return client.GetResult{}, refuse(codes.FailedPrecondition, secret.KeyMismatch, "the vault's tag on this secret names another key; it was copied by hand, and has to be set anew or its tags removed")
	case version.Generation > 0 && version.Generation < o.MinGeneration:
		return client.GetResult{}, refuse(codes.Unavailable, secret.StalenessUnsatisfiable, fmt.Sprintf("the vault holds generation %d, which is below MinGeneration %d", version.Generation, o.MinGeneration))
	case o.Version != "" && o.Version != version.Version:
		return v.older(ctx, now, o.Version)
	case !version.Enabled:
		return client.GetResult{}, refuse(codes.FailedPrecondition, secret.SecretDisabled, disabledText)
	}
	result := now.result(version, time.Time{})
	if o.KnownVersion != "" && o.KnownVersion == version.Version {
		result.Value, result.NotModified = secret.Value{}, true
	}
	return result, nil
}

const disabledText = "somebody disabled this secret in the vault; have it enabled there"

// reading is what was read of a secret: its current version, with the value unless it
// is disabled.
type reading struct {
	version versions.Version
	value   secret.Value
	asOf    time.Time     // when the vault was asked
	all     versions.List // nil until it was needed
}

func (r reading) result(v versions.Version, expires time.Time) client.GetResult {
	return client.GetResult{
		Metadata: client.Metadata{
			Key:        v.Key,
			Version:    v.Version,
			Generation: v.Generation,
			State:      client.Active,
			CreateTime: v.Created,
			ExpireTime: expires,
			CreatedBy:  v.CreatedBy,
		},
		Value:  r.value,
		AsOf:   r.asOf,
		Source: client.Live,
	}
}

// current reads the current version. A disabled one is no error, unless the broker
// has marked it as deleted.
func (v *Vault) current(ctx context.Context, key secret.Key) (reading, error) {
	now, err := v.get(ctx, key, "")
	if !errors.Is(err, client.ErrDisabled) {
		return now, err
	}
	// The vault says no more than that. The list has the tags.
	switch listErr := v.list(ctx, key, &now); {
	case errors.Is(listErr, client.ErrVaultRefused): // who may get, but not list
		return reading{}, err
	case listErr != nil:
		return reading{}, listErr
	case now.version.Enabled: // a late version lies over it that was put down already
		below, err := v.get(ctx, key, now.version.Version)
		now.value = below.value
		return now, changed(err)
	case now.version.Marked():
		return reading{}, refuse(codes.NotFound, secret.SecretNotFound, notFoundText)
	}
	return now, nil
}

// older reads another version than the current one, as the list judges it.
func (v *Vault) older(ctx context.Context, now reading, id string) (client.GetResult, error) {
	key := now.version.Key
	if err := v.list(ctx, key, &now); err != nil {
		return client.GetResult{}, err
	}
	at := now.all.Index(id)
	if at < 0 {
		return client.GetResult{}, refuse(codes.NotFound, secret.VersionNotFound, "the secret has no such version")
	}
	version := now.all[at]
	var expires time.Time
	if at > 0 { // the first is the current one
		expires = now.all.Expiry(version, now.asOf)
	}
	switch {
	case !now.all.Served(version):
		return client.GetResult{}, refuse(codes.FailedPrecondition, secret.VersionExpired, "this version is from before the secret was deleted and overwritten; read the current one")
	case !expires.IsZero() && !v.now().Before(expires):
		return client.GetResult{}, refuse(codes.FailedPrecondition, secret.VersionExpired, "this version was replaced by a rotation and its grace is over; read the current one")
	case !version.Enabled:
		return client.GetResult{}, refuse(codes.FailedPrecondition, secret.SecretDisabled, "this version is disabled in the vault; read the current one")
	}
	then, err := v.get(ctx, key, id)
	if err != nil {
		return client.GetResult{}, changed(err)
	}
	now.value = then.value
	return now.result(version, expires), nil
}
