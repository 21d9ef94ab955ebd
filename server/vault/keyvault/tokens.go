package keyvault

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/exto/secrets-broker/internal/keyvaultwire"
	"github.com/exto/secrets-broker/server/vault"
)

const (
	// tokenTimeout bounds one request for a token. Alone, the managed identity's
	// credential would go on for over a minute.
	tokenTimeout = 10 * time.Second
	// refreshAhead is when a token is renewed before its end, unless the token
	// service names a time. The SDK's own cache gives the old one until then.
	refreshAhead = 5 * time.Minute
	// retryToken is the least time between two requests for a token: of those that
	// are needed, and of renewals.
	retryToken = 500 * time.Millisecond
	// waitAfterError is how long a caller waits for a token when the last try to get
	// one failed.
	waitAfterError = time.Second
	retryRefresh   = 30 * time.Second
)

// tokens is a credential that has its token ready. It asks for one in the
// background, so that nobody waits in the SDK for the token service, where he
// would wait beyond his own deadline: those that need a new token wait in ready.
type tokens struct {
	running    context.Context
	credential func() (azcore.TokenCredential, error)
	log        *slog.Logger
	fetches    sync.WaitGroup

	mu       sync.Mutex
	inner    azcore.TokenCredential
	options  policy.TokenRequestOptions // the vault's challenge; no scope before it. With the claims that the next token needs
	token    azcore.AccessToken
	fetching *fetch
	lastTry  time.Time
	lastErr  error
	rejected time.Time // when the vault last refused a token
	warned   time.Time // when the log last said that there is none

	started atomic.Bool // the broker runs
}

var _ azcore.TokenCredential = (*tokens)(nil)

// fetch is a request for a token under way.
type fetch struct {
	done chan struct{}
	err  error
}

func newTokens(running context.Context, credential func() (azcore.TokenCredential, error), log *slog.Logger) *tokens {
	return &tokens{running: running, credential: credential, log: log}
}

// wait blocks until no request for a token is under way.
func (t *tokens) wait() { t.fetches.Wait() }

// GetToken is what the SDK asks. It does not block: without a token it is
// errNoToken, or why there is none.
func (t *tokens) GetToken(_ context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	same := t.options.TenantID == o.TenantID && strings.Join(t.options.Scopes, " ") == strings.Join(o.Scopes, " ")
	if !same {
		t.token, t.fetching, t.lastErr = azcore.AccessToken{}, nil, nil
	}
	if o.Claims == "" && same {
		o.Claims = t.options.Claims
	}
	t.options = o
	token, f, err := t.current()
	if f != nil {
		err = errNoToken
	}
	return token, err
}

// known reports whether the vault said which token it wants.
func (t *tokens) known() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.options.Scopes) > 0
}

// ready blocks until there is a token, once it is known which. Before that the
// first request tells. While the token service is out it blocks for a second.
func (t *tokens) ready(ctx context.Context) error {
	if !t.known() {
		return nil
	}
	t.mu.Lock()
	_, f, err := t.current()
	last := t.lastErr
	t.mu.Unlock()
	if f == nil {
		return err
	}
	var enough <-chan time.Time
	if last != nil { // the try before failed: who waits long for the next one?
		timer := time.NewTimer(waitAfterError)
		defer timer.Stop()
		enough = timer.C
	}
	select {
	case <-f.done:
		return f.err
	case <-enough:
		return last
	case <-ctx.Done():
		return ctx.Err()
	}
}

// current is the token, or else the request for one that is under way, or else
// why there is neither. It has the token renewed when it is time. t.mu is held.
func (t *tokens) current() (azcore.AccessToken, *fetch, error) {
	now := time.Now()
	if now.Before(t.token.ExpiresOn) {
		if t.renewable(now) {
			t.begin(now)
		}
		return t.token, nil, nil
	}
	if t.fetching == nil {
		if t.lastErr != nil && now.Sub(t.lastTry) < retryToken {
			return azcore.AccessToken{}, nil, t.lastErr
		}
		t.begin(now)
	}
	return azcore.AccessToken{}, t.fetching, nil
}

// begin asks for a token in the background. t.mu is held.
func (t *tokens) begin(now time.Time) {
	f, o := &fetch{done: make(chan struct{})}, t.options
	t.fetching, t.lastTry = f, now
	t.fetches.Go(func() { t.fetch(f, o) })
}

// renewable reports whether the token is to be renewed now.
func (t *tokens) renewable(now time.Time) bool {
	at := t.token.RefreshOn
	if at.IsZero() {
		at = t.token.ExpiresOn.Add(-refreshAhead)
	}
	return !now.Before(at) && t.fetching == nil && now.Sub(t.lastTry) >= retryRefresh
}

func (t *tokens) fetch(f *fetch, o policy.TokenRequestOptions) {
	ctx, cancel := context.WithTimeout(t.running, tokenTimeout)
	defer cancel()
	t.mu.Lock()
	inner := t.inner
	t.mu.Unlock()
	var token azcore.AccessToken
	err := keyvaultwire.NoPanic(ctx, func(ctx context.Context) (err error) {
		if inner == nil {
			made, err := t.credential()
			if err != nil { // and made may be a pointer that is nil
				return &tokenError{vault.ErrRefused, keyvaultwire.OneLine(err)}
			}
			inner = made
		}
		token, err = inner.GetToken(ctx, o)
		return err
	})
	if err != nil {
		f.err = newTokenError(err)
		t.warn(f.err)
	}
	t.mu.Lock()
	if t.fetching == f { // nobody asked for another kind meanwhile
		t.fetching, t.lastErr, t.inner = nil, f.err, inner
		if f.err == nil {
			t.token = token
			if t.options.Claims == o.Claims {
				t.options.Claims = ""
			}
		}
	}
	t.mu.Unlock()
	close(f.done)
}

// warn logs that there is no token: not during the start, which says so itself, and
// once a minute while it lasts.
func (t *tokens) warn(err error) {
	if !t.started.Load() || t.running.Err() != nil {
		return
	}
	t.mu.Lock()
	now := time.Now()
	due := now.Sub(t.warned) >= time.Minute
	if due {
		t.warned = now
	}
	t.mu.Unlock()
	if due {
		t.log.Warn("no token for the vault", "error", err)
	}
}

// reject drops a token that the vault refused. The credential goes too: it
// would give the same token again until that expires. A vault that refuses one
// token after the other does not make the broker ask for as many.
func (t *tokens) reject(bearer string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if bearer != "Bearer "+t.token.Token {
		return
	}
	now := time.Now()
	if now.Sub(t.rejected) < retryToken {
		t.lastErr, t.lastTry = &tokenError{vault.ErrRefused, "the vault refuses new tokens"}, now
	}
	t.token, t.inner, t.rejected = azcore.AccessToken{}, nil, now
}

// tokenError is why there is no token: vault.ErrRefused or vault.ErrUnavailable,
// and the token service's words for the log.
type tokenError struct {
	kind error
	text string
}

func (e *tokenError) Error() string { return e.kind.Error() + ": " + e.text }
func (e *tokenError) Unwrap() error { return e.kind }

// newTokenError tells a token service that cannot be reached from one that
// refuses the credential, and both from there being no credential.
func newTokenError(err error) error {
	var known *tokenError
	if errors.As(err, &known) {
		return known
	}
	text := keyvaultwire.OneLine(err)
	var failed *azidentity.AuthenticationFailedError
	var answer *http.Response
	asked := errors.As(err, &failed)
	if asked {
		answer = failed.RawResponse
	}
	if !keyvaultwire.Refuses(err, asked, answer) {
		return &tokenError{vault.ErrUnavailable, text}
	}
	switch {
	case strings.Contains(err.Error(), keyvaultwire.WrongTenant):
		text = "AZURE_TENANT_ID is not the tenant of the vault: " + text
	case !asked:
		text = "no credential: " + text
	}
	return &tokenError{vault.ErrRefused, text}
}
