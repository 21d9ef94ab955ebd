package server_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// token is a subject of kind REGISTRATION_TOKEN that a rotate can make.
func (s *system) token(t *testing.T, id string) *subject {
	return &subject{system: s, t: t, ctx: callContext(t), c: s.as(consoleAPI), ref: ref(id, tokenKind), key: key(t, id, secret.RegistrationToken)}
}

func (x *subject) rotateToken(requestID string) (*secretsv1.RotateSecretResponse, error) {
	return x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, AllowMissing: true, RequestId: requestID})
}

// reconnect makes the subject talk to the broker that restart began.
func (x *subject) reconnect() { x.c = x.as(consoleAPI) }

func TestRequestIDGivesTheResultAgain(t *testing.T) {
	t.Parallel()
	onEachVault(t, testRequestIDGivesTheResultAgain)
}

func testRequestIDGivesTheResultAgain(t *testing.T, start func(*testing.T) *system) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart %v", restart), func(t *testing.T) {
			t.Parallel()
			x := start(t).token(t, "demo")
			again := func() {
				if restart {
					x.restart()
					x.reconnect()
				}
			}
			id := uuid.NewString()
			first, err := x.rotateToken(id)
			if err != nil {
				t.Fatal(err)
			}
			again()
			second, err := x.rotateToken(id)
			if err != nil || second.GetValue() != first.GetValue() || second.GetMetadata().GetVersion() != first.GetMetadata().GetVersion() || first.GetValue() == "" {
				t.Fatalf("Rotate again: got version %s, %v, want the same token", second.GetMetadata().GetVersion(), err)
			}

			id = uuid.NewString()
			put := func() (*secretsv1.PutSecretResponse, error) {
				return x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: "tok", RequestId: id,
					Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: first.GetMetadata().GetVersion()}})
			}
			p1, err := put()
			if err != nil {
				t.Fatal(err)
			}
			again()
			p2, err := put()
			if err != nil || p2.GetUnchanged() || p2.GetMetadata().GetVersion() != p1.GetMetadata().GetVersion() {
				t.Fatalf("Put again: got %v, %v, want the same version, not unchanged", p2, err)
			}

			id = uuid.NewString()
			del := func() (*secretsv1.DeleteSecretResponse, error) {
				return x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref, RequestId: id})
			}
			if _, err := del(); err != nil {
				t.Fatal(err)
			}
			again()
			if d, err := del(); err != nil || d.GetMetadata().GetState() != deleted {
				t.Fatalf("Delete again: got %v, %v, want OK", d, err)
			}
			deleteID := id

			id = uuid.NewString()
			rec := func() (*secretsv1.RecoverSecretResponse, error) {
				return x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref, RequestId: id})
			}
			if _, err := rec(); err != nil {
				t.Fatal(err)
			}
			again()
			if r, err := rec(); err != nil || r.GetMetadata().GetState() != active {
				t.Fatalf("Recover again: got %v, %v, want OK", r, err)
			}
			// As it stands now: the delete was undone since.
			id = deleteID
			if d, err := del(); err != nil || d.GetMetadata().GetState() != active {
				t.Fatalf("Delete again after the recover: got %v, %v, want OK and ACTIVE", d, err)
			}
			if _, err := x.get(""); err != nil {
				t.Errorf("a repeated delete deleted: %v", err)
			}
		})
	}
}

func TestRequestIDReused(t *testing.T) {
	t.Parallel()
	onEachVault(t, testRequestIDReused)
}

func testRequestIDReused(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	id := uuid.NewString()
	put := func(r *secretsv1.SecretRef, value string) error {
		_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: r, Value: value, RequestId: id})
		return err
	}
	if err := put(x.ref, uri(3)); err != nil {
		t.Fatal(err)
	}
	err := put(x.ref, uri(4))
	wantReason(t, err, secret.RequestIDReused, secret.NotApplied)
	if f := failed(t, err); f.field != "request_id" {
		t.Errorf("got field %q, want request_id", f.field)
	}
	_, err = x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref, RequestId: id})
	wantReason(t, err, secret.RequestIDReused, secret.NotApplied)
	// Not the current version any more, but the vault still gives it.
	x.put(5)
	wantReason(t, put(x.ref, uri(4)), secret.RequestIDReused, secret.NotApplied)
	// Once the vault does not give it, another value can't be told.
	x.delete()
	if err := put(x.ref, uri(4)); err != nil {
		t.Errorf("while deleted: got %v, want the result again", err)
	}
	// On another ref it is another request.
	if err := put(ref("other", uriKind), uri(9)); err != nil {
		t.Errorf("on another ref: %v", err)
	}
}

// others does one further operation on the subject, of a kind that depends on n.
func (x *subject) further(n int) {
	x.t.Helper()
	var err error
	switch n % 4 {
	case 0:
		_, err = x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref})
	case 1:
		_, err = x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref})
	case 2:
		_, err = x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uuid.NewString()})
	case 3:
		_, err = x.rotateToken("")
	}
	if err != nil {
		x.t.Fatal(err)
	}
	x.clock.advance(time.Second)
}

func TestRequestIDIsRememberedForEightFurtherOperations(t *testing.T) {
	notRacing(t)
	t.Parallel()
	onEachVault(t, testRequestIDIsRememberedForEightFurtherOperations)
}

func testRequestIDIsRememberedForEightFurtherOperations(t *testing.T, start func(*testing.T) *system) {
	// Where in the cycle of deletes, recovers, puts and rotates it begins, and
	// which operation is to be remembered.
	for begin := range 4 {
		t.Run(fmt.Sprint("mixed from ", begin), func(t *testing.T) {
			t.Parallel()
			x := start(t).token(t, "demo")
			if begin == 1 { // something to recover
				x.further(3)
				x.further(0)
			}
			id := uuid.NewString()
			do := func() (version string, err error) {
				switch begin {
				case 0:
					out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: "first", RequestId: id})
					return out.GetMetadata().GetVersion(), err
				case 1:
					out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: "over", RequestId: id})
					return out.GetMetadata().GetVersion(), err
				case 2:
					out, err := x.rotateToken(id)
					return out.GetMetadata().GetVersion(), err
				default:
					out, err := x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref, RequestId: id, AllowMissing: true})
					return out.GetMetadata().GetVersion(), err
				}
			}
			from := 0
			if begin == 3 {
				x.further(2)
				from = 1
			}
			want, err := do()
			if err != nil || want == "" {
				t.Fatalf("got version %q, %v", want, err)
			}
			for n := range 8 {
				x.further(from + n)
				got, err := do()
				if begin == 2 && err != nil {
					// The token is not readable while deleted, or expired: applied all the same.
					if f := failed(t, err); f.commit != secret.Applied {
						t.Fatalf("after %d further operations: got %v, want it applied", n+1, err)
					}
					continue
				}
				if err != nil || got != want {
					t.Fatalf("after %d further operations: got %s, %v, want the same again: %s", n+1, got, err, want)
				}
			}
			x.further(from + 8)
			if got, err := do(); err == nil && got == want && begin != 3 {
				t.Errorf("after nine further operations: got the same again, want a new request")
			} else if begin == 3 && err == nil {
				x.wantGet("", secret.SecretNotFound) // it deleted anew
			}
		})
	}
	t.Run("puts, as the contract's example", func(t *testing.T) {
		t.Parallel()
		x := start(t).token(t, "demo")
		id := uuid.NewString()
		first, err := x.rotateToken(id)
		if err != nil {
			t.Fatal(err)
		}
		for n := range 9 {
			again, err := x.rotateToken(id)
			if err != nil || again.GetValue() != first.GetValue() {
				t.Fatalf("after %d puts: got %v, want the same token", n, err)
			}
			if _, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: fmt.Sprint("v", n)}); err != nil {
				t.Fatal(err)
			}
		}
		again, err := x.rotateToken(id)
		if err != nil || again.GetValue() == first.GetValue() || again.GetMetadata().GetGeneration() != 11 {
			t.Errorf("after nine puts: got generation %d, %v, want a new token", again.GetMetadata().GetGeneration(), err)
		}
		// After a further rotate, that version's error, with APPLIED.
		if _, err := x.rotateToken(""); err != nil {
			t.Fatal(err)
		}
		_, err = x.rotateToken(id)
		wantReason(t, err, secret.VersionExpired, secret.Applied)
	})
}

func TestWhatLeavesNoTrace(t *testing.T) {
	t.Parallel()
	onEachVault(t, testWhatLeavesNoTrace)
}

func testWhatLeavesNoTrace(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	id := uuid.NewString()
	put := func(n int) *secretsv1.PutSecretResponse {
		out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(n), RequestId: id})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if !put(2).GetUnchanged() {
		t.Fatal("want unchanged")
	}
	if put(3).GetUnchanged() { // the same id is a new request
		t.Error("got unchanged, want a new version")
	}
	id = uuid.NewString()
	_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(4), RequestId: id, Precondition: &secretsv1.PutSecretRequest_MustNotExist{MustNotExist: true}})
	wantReason(t, err, secret.SecretExists, secret.NotApplied)
	put(5)
	id = uuid.NewString()
	absent := ref("absent", uriKind)
	if out, err := x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: absent, AllowMissing: true, RequestId: id}); err != nil || out.GetMetadata() != nil {
		t.Fatalf("got %v, %v, want OK without metadata", out, err)
	}
	if _, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: absent, Value: uri(1), RequestId: id}); err != nil {
		t.Errorf("the id of a delete of nothing: got %v, want it free", err)
	}
}

func TestRequestIDIsForgottenByAPurge(t *testing.T) {
	t.Parallel()
	onEachVault(t, testRequestIDIsForgottenByAPurge)
}

func testRequestIDIsForgottenByAPurge(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "absent")
	id := uuid.NewString()
	put := func() *secretsv1.SecretMetadata {
		out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(1), RequestId: id})
		if err != nil {
			t.Fatal(err)
		}
		return out.GetMetadata()
	}
	first := put()
	x.delete()
	x.clock.advance(91 * 24 * time.Hour)
	if again := put(); again.GetVersion() == first.GetVersion() || again.GetGeneration() != 1 {
		t.Errorf("got %v, want a new secret", again)
	}
}

func TestRequestIDSurvivesAnOutsideWrite(t *testing.T) {
	t.Parallel()
	onEachVault(t, testRequestIDSurvivesAnOutsideWrite)
}

func testRequestIDSurvivesAnOutsideWrite(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "absent")
	id := uuid.NewString()
	put := func() (*secretsv1.PutSecretResponse, error) {
		return x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(1), RequestId: id})
	}
	first, err := put()
	if err != nil {
		t.Fatal(err)
	}
	x.clock.advance(time.Second)
	x.setOutside(uri(2))
	again, err := put()
	if err != nil || again.GetMetadata().GetVersion() != first.GetMetadata().GetVersion() {
		t.Errorf("got %v, %v, want the same version", again, err)
	}
	x.wantValue("", uri(2))
}

// calls makes each write of a subject that is ACTIVE or, for recover, DELETED.
var writeCalls = map[string]func(x *subject, ctx context.Context, id string) error{
	"put": func(x *subject, ctx context.Context, id string) error {
		_, err := x.c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(3), RequestId: id})
		return err
	},
	"rotate": func(x *subject, ctx context.Context, id string) error {
		_, err := x.c.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: uri(3), RequestId: id})
		return err
	},
	"delete": func(x *subject, ctx context.Context, id string) error {
		_, err := x.c.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref, RequestId: id})
		return err
	},
	"recover": func(x *subject, ctx context.Context, id string) error {
		_, err := x.c.RecoverSecret(ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref, RequestId: id})
		return err
	},
}

func stateFor(write string) string {
	if write == "recover" {
		return "deleted"
	}
	return "active"
}

// effects of each write are these vault calls.
func isEffect(op string) bool {
	return op == "Set" || op == "Update" || op == "Delete" || op == "Recover"
}

func TestVaultFaultsBeforeAnyEffect(t *testing.T) {
	notRacing(t)
	t.Parallel()
	onEachVault(t, testVaultFaultsBeforeAnyEffect)
}

func testVaultFaultsBeforeAnyEffect(t *testing.T, start func(*testing.T) *system) {
	for fault, want := range map[error]secret.Reason{
		vault.ErrUnavailable:                  secret.VaultUnavailable,
		vault.ErrThrottled:                    secret.VaultThrottled,
		vault.ErrRefused:                      secret.VaultRefused,
		errors.New("canary-of-upstream-text"): secret.Defect,
	} {
		for name, write := range writeCalls {
			t.Run(fmt.Sprint(want, " ", name), func(t *testing.T) {
				t.Parallel()
				for _, effects := range []bool{false, true} { // at the look, at the first effect
					x := start(t).in(t, "demo", stateFor(name))
					before := x.stored()
					x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
						if !effects || isEffect(op) {
							return fault
						}
						return nil
					})
					x.hurried.Store(true)
					err := write(x, x.ctx, "")
					wantReason(t, err, want, secret.NotApplied)
					if contains(err.Error(), "canary") || !strings.HasSuffix(failed(t, err).status.Message(), "(commit_state NOT_APPLIED)") {
						t.Errorf("got message %q", err)
					}
					if after := x.stored(); after != before {
						t.Errorf("got %s, want the store as before: %s", after, before)
					}
					retry := false
					for _, d := range failed(t, err).status.Details() {
						_, ok := d.(*errdetails.RetryInfo)
						retry = retry || ok
					}
					if retry != (want == secret.VaultThrottled) {
						t.Errorf("got RetryInfo %v of %s", retry, want)
					}
				}
			})
		}
	}
}

func TestUncertainWrites(t *testing.T) {
	notRacing(t)
	t.Parallel()
	onEachVault(t, testUncertainWrites)
}

func testUncertainWrites(t *testing.T, start func(*testing.T) *system) {
	for name, write := range writeCalls {
		t.Run(name+" that landed", func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", stateFor(name))
			x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
				if err == nil && (op == "Set" || op == "Update") {
					return vault.Uncertain(vault.ErrUnavailable)
				}
				return err
			})
			if err := write(x, x.ctx, ""); err != nil {
				t.Errorf("got %v, want success: the operation id is there", err)
			}
		})
		t.Run(name+" that did not", func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", stateFor(name))
			x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
				if op == "Set" || op == "Update" {
					return vault.Uncertain(vault.ErrUnavailable)
				}
				return nil
			})
			x.hurried.Store(true)
			wantReason(t, write(x, x.ctx, ""), secret.VaultUnavailable, secret.Unknown)
			x.vault.SetBefore(nil)
			if name == "put" || name == "rotate" {
				// It may yet arrive: its generation is not taken again.
				if m := x.put(9).GetMetadata(); m.GetGeneration() != 4 {
					t.Errorf("got generation %d, want a gap: 4", m.GetGeneration())
				}
			}
		})
	}
}

func TestDeleteIsAppliedWithItsMark(t *testing.T) {
	t.Parallel()
	onEachVault(t, testDeleteIsAppliedWithItsMark)
}

func testDeleteIsAppliedWithItsMark(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		if op == "Delete" {
			return vault.ErrUnavailable
		}
		return nil
	})
	id := uuid.NewString()
	wantReason(t, writeCalls["delete"](x, x.ctx, id), secret.VaultUnavailable, secret.Applied)
	x.wantGet("", secret.SecretNotFound)
	x.vault.SetBefore(nil)
	if err := writeCalls["delete"](x, x.ctx, id); err != nil {
		t.Fatalf("the same request again: %v", err)
	}
	x.settle()
	if _, err := x.store.GetDeleted(x.ctx, x.key); err != nil {
		t.Errorf("the vault has not deleted it: %v", err)
	}
}

func TestOneWinnerPerVersion(t *testing.T) {
	t.Parallel()
	onEachVault(t, testOneWinnerPerVersion)
}

func testOneWinnerPerVersion(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	const writers, rounds = 64, 3
	current := x.current
	for round := range rounds {
		var wins, losses atomic.Int32
		var next atomic.Value
		var wg sync.WaitGroup
		for n := range writers {
			wg.Go(func() {
				out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(100*round + n + 10),
					Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: current}})
				if err == nil {
					wins.Add(1)
					next.Store(out.GetMetadata().GetVersion())
					if got := out.GetMetadata().GetGeneration(); got != int64(3+round) {
						t.Errorf("got generation %d, want %d", got, 3+round)
					}
					return
				}
				if f := failed(t, err); f.reason == secret.VersionMismatch && f.commit == secret.NotApplied {
					losses.Add(1)
				} else {
					t.Errorf("got %v, want VERSION_MISMATCH", err)
				}
			})
		}
		wg.Wait()
		if wins.Load() != 1 || losses.Load() != writers-1 {
			t.Fatalf("got %d winners and %d losers, want 1 and %d", wins.Load(), losses.Load(), writers-1)
		}
		current = next.Load().(string)
	}
	// And without a precondition: each generation once.
	seen := sync.Map{}
	var wg sync.WaitGroup
	for n := range writers {
		wg.Go(func() {
			out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(1000 + n)})
			if err != nil {
				t.Error(err)
			} else if _, double := seen.LoadOrStore(out.GetMetadata().GetGeneration(), true); double {
				t.Errorf("generation %d was given twice", out.GetMetadata().GetGeneration())
			}
		})
	}
	wg.Wait()
	for g := int64(3 + rounds); g < 3+rounds+writers; g++ {
		if _, ok := seen.Load(g); !ok {
			t.Errorf("generation %d is missing", g)
		}
	}
}

// hang makes calls of this vault method wait until released, but for those that
// come before a deleted name was recovered; reached is closed when the first one
// does.
func (x *subject) hang(method string, after bool) (reached chan struct{}, release func()) {
	reached, gate := make(chan struct{}), make(chan struct{})
	var once sync.Once
	var recovered atomic.Bool
	_, err := x.store.GetDeleted(x.ctx, x.key)
	recovered.Store(err != nil)
	wait := func(op string) {
		if op == "Recover" {
			recovered.Store(true)
		}
		if op == method && recovered.Load() {
			once.Do(func() { close(reached) })
			<-gate
		}
	}
	if after {
		x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error { wait(op); return err })
	} else {
		x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error { wait(op); return nil })
	}
	release = sync.OnceFunc(func() { close(gate) })
	x.t.Cleanup(release)
	return reached, release
}

func TestWriteIsCarriedOnWithoutItsCaller(t *testing.T) {
	t.Parallel()
	onEachVault(t, testWriteIsCarriedOnWithoutItsCaller)
}

func testWriteIsCarriedOnWithoutItsCaller(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	reached, release := x.hang("Set", false)
	id := uuid.NewString()
	ctx, leave := context.WithCancel(x.ctx)
	first := make(chan error, 1)
	go func() { first <- writeCalls["put"](x, ctx, id) }()
	<-reached
	leave()
	<-first // the caller's own gRPC says only that it left

	// Who waits for the same request past its deadline is told that it may be.
	short, cancel := context.WithTimeout(x.ctx, 300*time.Millisecond)
	defer cancel()
	_ = writeCalls["put"](x, short, id)

	second := make(chan error, 1)
	go func() { second <- writeCalls["put"](x, x.ctx, id) }()
	release()
	if err := <-second; err != nil {
		t.Fatalf("the same request again: got %v, want its result", err)
	}
	out, err := x.get("")
	if err != nil || out.GetValue() != uri(3) || out.GetMetadata().GetGeneration() != 3 {
		t.Errorf("got %v, %v, want the write done once", out.GetMetadata(), err)
	}
}

func TestDeadlineOfAnUnaryCallWithoutOne(t *testing.T) {
	t.Parallel()
	onEachVault(t, testDeadlineOfAnUnaryCallWithoutOne)
}

func testDeadlineOfAnUnaryCallWithoutOne(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	left := make(chan time.Duration, 1)
	x.vault.SetBefore(func(ctx context.Context, op string, _ secret.Key) error {
		if deadline, ok := ctx.Deadline(); ok && op == "Get" {
			select {
			case left <- time.Until(deadline):
			default:
			}
		}
		return nil
	})
	if _, err := x.c.GetSecret(context.Background(), &secretsv1.GetSecretRequest{Ref: x.ref, MaxStaleness: durationOf(0)}); err != nil {
		t.Fatal(err)
	}
	if got := <-left; got > 30*time.Second || got < 20*time.Second {
		t.Errorf("got %v for a read, want 30 s", got)
	}
}
