package client

import (
	"context"
	"errors"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/exto/secrets-broker/secret"
)

// What errors.Is finds in an *Error. Each stands for the reason that is named
// with it; ErrInvalid and ErrUnavailable stand for a whole code, and so hold for
// reasons that only a later broker gives, too.
var (
	// ErrNotFound: there is no such secret, or it is deleted (SECRET_NOT_FOUND).
	ErrNotFound = errors.New("secret not found")
	// ErrVersionNotFound: the secret has no such version (VERSION_NOT_FOUND).
	ErrVersionNotFound = errors.New("version not found")
	// ErrVersionExpired: the version was rotated away and its grace is over, or
	// it is from before a delete (VERSION_EXPIRED).
	ErrVersionExpired = errors.New("version expired")
	// ErrExists: MustNotExist was set and the secret exists (SECRET_EXISTS).
	ErrExists = errors.New("secret exists")
	// ErrVersionMismatch: the current version is not the one that
	// MustMatchVersion names (VERSION_MISMATCH). Read again, then decide.
	ErrVersionMismatch = errors.New("version mismatch")
	// ErrValueUnchanged: the new value of a Rotate is the current one
	// (VALUE_UNCHANGED).
	ErrValueUnchanged = errors.New("value unchanged")
	// ErrDisabled: somebody disabled the secret in the vault (SECRET_DISABLED).
	ErrDisabled = errors.New("secret disabled")
	// ErrDeleted: the secret is deleted and the call does not recover it
	// (SECRET_DELETED).
	ErrDeleted = errors.New("secret deleted")
	// ErrNotDeleted: there is nothing to recover (SECRET_NOT_DELETED).
	ErrNotDeleted = errors.New("secret not deleted")
	// ErrKeyMismatch: what the vault holds under this name was written for
	// another key or by a later broker; for an operator to look at (KEY_MISMATCH).
	ErrKeyMismatch = errors.New("key mismatch")
	// ErrQuotaExceeded: the caller's own limit of requests; try again, not before
	// RetryAfter (CALLER_QUOTA_EXCEEDED).
	ErrQuotaExceeded = errors.New("caller quota exceeded")
	// ErrStaleness: the answer can't be as fresh as the call asks; it is
	// ErrUnavailable too (STALENESS_UNSATISFIABLE).
	ErrStaleness = errors.New("staleness unsatisfiable")
	// ErrAuditUnavailable: the broker can't record the call and so refuses it; it is
	// ErrUnavailable too (AUDIT_UNAVAILABLE).
	ErrAuditUnavailable = errors.New("audit unavailable")
	// ErrVaultRefused: the vault refuses the broker's own credentials; for an
	// operator to look at; it is ErrUnavailable too (VAULT_REFUSED).
	ErrVaultRefused = errors.New("vault refused the broker")
	// ErrDefect: the broker is at fault; its log has AuditID (DEFECT).
	ErrDefect = errors.New("defect of the secrets broker")
	// ErrInvalid: the call can't succeed as it is, a request id used for something
	// else included (every INVALID_ARGUMENT).
	ErrInvalid = errors.New("invalid request")
	// ErrCallerUnknown: the broker does not know this client's certificate, or no
	// longer (CALLER_UNKNOWN).
	ErrCallerUnknown = errors.New("caller unknown")
	// ErrNotAllowed: no rule of the policy allows the call (CALLER_NOT_ALLOWED).
	ErrNotAllowed = errors.New("caller not allowed")
	// ErrUnavailable: the broker can't answer now, or the connection broke, and
	// retries did not help. Try again, not before RetryAfter, a write with the same
	// request id (every UNAVAILABLE). A broker that can't be reached at all, or does
	// not accept the certificate, is waited for until context.DeadlineExceeded; the
	// message then says why no connection was ready.
	ErrUnavailable = errors.New("secrets broker unavailable")
)

// Error is the error of every call. errors.As and errors.AsType find it;
// errors.Is finds the variables of this package, context.DeadlineExceeded and
// context.Canceled in it. No field holds any part of a value.
type Error struct {
	// Code is the gRPC status code.
	Code codes.Code
	// Reason is the broker's own word for what happened. It may be one that this
	// package does not know yet. Empty when the broker said nothing: the error
	// comes from gRPC, the network or the caller's context.
	Reason secret.Reason
	// Message is for a person. The broker's begins with the reason.
	Message string
	// CommitState says of a write whether it happened. Empty for reads.
	CommitState secret.CommitState
	// RequestID makes the same write again safe, as the RequestID of its options.
	// Empty for reads.
	RequestID string
	// AuditID is the call's name in the broker's audit log. Empty when the broker
	// gave none.
	AuditID string
	// RetryAfter is how long to wait before another attempt. Zero when the broker
	// gave no advice.
	RetryAfter time.Duration

	err error
}

// Error is the message, with the code and the commit state where the message
// does not tell them by itself.
func (e *Error) Error() string {
	if e.Reason != "" {
		return "secrets broker: " + e.Message
	}
	text := "secrets broker: " + e.Code.String() + ": " + e.Message
	if e.CommitState != "" {
		text += " (commit_state " + string(e.CommitState) + ")"
	}
	return text
}

// Unwrap is the gRPC status error, for status.FromError and the details that
// Error has no field for, such as BadRequest. For an Error that no broker gave it
// is made of Code and Message.
func (e *Error) Unwrap() error {
	if e.err == nil {
		return status.Error(e.Code, e.Message)
	}
	return e.err
}

// Is reports whether e is a case of target, one of the variables of this package
// or of the two errors of package context.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrNotFound:
		return e.Reason == secret.SecretNotFound
	case ErrVersionNotFound:
		return e.Reason == secret.VersionNotFound
	case ErrVersionExpired:
		return e.Reason == secret.VersionExpired
	case ErrExists:
		return e.Reason == secret.SecretExists
	case ErrVersionMismatch:
		return e.Reason == secret.VersionMismatch
	case ErrValueUnchanged:
		return e.Reason == secret.ValueUnchanged
	case ErrDisabled:
		return e.Reason == secret.SecretDisabled
	case ErrDeleted:
		return e.Reason == secret.SecretDeleted
	case ErrNotDeleted:
		return e.Reason == secret.SecretNotDeleted
	case ErrKeyMismatch:
		return e.Reason == secret.KeyMismatch
	case ErrCallerUnknown:
		return e.Reason == secret.CallerUnknown
	case ErrNotAllowed:
		return e.Reason == secret.CallerNotAllowed
	case ErrQuotaExceeded:
		return e.Reason == secret.CallerQuotaExceeded
	case ErrStaleness:
		return e.Reason == secret.StalenessUnsatisfiable
	case ErrAuditUnavailable:
		return e.Reason == secret.AuditUnavailable
	case ErrVaultRefused:
		return e.Reason == secret.VaultRefused
	case ErrDefect:
		return e.Reason == secret.Defect
	case ErrInvalid:
		return e.Code == codes.InvalidArgument
	case ErrUnavailable:
		return e.Code == codes.Unavailable
	case context.DeadlineExceeded:
		return e.Code == codes.DeadlineExceeded
	case context.Canceled:
		return e.Code == codes.Canceled
	}
	return false
}

// The broker's ErrorInfo: its domain, and the names in its metadata.
const (
	errorDomain     = "secrets.exto"
	metaCommitState = "commit_state"
	metaAuditID     = "audit_id"
)

// newError makes the *Error of what gRPC returned. requestID is empty for reads.
func newError(err error, requestID string) *Error {
	st := status.Convert(err)
	e := &Error{Code: st.Code(), Message: st.Message(), RequestID: requestID, err: err}
	write := requestID != ""
	if write {
		e.CommitState = secret.Unknown // until the broker itself says better
	}
	for _, detail := range st.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() != errorDomain {
				continue
			}
			e.Reason = secret.Reason(d.GetReason())
			e.AuditID = d.GetMetadata()[metaAuditID]
			state := secret.CommitState(d.GetMetadata()[metaCommitState])
			if write && (state == secret.NotApplied || state == secret.Applied) {
				e.CommitState = state
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = max(0, d.GetRetryDelay().AsDuration())
		}
	}
	return e
}

// refuse is the error of a write that is not sent.
func refuse(reason secret.Reason, text, requestID string) *Error {
	message := string(reason) + ": " + text + " (commit_state " + string(secret.NotApplied) + ")"
	return &Error{
		Code:        codes.InvalidArgument,
		Reason:      reason,
		Message:     message,
		CommitState: secret.NotApplied,
		RequestID:   requestID,
		err:         status.Error(codes.InvalidArgument, message),
	}
}
