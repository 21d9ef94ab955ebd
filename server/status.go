package server

import (
	"context"
	"errors"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
)

const (
	errorDomain  = "secrets.exto"
	resourceType = "exto.secrets.v1.Secret"
)

// code is the gRPC code of each reason.
var code = map[secret.Reason]codes.Code{
	secret.InvalidInstanceID:      codes.InvalidArgument,
	secret.InvalidKind:            codes.InvalidArgument,
	secret.InvalidValue:           codes.InvalidArgument,
	secret.InvalidRequest:         codes.InvalidArgument,
	secret.RequestIDReused:        codes.InvalidArgument,
	secret.SecretNotFound:         codes.NotFound,
	secret.VersionNotFound:        codes.NotFound,
	secret.SecretExists:           codes.AlreadyExists,
	secret.VersionMismatch:        codes.Aborted,
	secret.SecretDisabled:         codes.FailedPrecondition,
	secret.SecretDeleted:          codes.FailedPrecondition,
	secret.SecretNotDeleted:       codes.FailedPrecondition,
	secret.ValueUnchanged:         codes.FailedPrecondition,
	secret.VersionExpired:         codes.FailedPrecondition,
	secret.KeyMismatch:            codes.FailedPrecondition,
	secret.CallerUnknown:          codes.Unauthenticated,
	secret.CallerNotAllowed:       codes.PermissionDenied,
	secret.CallerQuotaExceeded:    codes.ResourceExhausted,
	secret.VaultUnavailable:       codes.Unavailable,
	secret.VaultThrottled:         codes.Unavailable,
	secret.VaultRefused:           codes.Unavailable,
	secret.StalenessUnsatisfiable: codes.Unavailable,
	secret.AuditUnavailable:       codes.Unavailable,
	secret.ShuttingDown:           codes.Unavailable,
	secret.DeadlineExceeded:       codes.DeadlineExceeded,
	secret.Cancelled:              codes.Canceled,
	secret.Defect:                 codes.Internal,
}

// fail logs the cause of an error, which the caller is not told, and gives what
// the caller is told.
func (g *gate) fail(ctx context.Context, err error) error {
	cause := err
	if e := (*broker.Error)(nil); errors.As(err, &e) {
		cause = errors.Unwrap(e)
	}
	if c := callFrom(ctx); cause != nil && !c.untold {
		g.log.WarnContext(ctx, "call failed", "audit_id", c.auditID, "caller", c.caller.name(), "cause", cause)
	}
	return statusOf(ctx, err)
}

// statusOf is the one way from an error to what goes over the wire. What is no
// *broker.Error is a defect: its text stays here.
func statusOf(ctx context.Context, err error) error {
	c := callFrom(ctx)
	var e *broker.Error
	if !errors.As(err, &e) {
		e = &broker.Error{Reason: secret.Defect, Commit: secret.Unknown}
	}
	told := *e
	if !c.write {
		told.Commit = ""
	} else if told.Commit == "" {
		told.Commit = secret.NotApplied // refused before the broker was asked
	}
	if told.Reason == secret.Defect {
		told.Message = "the broker failed; report this with audit id " + c.auditID
	}
	info := &errdetails.ErrorInfo{Reason: string(told.Reason), Domain: errorDomain, Metadata: map[string]string{"audit_id": c.auditID}}
	if told.Commit != "" {
		info.Metadata["commit_state"] = string(told.Commit)
	}
	details := []protoadapt.MessageV1{info}
	switch code[told.Reason] {
	case codes.InvalidArgument:
		details = append(details, &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: told.Field, Description: told.Message, Reason: string(told.Reason)},
		}})
	case codes.NotFound, codes.AlreadyExists:
		details = append(details, &errdetails.ResourceInfo{ResourceType: resourceType, ResourceName: told.Key.String(), Description: told.Message})
	case codes.FailedPrecondition, codes.Aborted:
		details = append(details, &errdetails.PreconditionFailure{Violations: []*errdetails.PreconditionFailure_Violation{
			{Type: string(told.Reason), Subject: told.Key.String(), Description: told.Message},
		}})
	}
	if told.RetryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(told.RetryAfter)})
	}
	st, err := status.New(code[told.Reason], told.Error()).WithDetails(details...)
	if err != nil {
		// Only if a detail could not be marshalled; the caller still gets the code.
		return status.Error(code[told.Reason], told.Error())
	}
	return st.Err()
}
