package keyvault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"

	"github.com/exto/secrets-broker/server/vault"
)

var (
	errClosed = fmt.Errorf("%w: closed", vault.ErrUnavailable)
	errLink   = fmt.Errorf("%w: the vault's link to the next page cannot be read", vault.ErrUnavailable)
	// errNoToken: the vault refused a token, or asked for one; another is on its way.
	errNoToken = fmt.Errorf("%w: the vault refuses every token", vault.ErrRefused)
	// errBudget: it was not the vault that refused.
	errBudget = fmt.Errorf("%w: the broker's own share of the vault's requests is used up", vault.ErrThrottled)
)

// Inner codes of 409. ErrorCode is Conflict for all of them.
const (
	innerDeleted        = "ObjectIsDeletedButRecoverable"
	innerBeingDeleted   = "ObjectIsBeingDeleted"
	innerBeingRecovered = "ObjectIsBeingRecovered"
	innerDisabled       = "SecretDisabled"
)

// conflictError is a 409: nothing was done.
type conflictError struct {
	inner string
	err   error
}

func (e *conflictError) Error() string { return e.err.Error() }
func (e *conflictError) Unwrap() error { return e.err }

// known reports whether the inner code says what is going on.
func (e *conflictError) known() bool { return e.final() || e.inner == innerBeingRecovered }

// final reports whether the same request later would get no other answer.
func (e *conflictError) final() bool { return e.inner == innerDeleted || e.inner == innerBeingDeleted }

// proxyError is a refused CONNECT.
type proxyError struct{ status int }

func (e *proxyError) Error() string {
	return fmt.Sprintf("the proxy (HTTPS_PROXY) answered %d %s", e.status, http.StatusText(e.status))
}

// responseError is an answer of the vault that is no success, without its body
// and without the secret's name: for the log.
type responseError struct {
	op, code, inner   string
	status            int
	requestID, region string
}

func (e *responseError) Error() string {
	s := fmt.Sprintf("%s: the vault answered %d %s", e.op, e.status, e.code)
	if e.inner != "" {
		s += " " + e.inner
	}
	return s + fmt.Sprintf(" (x-ms-request-id %s, region %s)", e.requestID, e.region)
}

// outcome puts how a call of the SDK ended into the words of package vault.
func (v *Vault) outcome(ctx context.Context, c *call, err error) error {
	var (
		resp  *azcore.ResponseError
		token *tokenError
	)
	switch {
	case err == nil:
		return nil
	case c.refusal != nil:
		return c.refusal
	case errors.Is(err, errNoToken):
		return errNoToken
	case errors.As(err, &token):
		return token
	case errors.As(err, &resp):
		return answered(c, resp)
	case c.status == http.StatusUnauthorized && ctx.Err() == nil:
		// The SDK sends no token to who gave this challenge, and says why.
		return fmt.Errorf("%w: %w", vault.ErrRefused, &challengeError{oneLine(err)})
	case c.change && c.status/100 == 2:
		return vault.Uncertain(fmt.Errorf("%w: %s: an answer that cannot be read", vault.ErrUnavailable, c.op))
	case ctx.Err() != nil:
		err = ctx.Err()
	default:
		err = fmt.Errorf("%w: %s: %w", vault.ErrUnavailable, c.op, transportError(err))
	}
	if c.change && c.sent.Load() {
		return vault.Uncertain(err)
	}
	return err
}

// answered sorts the vault's errors.
func answered(c *call, resp *azcore.ResponseError) error {
	e := &responseError{op: c.op, status: resp.StatusCode, code: word(resp.ErrorCode), inner: innerCode(resp.RawResponse)}
	if h := resp.RawResponse; h != nil {
		e.requestID, e.region = word(h.Header.Get("x-ms-request-id")), word(h.Header.Get("x-ms-keyvault-region"))
	}
	switch {
	case e.status == http.StatusNotFound:
		return fmt.Errorf("%w: %w", vault.ErrNotFound, e)
	case e.status == http.StatusForbidden && e.inner == innerDisabled:
		return fmt.Errorf("%w: %w", vault.ErrDisabled, e)
	case e.status == http.StatusForbidden && c.change && !isPermission(e.inner):
		// A vault that takes no writes now: read-only after a failover of its region.
		return fmt.Errorf("%w: it takes no writes now: %w", vault.ErrUnavailable, e)
	case e.status == http.StatusUnauthorized, e.status == http.StatusForbidden:
		return fmt.Errorf("%w: %w", vault.ErrRefused, e)
	case e.status == http.StatusConflict && c.change:
		return &conflictError{e.inner, e}
	case e.status == http.StatusConflict:
		return fmt.Errorf("%w: %w", vault.ErrUnavailable, e)
	case e.status == http.StatusTooManyRequests:
		return vault.Throttled(fmt.Errorf("%w: %w", vault.ErrThrottled, e), retryAfter(resp.RawResponse))
	case e.status == http.StatusBadRequest && c.query.Has(skipParam):
		return fmt.Errorf("%w: %w", vault.ErrSkip, e)
	case e.status >= http.StatusInternalServerError, e.status == http.StatusRequestTimeout:
		err := fmt.Errorf("%w: %w", vault.ErrUnavailable, e)
		if c.change {
			return vault.Uncertain(err) // a gateway may say so of what was done
		}
		return err
	case e.status/100 == 3:
		return fmt.Errorf("%w: a redirect: %w", vault.ErrUnavailable, e)
	}
	return e
}

// isPermission reports whether the inner code of a 403 is about who asks:
// ForbiddenByRbac, ForbiddenByPolicy, ForbiddenByFirewall, AccessDenied; or there is
// none. What a read-only vault says is documented nowhere, so it is not looked for.
func isPermission(inner string) bool {
	return inner == "" || strings.HasPrefix(inner, "Forbidden") || strings.HasPrefix(inner, "AccessDenied")
}

// innerCode is error.innererror.code of an answer, which azcore does not read.
func innerCode(resp *http.Response) string {
	if resp == nil {
		return ""
	}
	body, err := runtime.Payload(resp) // kept by azcore, so that it can be read again
	if err != nil {
		return ""
	}
	var told struct {
		Error struct {
			Inner struct {
				Code string `json:"code"`
			} `json:"innererror"`
		} `json:"error"`
	}
	if json.Unmarshal(body, &told) != nil {
		return ""
	}
	return word(told.Error.Inner.Code)
}

// word lets nothing into a log line but a code or an id, so that no body gets
// there by way of one.
func word(s string) string {
	if len(s) > 64 {
		return "?"
	}
	for _, c := range []byte(s) {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '_' || c == '.') {
			return "?"
		}
	}
	return s
}

// transportError is err without the URL, which holds the secret's name.
func transportError(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// retryAfter is the answer's Retry-After; zero when there is none.
func retryAfter(resp *http.Response) time.Duration {
	if resp == nil {
		return 0
	}
	at := resp.Header.Get("Retry-After")
	if seconds, err := strconv.Atoi(at); err == nil {
		return time.Duration(min(max(seconds, 0), 60)) * time.Second
	}
	if t, err := http.ParseTime(at); err == nil {
		return min(max(time.Until(t), 0), time.Minute)
	}
	return 0
}

// challengeError is a challenge that no vault would give: the SDK refuses to send
// a token to whoever gave it.
type challengeError struct{ text string }

func (e *challengeError) Error() string { return e.text }
