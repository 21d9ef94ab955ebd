package client_test

import (
	"context"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/secret"
)

// sentinels are all that errors.Is finds; the names are those in the source.
var sentinels = map[string]error{
	"ErrNotFound":              client.ErrNotFound,
	"ErrVersionNotFound":       client.ErrVersionNotFound,
	"ErrVersionExpired":        client.ErrVersionExpired,
	"ErrExists":                client.ErrExists,
	"ErrVersionMismatch":       client.ErrVersionMismatch,
	"ErrValueUnchanged":        client.ErrValueUnchanged,
	"ErrDisabled":              client.ErrDisabled,
	"ErrDeleted":               client.ErrDeleted,
	"ErrNotDeleted":            client.ErrNotDeleted,
	"ErrKeyMismatch":           client.ErrKeyMismatch,
	"ErrQuotaExceeded":         client.ErrQuotaExceeded,
	"ErrStaleness":             client.ErrStaleness,
	"ErrAuditUnavailable":      client.ErrAuditUnavailable,
	"ErrVaultRefused":          client.ErrVaultRefused,
	"ErrDefect":                client.ErrDefect,
	"ErrInvalid":               client.ErrInvalid,
	"ErrCallerUnknown":         client.ErrCallerUnknown,
	"ErrNotAllowed":            client.ErrNotAllowed,
	"ErrUnavailable":           client.ErrUnavailable,
	"context.DeadlineExceeded": context.DeadlineExceeded,
	"context.Canceled":         context.Canceled,
}

type reasonRow struct {
	code      codes.Code
	reason    secret.Reason
	sentinels string // separated by blanks
}

// reasons are what the broker says and which of the sentinels it is; "" is none.
var reasons = []reasonRow{
	{codes.InvalidArgument, "INVALID_INSTANCE_ID", "ErrInvalid"},
	{codes.InvalidArgument, "INVALID_KIND", "ErrInvalid"},
	{codes.InvalidArgument, "INVALID_VALUE", "ErrInvalid"},
	{codes.InvalidArgument, "INVALID_REQUEST", "ErrInvalid"},
	{codes.InvalidArgument, "REQUEST_ID_REUSED", "ErrInvalid"},
	{codes.InvalidArgument, "OF_A_LATER_BROKER", "ErrInvalid"},
	{codes.NotFound, "SECRET_NOT_FOUND", "ErrNotFound"},
	{codes.NotFound, "VERSION_NOT_FOUND", "ErrVersionNotFound"},
	{codes.AlreadyExists, "SECRET_EXISTS", "ErrExists"},
	{codes.Aborted, "VERSION_MISMATCH", "ErrVersionMismatch"},
	{codes.FailedPrecondition, "SECRET_DISABLED", "ErrDisabled"},
	{codes.FailedPrecondition, "SECRET_DELETED", "ErrDeleted"},
	{codes.FailedPrecondition, "SECRET_NOT_DELETED", "ErrNotDeleted"},
	{codes.FailedPrecondition, "VALUE_UNCHANGED", "ErrValueUnchanged"},
	{codes.FailedPrecondition, "VERSION_EXPIRED", "ErrVersionExpired"},
	{codes.FailedPrecondition, "KEY_MISMATCH", "ErrKeyMismatch"},
	{codes.FailedPrecondition, "OF_A_LATER_BROKER", ""},
	{codes.Unauthenticated, "CALLER_UNKNOWN", "ErrCallerUnknown"},
	{codes.PermissionDenied, "CALLER_NOT_ALLOWED", "ErrNotAllowed"},
	{codes.ResourceExhausted, "CALLER_QUOTA_EXCEEDED", "ErrQuotaExceeded"},
	{codes.Unavailable, "VAULT_UNAVAILABLE", "ErrUnavailable"},
	{codes.Unavailable, "VAULT_THROTTLED", "ErrUnavailable"},
	{codes.Unavailable, "VAULT_REFUSED", "ErrVaultRefused ErrUnavailable"},
	{codes.Unavailable, "STALENESS_UNSATISFIABLE", "ErrStaleness ErrUnavailable"},
	{codes.Unavailable, "AUDIT_UNAVAILABLE", "ErrAuditUnavailable ErrUnavailable"},
	{codes.Unavailable, "SHUTTING_DOWN", "ErrUnavailable"},
	{codes.Unavailable, "NOT_ACTIVE", "ErrUnavailable"},
	{codes.Unavailable, "OF_A_LATER_BROKER", "ErrUnavailable"},
	{codes.DeadlineExceeded, "DEADLINE_EXCEEDED", "context.DeadlineExceeded"},
	{codes.Canceled, "CANCELLED", "context.Canceled"},
	{codes.Internal, "DEFECT", "ErrDefect"},
}

// A reason or a sentinel that is added must be decided on here.
func TestSentinelTableIsComplete(t *testing.T) {
	t.Parallel()
	for name, value := range declared(t, "../secret/reason.go", "Reason") {
		word, err := strconv.Unquote(value)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(reasons, func(row reasonRow) bool { return string(row.reason) == word }) {
			t.Errorf("secret.%s (%s) has no row", name, word)
		}
	}
	for name := range declared(t, "errors.go", "") {
		if strings.HasPrefix(name, "Err") && sentinels[name] == nil {
			t.Errorf("%s is not among the sentinels", name)
		}
	}
	for name := range sentinels {
		if !slices.ContainsFunc(reasons, func(row reasonRow) bool { return slices.Contains(strings.Fields(row.sentinels), name) }) {
			t.Errorf("no reason is %s", name)
		}
	}
}

// declared gives the package-level constants and variables of a source file that
// are declared with the named type, or with none, and how their values are
// written.
func declared(t *testing.T, path, typeName string) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, decl := range file.Decls {
		gen, ok := decl.(*ast.GenDecl)
		if !ok {
			continue
		}
		for _, spec := range gen.Specs {
			value, ok := spec.(*ast.ValueSpec)
			if !ok {
				continue
			}
			if ident, _ := value.Type.(*ast.Ident); (ident == nil) != (typeName == "") || ident != nil && ident.Name != typeName {
				continue
			}
			for i, name := range value.Names {
				found[name.Name] = ""
				if literal, ok := value.Values[i].(*ast.BasicLit); ok {
					found[name.Name] = literal.Value
				}
			}
		}
	}
	if len(found) == 0 {
		t.Fatalf("%s declares nothing of type %q", path, typeName)
	}
	return found
}

func TestSentinels(t *testing.T) {
	t.Parallel()
	var now atomic.Pointer[reasonRow]
	b := start(t, func(context.Context, proto.Message) (proto.Message, error) {
		row := now.Load()
		return nil, refusal(t, row.code, string(row.reason)+": for a person", brokerInfo(row.reason, secret.NotApplied))
	})
	c := b.client(t)
	for _, r := range reasons {
		now.Store(&r)
		for _, op := range operations {
			err := op.call(t.Context(), c, "")
			e, ok := errors.AsType[*client.Error](err)
			if !ok || e.Code != r.code || e.Reason != r.reason {
				t.Errorf("%s: got %#v, want %s with %s", op.name, err, r.code, r.reason)
			}
			for name, sentinel := range sentinels {
				if got, want := errors.Is(err, sentinel), slices.Contains(strings.Fields(r.sentinels), name); got != want {
					t.Errorf("%s: %s %s is %s: got %t, want %t", op.name, r.code, r.reason, name, got, want)
				}
			}
		}
	}
}

func TestErrorHasAllThatTheBrokerSaid(t *testing.T) {
	t.Parallel()
	const message = "VAULT_THROTTLED: the vault asks for patience"
	violation := &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "ref.instance_id"}}}
	b := start(t, func(context.Context, proto.Message) (proto.Message, error) {
		return nil, refusal(t, codes.Unavailable, message,
			&errdetails.ErrorInfo{Domain: "example.com", Reason: "OF_A_PROXY", Metadata: map[string]string{"audit_id": "no", "commit_state": "NOT_APPLIED"}},
			brokerInfo("VAULT_THROTTLED", secret.Applied),
			&errdetails.RetryInfo{RetryDelay: durationpb.New(1500 * time.Millisecond)},
			violation)
	})
	c := b.client(t)
	for _, op := range operations {
		err := op.call(t.Context(), c, requestID)
		e, ok := errors.AsType[*client.Error](err)
		if !ok {
			t.Errorf("%s: got %#v, want an *Error", op.name, err)
			continue
		}
		got := *e
		want := client.Error{
			Code: codes.Unavailable, Reason: "VAULT_THROTTLED", Message: message, AuditID: "audit-7", RetryAfter: 1500 * time.Millisecond,
		}
		if op.write {
			want.CommitState, want.RequestID = secret.Applied, requestID
		}
		if got.Code != want.Code || got.Reason != want.Reason || got.Message != want.Message || got.AuditID != want.AuditID ||
			got.RetryAfter != want.RetryAfter || got.CommitState != want.CommitState || got.RequestID != want.RequestID {
			t.Errorf("%s: got %#v, want %#v", op.name, got, want)
		}
		if want := "secrets broker: " + message; err.Error() != want {
			t.Errorf("%s: got %q, want %q", op.name, err, want)
		}
		st, ok := status.FromError(err)
		if !ok || st.Code() != codes.Unavailable || len(st.Details()) != 4 || !proto.Equal(st.Details()[3].(proto.Message), violation) {
			t.Errorf("%s: got status %v, want the broker's with its details", op.name, st)
		}
	}
}

func TestCommitState(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		details []protoadapt.MessageV1
		want    secret.CommitState // of a write
	}{
		{"not applied", []protoadapt.MessageV1{brokerInfo("DEFECT", secret.NotApplied)}, secret.NotApplied},
		{"applied", []protoadapt.MessageV1{brokerInfo("DEFECT", secret.Applied)}, secret.Applied},
		{"unknown", []protoadapt.MessageV1{brokerInfo("DEFECT", secret.Unknown)}, secret.Unknown},
		{"left out", []protoadapt.MessageV1{brokerInfo("DEFECT", "ErrDefect")}, secret.Unknown},
		{"another word", []protoadapt.MessageV1{brokerInfo("DEFECT", "PERHAPS")}, secret.Unknown},
		{"no details, as from gRPC", nil, secret.Unknown},
		{"another's ErrorInfo", []protoadapt.MessageV1{&errdetails.ErrorInfo{
			Domain: "googleapis.com", Reason: "SECRET_NOT_FOUND", Metadata: map[string]string{"commit_state": "NOT_APPLIED"},
		}}, secret.Unknown},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b := start(t, func(context.Context, proto.Message) (proto.Message, error) {
				return nil, refusal(t, codes.Internal, "for a person", test.details...)
			})
			c := b.client(t)
			for _, op := range operations {
				err := op.call(t.Context(), c, "")
				e, ok := errors.AsType[*client.Error](err)
				if !ok {
					t.Errorf("%s: got %#v, want an *Error", op.name, err)
					continue
				}
				want := test.want
				if !op.write {
					want = ""
				}
				if e.CommitState != want {
					t.Errorf("%s: got %q, want %q", op.name, e.CommitState, want)
				}
				if e.Reason == "" {
					// The broker's own messages end with it; others must not look certain.
					if got := strings.Contains(err.Error(), "(commit_state UNKNOWN)"); got != op.write {
						t.Errorf("%s: got %q, want the commit state in it: %t", op.name, err, op.write)
					}
					if !strings.Contains(err.Error(), "Internal") {
						t.Errorf("%s: got %q, want the code in it", op.name, err)
					}
					if errors.Is(err, client.ErrNotFound) {
						t.Errorf("%s: another domain's reason counts as the broker's", op.name)
					}
				}
			}
		})
	}
}

// brokerInfo is the ErrorInfo of the broker; an empty state is left out.
func brokerInfo(reason secret.Reason, state secret.CommitState) *errdetails.ErrorInfo {
	info := &errdetails.ErrorInfo{Domain: "secrets.exto", Reason: string(reason), Metadata: map[string]string{"audit_id": "audit-7"}}
	if state != "" {
		info.Metadata["commit_state"] = string(state)
	}
	return info
}

func refusal(t *testing.T, code codes.Code, message string, details ...protoadapt.MessageV1) error {
	st, err := status.New(code, message).WithDetails(details...)
	if err != nil {
		t.Errorf("details: %v", err)
	}
	return st.Err()
}
