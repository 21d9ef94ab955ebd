package keyvault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	azlog "github.com/Azure/azure-sdk-for-go/sdk/azcore/log"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/exto/secrets-broker/internal/keyvaultwire"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

const (
	// readTries is how often a read is sent while the vault cannot be reached: one
	// lost connection is nobody's business, an outage is.
	readTries = 3
	// Waits between them begin with readPause; those for a state between begin
	// with firstPause and grow to longestPause.
	readPause    = 100 * time.Millisecond
	firstPause   = time.Second
	longestPause = 15 * time.Second
)

// quietSDK keeps the SDK's log, which AZURE_SDK_GO_LOGGING turns on, from showing
// the bodies of errors: a vault may repeat in them what it was sent. Once, since the
// SDK reads this without a lock.
var quietSDK = sync.OnceFunc(func() {
	azlog.SetEvents(azlog.EventRequest, azlog.EventResponse, azidentity.EventAuthentication)
})

// policyFunc is a step on the way of a request.
type policyFunc func(*policy.Request) (*http.Response, error)

func (f policyFunc) Do(req *policy.Request) (*http.Response, error) { return f(req) }

// call is one request of the SDK's: how far it came is written into it.
type call struct {
	op      string
	change  bool
	listing bool       // of many names
	query   url.Values // added to the request's own

	sent    atomic.Bool // handed to a connection, and not answered
	status  int         // of the last answer; 0: none
	refusal error       // why it was not sent
}

// class is the call's in the budget, by the priority of its origin.
func (c *call) class(p vault.Priority) class {
	switch {
	case c.listing: // behind everything, whoever asks
		return listings
	case c.op == probeOp, p == vault.VerifyingKnown: // readiness is to be true also when many wait
		return verifyingKnown
	case p == vault.Verifying:
		return verifying
	case p == vault.Reading:
		return reading
	}
	return rest
}

type callKey struct{}

// do makes one call of the SDK, which is one request (two when its token is
// refused), and says in the words of package vault how it ended.
func (v *Vault) do(ctx context.Context, c *call, f func(context.Context) error) error {
	if v.closed.Load() {
		return errClosed
	}
	err := v.once(ctx, c, f)
	if errors.Is(err, errNoToken) { // the vault said which token it wants, and did nothing
		err = v.once(ctx, c, f)
	}
	// A caller's deadline may have passed because the vault hangs.
	if errors.Is(err, vault.ErrUnavailable) || errors.Is(err, vault.ErrRefused) || errors.Is(err, context.DeadlineExceeded) {
		v.suspect()
	}
	return err
}

// once makes a call when there is a token for it.
func (v *Vault) once(ctx context.Context, c *call, f func(context.Context) error) error {
	if err := v.ready(ctx); err != nil {
		return err
	}
	return v.outcome(ctx, c, keyvaultwire.NoPanic(context.WithValue(ctx, callKey{}, c), f))
}

// addQuery adds what the SDK has no option for.
func addQuery(req *policy.Request) (*http.Response, error) {
	if c, ok := req.Raw().Context().Value(callKey{}).(*call); ok && c.query != nil {
		q := req.Raw().URL.Query()
		for name, values := range c.query {
			q[name] = values
		}
		req.Raw().URL.RawQuery = q.Encode()
	}
	return req.Next()
}

// transmit is the last step before the network: it waits for the budget, says
// that an effect begins and that the request is sent, and bounds it.
func (v *Vault) transmit(req *policy.Request) (*http.Response, error) {
	ctx := req.Raw().Context()
	c, ok := ctx.Value(callKey{}).(*call)
	if !ok {
		return nil, errors.New("keyvault: a request that belongs to no call")
	}
	budget := v.reads
	if c.change {
		budget = v.writes
	}
	origin := vault.OriginOf(ctx)
	if c.refusal = budget.take(ctx, c.class(origin.Priority)); c.refusal != nil {
		return nil, c.refusal
	}
	if c.change && c.op != settleOp {
		if c.refusal = vault.BeginEffect(ctx); c.refusal != nil {
			return nil, c.refusal
		}
	}
	if origin.RequestID != "" {
		req.Raw().Header.Set("x-ms-client-request-id", origin.RequestID)
	}
	bearer := req.Raw().Header.Get("Authorization")
	timeout := v.cfg.RequestTimeout
	if c.op == probeOp { // so that nothing hangs on to a connection that is dead
		timeout = min(timeout, probeTimeout)
	}
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	bounded = httptrace.WithClientTrace(bounded, &httptrace.ClientTrace{
		// Asked for again only when nothing was written on the connection before.
		GetConn: func(string) { c.sent.Store(false) },
		GotConn: func(httptrace.GotConnInfo) { c.sent.Store(true) },
	})
	c.status = 0
	if origin.Sends != nil {
		origin.Sends()
	}
	resp, err := req.WithContext(bounded).Next()
	if err != nil {
		return resp, err
	}
	c.sent.Store(false)
	c.status = resp.StatusCode
	switch {
	case resp.StatusCode == http.StatusTooManyRequests:
		budget.throttled(keyvaultwire.RetryAfter(resp))
	case resp.StatusCode == http.StatusUnauthorized && bearer != "":
		v.tokens.reject(bearer)
	case resp.StatusCode < http.StatusInternalServerError:
		budget.served()
	}
	return resp, nil
}

// read makes a call that changes nothing: again while the vault is throttled, and
// a few times while it cannot be reached, within the context.
func (v *Vault) read(ctx context.Context, op string, f func(context.Context) error) error {
	return v.again(ctx, func() error { return v.do(ctx, &call{op: op}, f) })
}

// again makes a call that changes nothing until it is answered, or is out of tries
// or of time.
func (v *Vault) again(ctx context.Context, ask func() error) error {
	pauses := vault.NewPauses(readPause, time.Second)
	for failed := 0; ; {
		err := ask()
		if errors.Is(err, vault.ErrUnavailable) {
			failed++
		}
		throttled := errors.Is(err, vault.ErrThrottled) && !errors.Is(err, errBudget)
		var token *tokenError // which has its own tries
		if !throttled && (errors.As(err, &token) || !errors.Is(err, vault.ErrUnavailable) || failed == readTries || v.closed.Load()) {
			return err
		}
		if !v.pause(ctx, max(pauses.NextBackOff(), vault.RetryAfter(err))) {
			return err
		}
	}
}

// change makes a call that changes something, once. Only what the vault refused
// because the name is in a state between is sent again, when that is over.
func (v *Vault) change(ctx context.Context, key secret.Key, op string, f func(context.Context) error) error {
	waiting := v.newTransition()
	for {
		err := v.do(ctx, &call{op: op, change: true}, f)
		var conflict *conflictError
		if !errors.As(err, &conflict) || conflict.final() {
			return err
		}
		if !conflict.known() {
			// Parallel operations on one object, or a code that is new: look.
			if gone, lookErr := v.isGone(ctx, key); lookErr == nil && gone {
				return &conflictError{inner: innerBeingDeleted, err: err}
			}
		}
		if !waiting.pause(ctx) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			// No conflictError: what it means was not found out.
			return fmt.Errorf("%w: the secret is still being deleted or recovered: %w", vault.ErrUnavailable, conflict.err)
		}
	}
}

// pause lets time pass, if a call with ctx may wait so long.
func (v *Vault) pause(ctx context.Context, d time.Duration) bool {
	return vault.Pause(ctx, v.cfg.Wait, d)
}
