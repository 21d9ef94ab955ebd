package server_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
	"github.com/exto/secrets-broker/server/vault/noop"
)

// aWhile is how long a test waits for what has to happen at once.
const aWhile = 2 * time.Minute

// watching is a watch.
type watching struct {
	grpc.ServerStreamingClient[secretsv1.WatchSecretsResponse]
	t   *testing.T
	end context.CancelFunc
}

// watch begins a watch of these secrets.
func watch(t *testing.T, c secretsv1.SecretsBrokerServiceClient, refs ...*secretsv1.SecretRef) *watching {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), aWhile)
	t.Cleanup(cancel)
	stream, err := c.WatchSecrets(ctx, &secretsv1.WatchSecretsRequest{Refs: refs})
	if err != nil {
		t.Fatal(err)
	}
	return &watching{stream, t, cancel}
}

func (x *subject) watch() *watching {
	x.t.Helper()
	return watch(x.t, x.c, x.ref)
}

func (w *watching) next() *secretsv1.WatchSecretsResponse {
	w.t.Helper()
	e, err := w.Recv()
	if err != nil {
		w.t.Fatalf("waiting for an event: %v", err)
	}
	return e
}

// toldOf writes an event as "PUT ACTIVE/3".
func toldOf(e *secretsv1.WatchSecretsResponse) string {
	change := e.GetType().String()[len("CHANGE_TYPE_"):]
	m := e.GetMetadata()
	if bare := (&secretsv1.SecretMetadata{Ref: m.GetRef(), Key: m.GetKey()}); proto.Equal(m, bare) {
		return change
	}
	return fmt.Sprintf("%s %s/%d", change, m.GetState().String()[len("SECRET_STATE_"):], m.GetGeneration())
}

// want checks the next event, in which MISSING has ref and key alone and DELETED a
// time of deletion.
func (w *watching) want(want string) *secretsv1.SecretMetadata {
	w.t.Helper()
	e := w.next()
	m := e.GetMetadata()
	if got := toldOf(e); got != want {
		w.t.Fatalf("got %s (%v), want %s", got, m, want)
	}
	if (m.GetState() == deleted) != (m.GetDeleteTime() != nil) {
		w.t.Errorf("got delete_time %v of a secret that is %v", m.GetDeleteTime(), m.GetState())
	}
	return m
}

// wantEnd checks how a watch ends, whatever it says before.
func (w *watching) wantEnd(code codes.Code, reason secret.Reason) {
	w.t.Helper()
	var err error
	for err == nil {
		_, err = w.Recv()
	}
	if f := failed(w.t, err); f.code != code || f.reason != reason || f.commit != "" {
		w.t.Errorf("got %v %q with commit state %q (%v), want %v %q", f.code, f.reason, f.commit, err, code, reason)
	}
}

// TestWatchBeginsWithThePresentState of each secret, from memory and from the vault
// alike.
func TestWatchBeginsWithThePresentState(t *testing.T) {
	t.Parallel()
	onEachVault(t, testWatchBeginsWithThePresentState)
}

func testWatchBeginsWithThePresentState(t *testing.T, start func(*testing.T) *system) {
	want := map[string]string{
		"absent": "MISSING", "active": "CURRENT ACTIVE/2", "outside": "CURRENT ACTIVE/0", "disabled": "CURRENT DISABLED/2",
		"deleted": "CURRENT DELETED/2", "deleted outside": "CURRENT DELETED/2", "marked": "CURRENT DELETED/2",
	}
	s := start(t)
	var refs []*secretsv1.SecretRef
	stateOf := map[string]string{}
	for _, state := range states {
		x := s.in(t, strings.ReplaceAll(state, " ", "-"), state)
		refs = append(refs, x.ref)
		stateOf[x.key.String()] = state
	}
	s.restart()
	c := s.as(operator)
	for i, when := range []string{"from the vault", "from memory", "after reads that did not look so far"} {
		if i == 2 {
			s.restart()
			c = s.as(consoleAPI)
			for _, r := range refs {
				_, _ = c.GetSecret(callContext(t), &secretsv1.GetSecretRequest{Ref: r})
			}
		}
		w := watch(t, c, refs...)
		for range states {
			e := w.next()
			m := e.GetMetadata()
			state := stateOf[m.GetKey()]
			if got := toldOf(e); got != want[state] {
				t.Errorf("%s, of what is %s: got %s, want %s", when, state, got, want[state])
			}
			if state == "absent" {
				continue
			}
			d, err := c.DescribeSecret(callContext(t), &secretsv1.DescribeSecretRequest{Ref: m.GetRef()})
			if err != nil || !proto.Equal(m, d.GetMetadata()) {
				t.Errorf("%s, of what is %s: got %v, want what Describe says: %v, %v", when, state, m, d.GetMetadata(), err)
			}
		}
	}
}

// TestWatchTellsOfEachWrite with the metadata that its caller got, and of nothing
// that changed nothing.
func TestWatchTellsOfEachWrite(t *testing.T) {
	t.Parallel()
	onEachVault(t, testWatchTellsOfEachWrite)
}

func testWatchTellsOfEachWrite(t *testing.T, start func(*testing.T) *system) {
	s := start(t)
	x := s.in(t, "demo", "absent")
	all := []*watching{x.watch(), watch(t, s.as(instanceDemo), x.ref), watch(t, s.as(operator), ref("other", uriKind), x.ref)}
	for _, w := range all[:2] {
		w.want("MISSING")
	}
	all[2].want("MISSING")
	all[2].want("MISSING")
	put := func(n int, id string) *secretsv1.SecretMetadata {
		t.Helper()
		out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(n), RequestId: id})
		if err != nil {
			t.Fatal(err)
		}
		s.clock.advance(time.Second)
		return out.GetMetadata()
	}
	done := func(o outcome) *secretsv1.SecretMetadata {
		t.Helper()
		if o.err != nil {
			t.Fatal(o.err)
		}
		s.clock.advance(time.Second)
		return o.m
	}
	refused := func(o outcome, reason secret.Reason) {
		t.Helper()
		wantReason(t, o.err, reason, secret.NotApplied)
	}
	ids := []string{uuid.NewString(), uuid.NewString(), uuid.NewString()}
	for _, step := range []struct {
		want string
		do   func() *secretsv1.SecretMetadata
	}{
		{"PUT ACTIVE/1", func() *secretsv1.SecretMetadata { return put(1, ids[0]) }},
		{"PUT ACTIVE/2", func() *secretsv1.SecretMetadata {
			put(1, "")     // unchanged
			put(1, ids[0]) // a replay
			refused(operations["put must_not_exist"](x), secret.SecretExists)
			refused(operations["recover"](x), secret.SecretNotDeleted)
			return put(2, "")
		}},
		{"ROTATED ACTIVE/3", func() *secretsv1.SecretMetadata {
			refused(operations["rotate same"](x), secret.ValueUnchanged)
			refused(operations["rotate on another"](x), secret.VersionMismatch)
			return done(x.rotate(&secretsv1.RotateSecretRequest{NewValue: uri(3), RequestId: ids[1]}))
		}},
		{"DELETED DELETED/3", func() *secretsv1.SecretMetadata {
			done(x.rotate(&secretsv1.RotateSecretRequest{NewValue: uri(3), RequestId: ids[1]}))
			return done(x.remove(&secretsv1.DeleteSecretRequest{RequestId: ids[2]}))
		}},
		{"RECOVERED ACTIVE/3", func() *secretsv1.SecretMetadata {
			done(x.remove(&secretsv1.DeleteSecretRequest{RequestId: ids[2]}))
			done(operations["delete if there"](x))
			refused(operations["rotate"](x), secret.SecretDeleted)
			return done(operations["recover"](x))
		}},
		{"DELETED DELETED/3", func() *secretsv1.SecretMetadata { return done(operations["delete"](x)) }},
		{"PUT ACTIVE/4", func() *secretsv1.SecretMetadata { return put(4, "") }},
		{"DELETED DELETED/4", func() *secretsv1.SecretMetadata { return done(operations["delete"](x)) }},
		{"ROTATED ACTIVE/5", func() *secretsv1.SecretMetadata {
			return done(x.rotate(&secretsv1.RotateSecretRequest{NewValue: uri(5), AllowMissing: true}))
		}},
	} {
		m := step.do()
		for _, w := range all {
			if got := w.want(step.want); !proto.Equal(got, m) {
				t.Errorf("%s: got %v, want what the writer was told: %v", step.want, got, m)
			}
		}
	}
}

// TestNoValueFlowsInAWatch looks for values in all that comes over the wire.
func TestNoValueFlowsInAWatch(t *testing.T) {
	t.Parallel()
	const canary = "q7Zt-canary.x9"
	s := startSystem(t)
	x := s.in(t, "demo", "absent")
	token := s.token(t, "demo")
	in, err := proto.Marshal(&secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{x.ref, token.ref}})
	if err != nil {
		t.Fatal(err)
	}
	conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI)))
	stream, err := conn.NewStream(x.ctx, &grpc.StreamDesc{ServerStreams: true}, secretsv1.SecretsBrokerService_WatchSecrets_FullMethodName, grpc.ForceCodec(bytesCodec{}))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.SendMsg(in); err != nil {
		t.Fatal(err)
	}
	receive := func() {
		t.Helper()
		var raw []byte
		if err := stream.RecvMsg(&raw); err != nil {
			t.Fatal(err)
		}
		wantNoRunOf(t, string(raw), canary, "an event")
		if contains(string(raw), "exto_rt_") {
			t.Error("an event has a token")
		}
	}
	receive()
	receive()
	for n, do := range []func() error{
		func() error {
			_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: "postgres://app:" + canary + "@db/orders"})
			return err
		},
		func() error {
			_, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: "postgres://app:" + canary + "@db/" + canary, GracePeriod: durationOf(time.Hour)})
			return err
		},
		func() error {
			_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: token.ref, Value: canary})
			return err
		},
		func() error {
			_, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: token.ref})
			return err
		},
		func() error { return x.remove(&secretsv1.DeleteSecretRequest{}).err },
		func() error { return operations["recover"](x).err },
		func() error {
			x.setOutside("postgres://app:" + canary + "@db/outside")
			s.clock.advance(25 * time.Second)
			return nil
		},
	} {
		if err := do(); err != nil {
			t.Fatalf("change %d: %v", n, err)
		}
		receive()
	}
}

// TestWatchRequests: 1 to 256 secrets, each once, and all of them the caller's.
func TestWatchRequests(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.policy += `  - identity: spiffe://console.exto/uris
    allow: [watch]
    kinds: [DATABASE_URI]
  - identity: spiffe://console.exto/reader
    allow: [get]
`
	s.startEmbedded()
	refs := func(n int) (refs []*secretsv1.SecretRef) {
		for i := range n {
			refs = append(refs, ref(fmt.Sprint("i-", i), uriKind))
		}
		return refs
	}
	with := func(r *secretsv1.SecretRef) []*secretsv1.SecretRef { return append(refs(3), r) }
	for name, test := range map[string]struct {
		caller string
		refs   []*secretsv1.SecretRef
		code   codes.Code
		reason secret.Reason
		field  string
	}{
		"none":                      {consoleAPI, nil, codes.InvalidArgument, secret.InvalidRequest, "refs"},
		"257":                       {consoleAPI, refs(257), codes.InvalidArgument, secret.InvalidRequest, "refs"},
		"one twice":                 {consoleAPI, with(ref("i-1", uriKind)), codes.InvalidArgument, secret.InvalidRequest, "refs[3]"},
		"no instance id":            {consoleAPI, with(ref("", uriKind)), codes.InvalidArgument, secret.InvalidInstanceID, "refs[3].instance_id"},
		"a bad instance id":         {consoleAPI, with(ref("Demo", uriKind)), codes.InvalidArgument, secret.InvalidInstanceID, "refs[3].instance_id"},
		"a reserved instance id":    {consoleAPI, with(ref("demo-dburi", tokenKind)), codes.InvalidArgument, secret.InvalidInstanceID, "refs[3].instance_id"},
		"no kind":                   {consoleAPI, with(ref("demo", 0)), codes.InvalidArgument, secret.InvalidKind, "refs[3].kind"},
		"an unknown kind":           {consoleAPI, with(ref("demo", 9)), codes.InvalidArgument, secret.InvalidKind, "refs[3].kind"},
		"another's secret":          {instanceDemo, []*secretsv1.SecretRef{ref("demo", uriKind), ref("other", uriKind)}, codes.PermissionDenied, secret.CallerNotAllowed, ""},
		"a secret of another kind":  {"uris", with(ref("demo", tokenKind)), codes.PermissionDenied, secret.CallerNotAllowed, ""},
		"without the permission":    {"reader", refs(1), codes.PermissionDenied, secret.CallerNotAllowed, ""},
		"nor a well-formed request": {"reader", nil, codes.PermissionDenied, secret.CallerNotAllowed, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := watch(t, s.as(test.caller), test.refs...).Recv()
			if f := failed(t, err); f.code != test.code || f.reason != test.reason || f.field != test.field || f.commit != "" {
				t.Errorf("got %v %s of field %q (%v), want %v %s of %q", f.code, f.reason, f.field, err, test.code, test.reason, test.field)
			}
			for _, call := range s.vault.Calls() {
				if !contains(call, "instance-i-") || test.code == codes.PermissionDenied && contains(call, "other") {
					t.Errorf("the vault was asked: %s", call)
				}
			}
		})
	}
	t.Run("256", func(t *testing.T) {
		t.Parallel()
		w, seen := watch(t, s.as("uris"), refs(256)...), map[string]bool{}
		for range 256 {
			seen[w.want("MISSING").GetKey()] = true
		}
		if len(seen) != 256 {
			t.Errorf("got %d secrets, want 256", len(seen))
		}
	})
}

// TestWatchEndsWithTheCertificate of its caller.
func TestWatchEndsWithTheCertificate(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	wall := &clock{now: time.Now()}
	s.config = func(c *server.Config) { c.Now = wall.Now }
	s.startEmbedded()
	x := s.in(t, "demo", "active")
	w := x.watch()
	w.want("CURRENT ACTIVE/2")
	wall.advance(time.Hour + time.Second)
	w.wantEnd(codes.Unauthenticated, secret.CallerUnknown)
}

// TestNothingIsLeftOfAWatch that its client ended, or whose client went away. That
// a secret is watched shows in how the vault is read: an absent one is looked for
// among the deleted, too.
func TestNothingIsLeftOfAWatch(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]func(w *watching, conn *grpc.ClientConn){
		"cancelled":         func(w *watching, _ *grpc.ClientConn) { w.end() },
		"connection closed": func(_ *watching, conn *grpc.ClientConn) { _ = conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startSystem(t)
			x := s.in(t, "demo", "absent")
			conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + operator)))
			// They go on, and theirs stays.
			other := watch(t, x.c, ref("other", uriKind))
			other.want("MISSING")
			w := watch(t, secretsv1.NewSecretsBrokerServiceClient(conn), x.ref, ref("other", uriKind))
			w.want("MISSING")
			w.want("MISSING")
			watched := func(r *secretsv1.SecretRef) bool {
				before := len(s.vault.Calls())
				_, err := x.c.GetSecret(x.ctx, &secretsv1.GetSecretRequest{Ref: r, MaxStaleness: durationOf(0)})
				wantReason(t, err, secret.SecretNotFound, "")
				return len(s.vault.Calls())-before == 2
			}
			if !watched(x.ref) {
				t.Fatal("what is watched is not looked for among the deleted")
			}
			leave(w, conn)
			for watched(x.ref) {
				if other.Context().Err() != nil {
					t.Fatal("it is still watched")
				}
			}
			if !watched(ref("other", uriKind)) {
				t.Error("another's watch has ended too")
			}
		})
	}
}

// TestWatchOfNoop: nothing is kept, so there is nothing to see, for good.
func TestWatchOfNoop(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.startOn(noop.New(s.logger()))
	x := s.in(t, "demo", "absent")
	w := watch(t, x.c, x.ref, ref("other", uriKind))
	w.want("MISSING")
	w.want("MISSING")
	x.put(1)
	x.delete()
	s.clock.advance(time.Hour)
	second := x.watch()
	second.want("MISSING")
	over := s.shutdown(context.Background())
	for _, w := range []*watching{w, second} {
		_, err := w.Recv() // the next that it hears
		wantReason(t, err, secret.ShuttingDown, "")
	}
	wantClosed(t, over, "the end of the shutdown")
}
