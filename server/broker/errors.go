package broker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// throttleRetry is what a caller waits for after the vault throttled the broker:
// Key Vault counts over 10 s and names no time itself.
const throttleRetry = 2 * time.Second

// Error is why an operation failed, in the words of the contract. Error() holds
// no secret and nothing of the vault's own text; the cause is for the log.
type Error struct {
	Reason secret.Reason
	// Message is for a person and names what to do. It begins after the reason.
	Message string
	// Field is the field of the request that is at fault, as the contract names
	// it; only for what is wrong with a request.
	Field string
	// Key is the secret it is about; zero when it is about none.
	Key secret.Key
	// Commit is set on errors of writes.
	Commit secret.CommitState
	// RetryAfter is how long to wait before asking again; zero when the caller
	// may decide.
	RetryAfter time.Duration
	cause      error
}

func (e *Error) Error() string {
	s := string(e.Reason) + ": " + e.Message
	if e.Commit != "" {
		s += fmt.Sprintf(" (commit_state %s)", e.Commit)
	}
	return s
}

// Because sets the cause of a new error.
func (e *Error) Because(cause error) *Error {
	e.cause = cause
	return e
}

// Unwrap gives the cause, which may hold upstream text: for the log alone.
func (e *Error) Unwrap() error { return e.cause }

func refuse(key secret.Key, reason secret.Reason, format string, args ...any) *Error {
	return &Error{Reason: reason, Message: fmt.Sprintf(format, args...), Key: key}
}

// withCommit says of err whether the write happened, where it does not say so
// itself.
func withCommit(err error, state secret.CommitState) error {
	var e *Error
	if errors.As(err, &e) && e.Commit == "" {
		e.Commit = state
	}
	return err
}

// vaultError puts what a vault call ended with into the contract's words. ctx is
// the one that the call was made with.
func vaultError(ctx context.Context, key secret.Key, err error) *Error {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, errTooLate):
		e = errDeadline(key)
	case errors.Is(err, vault.ErrThrottled):
		e = refuse(key, secret.VaultThrottled, "the vault takes no more requests now; try again after the time in RetryInfo")
		e.RetryAfter = max(throttleRetry, vault.RetryAfter(err))
	case errors.Is(err, vault.ErrRefused):
		e = refuse(key, secret.VaultRefused, "the vault refuses the broker's own credentials; its operator has to grant them")
	case errors.Is(err, vault.ErrUnavailable):
		e = refuse(key, secret.VaultUnavailable, "the vault cannot be reached or cannot do its work; try again")
	case ctx.Err() != nil:
		e = contextError(ctx, key)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		e = refuse(key, secret.VaultUnavailable, "the vault did not answer in time; try again")
	case errors.Is(err, vault.ErrNotFound), errors.Is(err, vault.ErrDisabled), errors.Is(err, vault.ErrDeleted), errors.Is(err, errUnlike):
		e = refuse(key, secret.VaultUnavailable, "the secret was changed in the vault meanwhile; try again")
	default:
		e = refuse(key, secret.Defect, "the broker met an answer of the vault that it does not know")
	}
	e.cause = err
	return e
}

// contextError says how the caller's context ended.
func contextError(ctx context.Context, key secret.Key) *Error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return errDeadline(key)
	}
	return refuse(key, secret.Cancelled, "the caller ended the call")
}

func errDeadline(key secret.Key) *Error {
	return refuse(key, secret.DeadlineExceeded, "the call's deadline passed before the broker was done; give it more time")
}
