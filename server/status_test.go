package server_test

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
)

// codesOfReasons is the contract's table.
var codesOfReasons = map[codes.Code][]secret.Reason{
	codes.InvalidArgument:    {"INVALID_INSTANCE_ID", "INVALID_KIND", "INVALID_VALUE", "INVALID_REQUEST", "REQUEST_ID_REUSED"},
	codes.NotFound:           {"SECRET_NOT_FOUND", "VERSION_NOT_FOUND"},
	codes.AlreadyExists:      {"SECRET_EXISTS"},
	codes.Aborted:            {"VERSION_MISMATCH"},
	codes.FailedPrecondition: {"SECRET_DISABLED", "SECRET_DELETED", "SECRET_NOT_DELETED", "VALUE_UNCHANGED", "VERSION_EXPIRED", "KEY_MISMATCH"},
	codes.Unauthenticated:    {"CALLER_UNKNOWN"},
	codes.PermissionDenied:   {"CALLER_NOT_ALLOWED"},
	codes.ResourceExhausted:  {"CALLER_QUOTA_EXCEEDED"},
	codes.Unavailable:        {"VAULT_UNAVAILABLE", "VAULT_THROTTLED", "VAULT_REFUSED", "STALENESS_UNSATISFIABLE", "AUDIT_UNAVAILABLE", "SHUTTING_DOWN", "NOT_ACTIVE"},
	codes.DeadlineExceeded:   {"DEADLINE_EXCEEDED"},
	codes.Canceled:           {"CANCELLED"},
	codes.Internal:           {"DEFECT"},
}

// declaredReasons are the constants of type Reason in package secret.
func declaredReasons(t *testing.T) (reasons []secret.Reason) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../secret/reason.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if kind, ok := spec.Type.(*ast.Ident); ok && kind.Name == "Reason" {
			for _, v := range spec.Values {
				word, err := strconv.Unquote(v.(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				reasons = append(reasons, secret.Reason(word))
			}
		}
		return true
	})
	if len(reasons) < 20 {
		t.Fatalf("found only the reasons %v", reasons)
	}
	return reasons
}

// TestEachReasonOverTheWire lets each reason end a read and a write, and looks at
// all that the caller is told.
func TestEachReasonOverTheWire(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	c := s.as(consoleAPI)
	const retry = 7 * time.Second
	byInstance := map[string]secret.Reason{}
	for _, r := range declaredReasons(t) {
		byInstance[strings.ToLower(strings.ReplaceAll(string(r), "_", "-"))] = r
	}
	s.vault.SetBefore(func(_ context.Context, _ string, key secret.Key) error {
		reason := byInstance[key.InstanceID().String()]
		e := &broker.Error{Reason: reason, Message: "do something about it", Key: key}
		if reason == secret.VaultThrottled {
			e.RetryAfter = retry
		}
		if slices.Contains(codesOfReasons[codes.InvalidArgument], reason) {
			e.Field = "ref.instance_id"
		}
		return e
	})
	for instance, reason := range byInstance {
		t.Run(string(reason), func(t *testing.T) {
			t.Parallel()
			ctx, r := callContext(t), ref(instance, uriKind)
			_, get := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: r})
			_, describe := c.DescribeSecret(ctx, &secretsv1.DescribeSecretRequest{Ref: r})
			_, list := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{InstanceId: instance})
			for _, err := range []error{get, describe, list} {
				wantTold(t, err, reason, "", instance, retry)
			}
			_, put := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: r, Value: uri(1)})
			_, rotate := c.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: r, NewValue: uri(1)})
			_, del := c.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: r})
			_, rec := c.RecoverSecret(ctx, &secretsv1.RecoverSecretRequest{Ref: r})
			for _, err := range []error{put, rotate, del, rec} {
				wantTold(t, err, reason, secret.NotApplied, instance, retry)
			}
		})
	}
}

// wantTold checks the whole status of an error about the database URI of an
// instance, or about its first secret where a list met it.
func wantTold(t *testing.T, err error, reason secret.Reason, commit secret.CommitState, instance string, retry time.Duration) {
	t.Helper()
	f := failed(t, err)
	if !slices.Contains(codesOfReasons[f.code], reason) || f.reason != reason || f.commit != commit {
		t.Errorf("got %v with reason %q and commit state %q, want %s with %q and the contract's code", f.status, f.reason, f.commit, reason, commit)
	}
	message := f.status.Message()
	if !strings.HasPrefix(message, string(reason)+": ") {
		t.Errorf("got message %q, want it to begin with the reason", message)
	}
	if end := fmt.Sprintf(" (commit_state %s)", commit); strings.HasSuffix(message, end) != (commit != "") || strings.Count(message, "commit_state") != min(len(commit), 1) {
		t.Errorf("got message %q, want it to end with its commit state, on writes alone", message)
	}
	if reason == secret.Defect && !contains(message, f.auditID) {
		t.Errorf("got message %q, want the audit id %s in it", message, f.auditID)
	}

	key := "instance-" + instance
	isKey := func(s string) bool { return s == key || s == key+"-dburi" }
	var got []string
	for _, d := range f.status.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			got = append(got, "ErrorInfo")
			_, hasCommit := d.Metadata["commit_state"]
			if id, err := uuid.Parse(d.Metadata["audit_id"]); err != nil || id == uuid.Nil || d.Domain != "secrets.exto" || hasCommit != (commit != "") || d.Reason != string(reason) {
				t.Errorf("got %v", d)
			}
		case *errdetails.BadRequest:
			got = append(got, "BadRequest")
			if len(d.FieldViolations) != 1 || d.FieldViolations[0].Field != "ref.instance_id" {
				t.Errorf("got %v", d)
			}
		case *errdetails.PreconditionFailure:
			got = append(got, "PreconditionFailure")
			if len(d.Violations) != 1 || d.Violations[0].Type != string(reason) || !isKey(d.Violations[0].Subject) {
				t.Errorf("got %v", d)
			}
		case *errdetails.ResourceInfo:
			got = append(got, "ResourceInfo")
			if d.ResourceType != "exto.secrets.v1.Secret" || !isKey(d.ResourceName) {
				t.Errorf("got %v", d)
			}
		case *errdetails.RetryInfo:
			got = append(got, "RetryInfo")
			if d.RetryDelay.AsDuration() != retry {
				t.Errorf("got %v, want %v", d, retry)
			}
		default:
			t.Errorf("got a detail %T", d)
		}
	}
	want := []string{"ErrorInfo"}
	switch f.code {
	case codes.InvalidArgument:
		want = append(want, "BadRequest")
	case codes.NotFound, codes.AlreadyExists:
		want = append(want, "ResourceInfo")
	case codes.FailedPrecondition, codes.Aborted:
		want = append(want, "PreconditionFailure")
	}
	if reason == secret.VaultThrottled {
		want = append(want, "RetryInfo")
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s: got details %v, want %v", reason, got, want)
	}
}

// TestDetailsOfRealErrors: errors that nothing was made up for.
func TestDetailsOfRealErrors(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	c, ctx := s.as(consoleAPI), callContext(t)
	_, err := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", uriKind)})
	wantTold(t, err, secret.SecretNotFound, "", "demo", 0)
	_, err = c.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: ref("demo", uriKind), NewValue: uri(1)})
	wantTold(t, err, secret.SecretNotFound, secret.NotApplied, "demo", 0)
	if _, err := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", uriKind), Value: uri(1)}); err != nil {
		t.Fatal(err)
	}
	_, err = c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", uriKind), Value: uri(2), Precondition: &secretsv1.PutSecretRequest_MustNotExist{MustNotExist: true}})
	wantTold(t, err, secret.SecretExists, secret.NotApplied, "demo", 0)
	_, err = c.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: ref("demo", uriKind), MustMatchVersion: "another"})
	wantTold(t, err, secret.VersionMismatch, secret.NotApplied, "demo", 0)
	_, err = c.RecoverSecret(ctx, &secretsv1.RecoverSecretRequest{Ref: ref("demo", uriKind)})
	wantTold(t, err, secret.SecretNotDeleted, secret.NotApplied, "demo", 0)
	_, err = c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", uriKind), Version: "another"})
	wantTold(t, err, secret.VersionNotFound, "", "demo", 0)
	_, err = s.as(operator).RecoverSecret(ctx, &secretsv1.RecoverSecretRequest{Ref: ref("demo", uriKind)})
	wantTold(t, err, secret.CallerNotAllowed, secret.NotApplied, "demo", 0)
	_, err = s.as("nobody").GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", uriKind)})
	wantTold(t, err, secret.CallerUnknown, "", "demo", 0)
	if a, b := failed(t, err).auditID, failed(t, s.refusedAgain(ctx)).auditID; a == b {
		t.Errorf("two calls have the audit id %s", a)
	}
}

func (s *system) refusedAgain(ctx context.Context) error {
	_, err := s.as("nobody").GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", uriKind)})
	return err
}

// TestUpstreamErrorsStayInTheLog: the caller learns the reason, the log the text
// too, under the same audit id.
func TestUpstreamErrorsStayInTheLog(t *testing.T) {
	t.Parallel()
	const upstream = "upstream-body-7Qz"
	for _, tt := range []struct {
		err    error
		reason secret.Reason
	}{
		{vault.ErrThrottled, secret.VaultThrottled},
		{vault.ErrRefused, secret.VaultRefused},
		{vault.ErrUnavailable, secret.VaultUnavailable},
		{errors.New("of a kind that nobody foresaw"), secret.Defect},
	} {
		t.Run(string(tt.reason), func(t *testing.T) {
			t.Parallel()
			s := startSystem(t)
			s.vault.SetBefore(func(context.Context, string, secret.Key) error {
				return fmt.Errorf("%s: %w", upstream, tt.err)
			})
			c, ctx := s.as(consoleAPI), callContext(t)
			_, get := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", uriKind)})
			_, put := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", uriKind), Value: uri(1)})
			_, list := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{})
			for call, err := range map[string]error{"get": get, "put": put, "list": list} {
				f := failed(t, err)
				if f.reason != tt.reason {
					t.Errorf("%s: got %v, want %s", call, err, tt.reason)
				}
				if told := everythingOf(f.status); contains(told, upstream) || contains(told, tt.err.Error()) {
					t.Errorf("%s: the caller is told %s", call, told)
				}
				if !s.logHasLine(f.auditID, upstream) {
					t.Errorf("%s: no line of the log has the audit id and the cause", call)
				}
				if tt.reason == secret.VaultThrottled && !contains(everythingOf(f.status), "retry_delay") {
					t.Errorf("%s: no RetryInfo", call)
				}
			}
		})
	}
}

// everythingOf is all text in a status. fmt would print the details as bytes.
func everythingOf(st *status.Status) string {
	text := st.Message()
	for _, d := range st.Details() {
		text += "\n" + fmt.Sprint(d)
	}
	return text
}

// logHasLine reports whether one line of the log has all of the parts.
func (s *system) logHasLine(parts ...string) bool {
	for line := range strings.Lines(s.log.String()) {
		if !slices.ContainsFunc(parts, func(p string) bool { return !contains(line, p) }) {
			return true
		}
	}
	return false
}

// TestPanics: a caller gets the constant message with the audit id, and the text
// of the panic, which may hold anything, goes nowhere.
func TestPanics(t *testing.T) {
	t.Parallel()
	const canary = "panic-7Qz-with-a-value"
	tests := []struct {
		name   string
		op     string // the vault's method that panics
		after  bool
		call   func(context.Context, secretsv1.SecretsBrokerServiceClient) error
		commit secret.CommitState
	}{
		{"read", "Get", false, func(ctx context.Context, c secretsv1.SecretsBrokerServiceClient) error {
			_, err := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", uriKind)})
			return err
		}, ""},
		{"list", "List", true, func(ctx context.Context, c secretsv1.SecretsBrokerServiceClient) error {
			_, err := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{})
			return err
		}, ""},
		{"write, before its effect", "Get", false, func(ctx context.Context, c secretsv1.SecretsBrokerServiceClient) error {
			_, err := c.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: ref("demo", uriKind)})
			return err
		}, secret.NotApplied},
		{"write, after its effect", "Set", true, func(ctx context.Context, c secretsv1.SecretsBrokerServiceClient) error {
			_, err := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", uriKind), Value: uri(1)})
			return err
		}, secret.Unknown},
	}
	for _, tt := range tests {
		for _, p := range []any{canary, errors.New(canary), []byte(canary)} {
			t.Run(fmt.Sprintf("%s/%T", tt.name, p), func(t *testing.T) {
				t.Parallel()
				s := startSystem(t)
				c, ctx := s.as(consoleAPI), callContext(t)
				if tt.after {
					s.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
						if op == tt.op {
							panic(p)
						}
						return err
					})
				} else {
					s.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
						if op == tt.op {
							panic(p)
						}
						return nil
					})
				}
				err := tt.call(ctx, c)
				f := failed(t, err)
				want := "DEFECT: the broker failed; report this with audit id " + f.auditID
				if tt.commit != "" {
					want += fmt.Sprintf(" (commit_state %s)", tt.commit)
				}
				if f.code != codes.Internal || f.reason != secret.Defect || f.commit != tt.commit || f.status.Message() != want {
					t.Errorf("got %v with commit state %q, want INTERNAL %q with %q", f.status, f.commit, want, tt.commit)
				}
				if told := everythingOf(f.status); contains(told, canary) || contains(told, ".go:") || contains(told, "goroutine") {
					t.Errorf("the caller is told %s", told)
				}
				log := s.log.String()
				if contains(log, canary) || contains(log, hex.EncodeToString([]byte(canary))) || contains(log, fmt.Sprint([]byte(canary))) {
					t.Error("the log has the panic's text")
				}
				if !s.logHasLine(f.auditID, "panic") {
					t.Error("the log has no line about the panic with its audit id")
				}

				// Nothing is held: the broker goes on, for the same secret too.
				s.vault.SetBefore(nil)
				s.vault.SetAfter(nil)
				if _, err := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", uriKind), Value: uri(2)}); err != nil {
					t.Errorf("a write afterwards: %v", err)
				}
			})
		}
	}
}

// TestCanaryInEachField puts something secret into each string of each request:
// neither an error nor the log shows any of it.
func TestCanaryInEachField(t *testing.T) {
	notRacing(t)
	t.Parallel()
	const canary = "Zq7Vx9Kw3Lm5Jb8Tf2"
	x := startSystem(t).in(t, "demo", "active")
	conn := x.dial(x.clientTLS(x.certificate("spiffe://console.exto/" + consoleAPI)))
	requests := map[string]proto.Message{}
	for method, d := range decisions() {
		if d.request != nil {
			requests[method] = d.request("demo")
		}
	}
	tried := 0
	for method, valid := range requests {
		for _, kind := range secret.Kinds() {
			for _, path := range stringFields(valid.ProtoReflect().Descriptor()) {
				for _, sent := range []string{canary, canary + "\n", "mongodb://u:" + canary + "@", "exto_rt_" + canary} {
					in := proto.Clone(valid).ProtoReflect()
					if r := in.Descriptor().Fields().ByName("ref"); r != nil {
						m := in.Mutable(r).Message()
						m.Set(m.Descriptor().Fields().ByName("kind"), protoreflect.ValueOfEnum(protoreflect.EnumNumber(kind)))
					}
					m := in
					for _, fd := range path[:len(path)-1] {
						m = m.Mutable(fd).Message()
					}
					m.Set(path[len(path)-1], protoreflect.ValueOfString(sent))
					tried++
					// A value that is accepted is not refused: then there is no error.
					if err := conn.Invoke(x.ctx, method, in.Interface(), &emptypb.Empty{}); err != nil {
						f := failed(t, err)
						wantNoRunOf(t, everythingOf(f.status), canary, fmt.Sprintf("%s with a canary in %s", method, path[len(path)-1].FullName()))
						if f.reason == "" || f.reason == secret.Defect {
							t.Errorf("%s with a canary in %s: got %v", method, path[len(path)-1].FullName(), err)
						}
					}
				}
			}
		}
	}
	if tried < 100 {
		t.Errorf("tried only %d requests", tried)
	}
	wantNoRunOf(t, x.log.String(), canary, "the log")
}

// stringFields are the ways to all strings in a message.
func stringFields(m protoreflect.MessageDescriptor) (paths [][]protoreflect.FieldDescriptor) {
	for i := range m.Fields().Len() {
		switch fd := m.Fields().Get(i); {
		case fd.Kind() == protoreflect.StringKind:
			paths = append(paths, []protoreflect.FieldDescriptor{fd})
		case fd.Kind() == protoreflect.MessageKind && !fd.IsList() && fd.ParentFile() == fd.Message().ParentFile():
			for _, p := range stringFields(fd.Message()) {
				paths = append(paths, append([]protoreflect.FieldDescriptor{fd}, p...))
			}
		}
	}
	return paths
}

// wantNoRunOf checks that text has no four characters of the canary in a row.
func wantNoRunOf(t *testing.T, text, canary, what string) {
	t.Helper()
	text, canary = strings.ToLower(text), strings.ToLower(canary)
	for i := range len(canary) - 3 {
		if contains(text, canary[i:i+4]) {
			t.Errorf("%s: %q of what was sent is repeated", what, canary[i:i+4])
			return
		}
	}
}

// TestValuesAreNotLogged takes values through all operations, some of which fail,
// and looks for them in the log of everything.
func TestValuesAreNotLogged(t *testing.T) {
	t.Parallel()
	x := startSystem(t).in(t, "demo", "absent")
	oidc := ref("demo", secretsv1.SecretKind_SECRET_KIND_OIDC_CLIENT_SECRET)
	token := ref("demo", tokenKind)
	values := []string{"postgres://app:Kw3Lm5Jb8Tf2@db-7/orders", "mongodb://app:Rr4Nn6Pp8Ss1@a:27017,b:27017/db", "Oidc-Client-Secret-Gg5Hh7", "Given-Token-Uu2Vv4Ww6", "Outside-Xx1Yy3Zz5"}
	passwords := []string{"Kw3Lm5Jb8Tf2", "Rr4Nn6Pp8Ss1"}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	put := func(r *secretsv1.SecretRef, value string) {
		t.Helper()
		_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: r, Value: value, RequestId: uuid.NewString()})
		must(err)
	}
	put(x.ref, values[0])
	put(x.ref, values[0])
	_, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: values[1], GracePeriod: durationpb.New(time.Hour)})
	must(err)
	put(oidc, values[2])
	put(token, values[3])
	minted, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: token})
	must(err)
	values = append(values, minted.GetValue())
	got, err := x.get("")
	must(err)
	if got.GetValue() != values[1] {
		t.Fatalf("got another value than the one rotated to")
	}
	_, err = x.c.DescribeSecret(x.ctx, &secretsv1.DescribeSecretRequest{Ref: x.ref})
	must(err)
	_, err = x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: values[1]})
	wantReason(t, err, secret.ValueUnchanged, secret.NotApplied)
	_, err = x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: values[0], Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: "another"}})
	wantReason(t, err, secret.VersionMismatch, secret.NotApplied)
	x.setOutside(values[4])
	_, err = x.get("")
	must(err)
	x.delete()
	put(x.ref, values[0])
	x.delete()
	_, err = x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref})
	must(err)
	x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
		if op == "Set" {
			return vault.Uncertain(vault.ErrUnavailable)
		}
		return err
	})
	x.hurried.Store(true)
	_, _ = x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: values[1]})
	x.vault.SetAfter(nil)
	x.restart()
	_, err = x.as(consoleAPI).GetSecret(x.ctx, &secretsv1.GetSecretRequest{Ref: oidc})
	must(err)

	log := x.log.String()
	if !contains(log, "GetSecret") {
		t.Fatal("the log has no line for each call: nothing was tested")
	}
	for _, v := range append(values, passwords...) {
		for form, s := range encodings(v) {
			if contains(log, s) || contains(strings.ToLower(log), strings.ToLower(s)) {
				t.Errorf("the log has a value (%.8s…), %s", v, form)
			}
		}
	}
}

// encodings are the forms in which a value may stand in a text. What base64 makes
// of it depends on what stands before; the characters at both ends depend on the
// neighbours and are left out.
func encodings(v string) map[string]string {
	forms := map[string]string{"raw": v, "in hex": hex.EncodeToString([]byte(v)), "as numbers": strings.Trim(fmt.Sprint([]byte(v)), "[]")}
	for before := range 3 {
		s := base64.RawStdEncoding.EncodeToString([]byte(strings.Repeat("x", before) + v))
		s = s[(before*8+5)/6 : len(s)-1]
		forms[fmt.Sprintf("in base64 (%d)", before)] = s
		forms[fmt.Sprintf("in base64url (%d)", before)] = strings.NewReplacer("+", "-", "/", "_").Replace(s)
	}
	return forms
}

// TestSecretFieldsAreMarked: each string of the contract is one of those known to
// hold no secret, or it has debug_redact.
func TestSecretFieldsAreMarked(t *testing.T) {
	t.Parallel()
	harmless := map[string]bool{}
	for _, name := range []string{
		"SecretRef.instance_id",
		"SecretMetadata.key", "SecretMetadata.version", "SecretMetadata.created_by",
		"PutSecretRequest.must_match_version", "PutSecretRequest.request_id",
		"GetSecretRequest.version", "GetSecretRequest.known_version",
		"RotateSecretRequest.must_match_version", "RotateSecretRequest.request_id",
		"DeleteSecretRequest.must_match_version", "DeleteSecretRequest.request_id",
		"RecoverSecretRequest.request_id",
		"DescribeSecretResponse.redacted_value",
		"VerifyTokenRequest.instance_id",
		"ListSecretsRequest.instance_id", "ListSecretsRequest.page_token",
		"ListSecretsResponse.next_page_token",
	} {
		harmless[name] = true
	}
	secrets := map[string]bool{
		"PutSecretRequest.value": true, "GetSecretResponse.value": true,
		"RotateSecretRequest.new_value": true, "RotateSecretResponse.value": true,
		"VerifyTokenRequest.token": true,
	}
	file := secretsv1.File_exto_secrets_v1_secrets_proto
	var walk func(protoreflect.MessageDescriptors)
	walk = func(messages protoreflect.MessageDescriptors) {
		for i := range messages.Len() {
			m := messages.Get(i)
			walk(m.Messages())
			for j := range m.Fields().Len() {
				fd := m.Fields().Get(j)
				name := strings.TrimPrefix(string(fd.FullName()), "exto.secrets.v1.")
				marked := fd.Options().(*descriptorpb.FieldOptions).GetDebugRedact()
				text := fd.Kind() == protoreflect.StringKind || fd.Kind() == protoreflect.BytesKind
				switch {
				case text && !marked && !harmless[name]:
					t.Errorf("%s is neither known to hold no secret nor marked with debug_redact", name)
				case marked && harmless[name]:
					t.Errorf("%s is marked, and known to hold no secret", name)
				case secrets[name] && !marked:
					t.Errorf("%s is not marked with debug_redact", name)
				}
				delete(harmless, name)
				delete(secrets, name)
			}
		}
	}
	walk(file.Messages())
	if len(harmless)+len(secrets) > 0 {
		t.Errorf("not in the contract: %v %v", harmless, secrets)
	}
	for i := range file.Imports().Len() {
		if path := file.Imports().Get(i).Path(); !strings.HasPrefix(path, "google/protobuf/") {
			t.Errorf("the contract imports %s", path)
		}
	}
	if file.Imports().Len() == 0 {
		t.Error("found no imports")
	}
}
