package keyvault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"

	"github.com/exto/secrets-broker/internal/keyvaultwire"
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
		return fmt.Errorf("%w: %w", vault.ErrRefused, &challengeError{keyvaultwire.OneLine(err)})
	case c.change && c.status/100 == 2:
		return vault.Uncertain(fmt.Errorf("%w: %s: an answer that cannot be read", vault.ErrUnavailable, c.op))
	case ctx.Err() != nil:
		err = ctx.Err()
	default:
		err = fmt.Errorf("%w: %s: %w", vault.ErrUnavailable, c.op, keyvaultwire.TransportError(err))
	}
	if c.change && c.sent.Load() {
		return vault.Uncertain(err)
	}
	return err
}

// answered sorts the vault's errors.
func answered(c *call, resp *azcore.ResponseError) error {
	e := answerError(c.op, resp)
	switch {
	case e.Status == http.StatusNotFound:
		return fmt.Errorf("%w: %w", vault.ErrNotFound, e)
	case e.Status == http.StatusForbidden && e.Inner == keyvaultwire.InnerDisabled:
		return fmt.Errorf("%w: %w", vault.ErrDisabled, e)
	case e.Status == http.StatusForbidden && c.change && !isPermission(e.Inner):
		// A vault that takes no writes now: read-only after a failover of its region.
		return fmt.Errorf("%w: it takes no writes now: %w", vault.ErrUnavailable, e)
	case e.Status == http.StatusUnauthorized, e.Status == http.StatusForbidden:
		return fmt.Errorf("%w: %w", vault.ErrRefused, e)
	case e.Status == http.StatusConflict && c.change:
		return &conflictError{e.Inner, e}
	case e.Status == http.StatusConflict:
		return fmt.Errorf("%w: %w", vault.ErrUnavailable, e)
	case e.Status == http.StatusTooManyRequests:
		return vault.Throttled(fmt.Errorf("%w: %w", vault.ErrThrottled, e), keyvaultwire.RetryAfter(resp.RawResponse))
	case e.Status == http.StatusBadRequest && c.query.Has(skipParam):
		return fmt.Errorf("%w: %w", vault.ErrSkip, e)
	case e.Status >= http.StatusInternalServerError, e.Status == http.StatusRequestTimeout:
		err := fmt.Errorf("%w: %w", vault.ErrUnavailable, e)
		if c.change {
			return vault.Uncertain(err) // a gateway may say so of what was done
		}
		return err
	case e.Status/100 == 3:
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

// challengeError is a challenge that no vault would give: the SDK refuses to send
// a token to whoever gave it.
type challengeError struct{ text string }

func (e *challengeError) Error() string { return e.text }

// answerError takes of the SDK's error what may be told.
func answerError(op string, e *azcore.ResponseError) *keyvaultwire.AnswerError {
	var header http.Header
	var body []byte
	if e.RawResponse != nil {
		header = e.RawResponse.Header
		body, _ = runtime.Payload(e.RawResponse) // kept by azcore, so that it can be read again
	}
	return keyvaultwire.NewAnswerError(op, e.ErrorCode, header, e.StatusCode, body)
}
