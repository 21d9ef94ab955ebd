package keyvault

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/exto/secrets-broker/server/vault"
)

const (
	// tokenTimeout bounds one request for a token. Alone, the managed identity's
	// credential would go on for over a minute.
	tokenTimeout = 30 * time.Second
	// refreshAhead is when a token is renewed before its end, unless the token
	// service names a time. The SDK's own cache gives the old one until then.
	refreshAhead = 5 * time.Minute
	// retryToken is the least time between two requests for a token: of those that
	// are needed, and of renewals.
	retryToken   = 500 * time.Millisecond
	retryRefresh = 30 * time.Second
)

// tokens is a credential that has its token ready. It asks for one in the
// background, so that nobody who waits in the SDK waits for the token service,
// and nobody beyond his own deadline.
type tokens struct {
	running    context.Context
	credential func() (azcore.TokenCredential, error)
	log        *slog.Logger
	fetches    sync.WaitGroup

	mu       sync.Mutex
	inner    azcore.TokenCredential
	options  policy.TokenRequestOptions // the vault's challenge; no scope before it
	token    azcore.AccessToken
	fetching *fetch
	lastTry  time.Time
	lastErr  error
}

var _ azcore.TokenCredential = (*tokens)(nil)

// fetch is a request for a token under way.
type fetch struct {
	done  chan struct{}
	token azcore.AccessToken
	err   error
}

func newTokens(running context.Context, credential func() (azcore.TokenCredential, error), log *slog.Logger) *tokens {
	return &tokens{running: running, credential: credential, log: log}
}

// wait blocks until no request for a token is under way.
func (t *tokens) wait() { t.fetches.Wait() }

// GetToken is what the SDK asks. It blocks only when there is no token, and not
// beyond ctx.
func (t *tokens) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	t.mu.Lock()
	if claims := o.Claims; claims != "" {
		t.token = azcore.AccessToken{} // the vault wants one with these claims
	}
	same := t.options.TenantID == o.TenantID && strings.Join(t.options.Scopes, " ") == strings.Join(o.Scopes, " ")
	if !same {
		t.token, t.fetching, t.lastErr = azcore.AccessToken{}, nil, nil
	}
	t.options = o
	t.options.Claims = ""
	t.mu.Unlock()
	return t.get(ctx, o.Claims)
}

// ready blocks until there is a token, once it is known which. Before that the
// first request tells.
func (t *tokens) ready(ctx context.Context) error {
	t.mu.Lock()
	known := len(t.options.Scopes) > 0
	t.mu.Unlock()
	if !known {
		return nil
	}
	_, err := t.get(ctx, "")
	return err
}

func (t *tokens) get(ctx context.Context, claims string) (azcore.AccessToken, error) {
	t.mu.Lock()
	now := time.Now()
	valid := now.Before(t.token.ExpiresOn)
	if valid && !t.renewable(now) {
		defer t.mu.Unlock()
		return t.token, nil
	}
	f := t.fetching
	if f == nil {
		if !valid && t.lastErr != nil && now.Sub(t.lastTry) < retryToken {
			defer t.mu.Unlock()
			return azcore.AccessToken{}, t.lastErr
		}
		f = &fetch{done: make(chan struct{})}
		t.fetching, t.lastTry = f, now
		o := t.options
		o.Claims = claims
		t.fetches.Go(func() { t.fetch(f, o) })
	}
	token := t.token
	t.mu.Unlock()
	if valid {
		return token, nil
	}
	select {
	case <-f.done:
		return f.token, f.err
	case <-ctx.Done():
		return azcore.AccessToken{}, ctx.Err()
	}
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
	err := error(nil)
	if inner == nil {
		inner, err = t.credential()
	}
	if err == nil {
		f.token, err = inner.GetToken(ctx, o)
	} else {
		err = &tokenError{vault.ErrRefused, oneLine(err)}
	}
	if err != nil {
		f.err = newTokenError(err)
		if t.running.Err() == nil {
			t.log.Warn("no token for the vault", "error", f.err)
		}
	}
	t.mu.Lock()
	if t.fetching == f { // nobody asked for another kind meanwhile
		t.fetching, t.lastErr, t.inner = nil, f.err, inner
		if f.err == nil {
			t.token = f.token
		}
	}
	t.mu.Unlock()
	close(f.done)
}

// reject drops a token that the vault refused. The credential goes too: it
// would give the same token again until that expires.
func (t *tokens) reject(bearer string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if bearer == "Bearer "+t.token.Token {
		t.token, t.inner = azcore.AccessToken{}, nil
	}
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
	var failed *azidentity.AuthenticationFailedError
	switch {
	case errors.As(err, &failed) && failed.RawResponse == nil,
		errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return &tokenError{vault.ErrUnavailable, oneLine(err)}
	case errors.As(err, &failed):
		switch status := failed.RawResponse.StatusCode; {
		case status >= 500, status == http.StatusTooManyRequests, status == http.StatusRequestTimeout:
			return &tokenError{vault.ErrUnavailable, oneLine(err)}
		}
		return &tokenError{vault.ErrRefused, oneLine(err)}
	}
	// No credential of the chain had what it takes to ask.
	return &tokenError{vault.ErrRefused, "no credential: " + oneLine(err)}
}

// oneLine makes a line of the SDK's paragraphs.
func oneLine(err error) string {
	const most = 600
	s := strings.Join(strings.Fields(strings.ReplaceAll(err.Error(), "-----", "")), " ")
	if len(s) > most {
		s = fmt.Sprintf("%s… (%d characters)", s[:most], len(s))
	}
	return s
}
