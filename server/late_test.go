package server_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
)

// fault makes the vault do this to the first n of the requests of this kind for
// the subject that come from now on; 0: to all.
func (x *subject) fault(op keyvaultfake.Op, n int, fault keyvaultfake.Fault) {
	var mu sync.Mutex
	met := 0
	x.fake.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		mu.Lock()
		defer mu.Unlock()
		if r.Op != op || r.Challenge || r.Name != x.key.String() {
			return keyvaultfake.Fault{}
		}
		if met++; n > 0 && met > n {
			return keyvaultfake.Fault{}
		}
		return fault
	})
}

// versions are the subject's in the vault, in order of creation.
func (x *subject) versions() []keyvaultfake.Version { return x.fake.Versions(x.key.String()) }

// land lets time pass until what was sent and not committed yet is.
func (x *subject) land() {
	x.clock.advance(31 * time.Minute)
	x.fake.Settle()
}

// wantPutDown looks until the version with this value is disabled in the vault.
// Each look is a call that must not give it.
func (x *subject) wantPutDown(late, current string) {
	x.t.Helper()
	for {
		out, err := x.get("")
		if err != nil || out.GetValue() != current {
			x.t.Fatalf("got %v, %v, want the value of the greatest generation", out.GetMetadata(), err)
		}
		for _, v := range x.versions() {
			if v.Value == late && !v.Enabled {
				return
			}
		}
		if x.ctx.Err() != nil {
			x.t.Fatal("the late version was not put down")
		}
	}
}

// TestCutAfterCommit: the answer of any one request that changes something is
// lost. It happened once, and its caller is told so.
func TestCutAfterCommit(t *testing.T) {
	notRacing(t)
	t.Parallel()
	put := func(x *subject) error { return writeCalls["put"](x, x.ctx, uuid.NewString()) }
	for _, test := range []struct {
		name, state string
		call        func(*subject) error
		op          keyvaultfake.Op
		versions    int
	}{
		{"put", "active", put, keyvaultfake.OpSet, 3},
		{"put of the first", "absent", put, keyvaultfake.OpSet, 1},
		{"put over disabled", "disabled", func(x *subject) error {
			_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(3), Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: x.current}})
			return err
		}, keyvaultfake.OpSet, 3},
		{"put over deleted", "deleted", put, keyvaultfake.OpSet, 3},
		{"put over deleted, recovering", "deleted", put, keyvaultfake.OpRecover, 3},
		{"put over deleted outside, recovering", "deleted outside", put, keyvaultfake.OpRecover, 3},
		{"rotate", "active", func(x *subject) error { return writeCalls["rotate"](x, x.ctx, uuid.NewString()) }, keyvaultfake.OpSet, 3},
		{"delete, marking", "active", func(x *subject) error { return writeCalls["delete"](x, x.ctx, uuid.NewString()) }, keyvaultfake.OpUpdate, 2},
		{"delete, deleting", "active", func(x *subject) error { return writeCalls["delete"](x, x.ctx, uuid.NewString()) }, keyvaultfake.OpDelete, 2},
		{"recover, recovering", "deleted", func(x *subject) error { return writeCalls["recover"](x, x.ctx, uuid.NewString()) }, keyvaultfake.OpRecover, 2},
		{"recover, unmarking", "deleted", func(x *subject) error { return writeCalls["recover"](x, x.ctx, uuid.NewString()) }, keyvaultfake.OpUpdate, 2},
	} {
		for kind, fault := range map[string]keyvaultfake.Fault{
			"after": {CutAfter: true}, "before": {Cut: true}, "503": {Status: 503}, "500": {Status: 500}, "429": {Status: 429},
		} {
			if kind == "429" && test.name != "put" && test.name != "delete, marking" {
				continue // each costs a second
			}
			t.Run(test.name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				x := startKeyVault(t).in(t, "demo", test.state)
				x.fault(test.op, 1, fault)
				if err := test.call(x); err != nil {
					t.Fatalf("got %v, want success", err)
				}
				if got := len(x.versions()); got != test.versions {
					t.Errorf("got %d versions, want %d: the write once", got, test.versions)
				}
				x.fake.OnRequest(nil)
				x.settle()
				if test.name[:3] == "del" {
					x.wantGet("", secret.SecretNotFound)
				} else if _, err := x.get(""); err != nil {
					t.Errorf("got %v afterwards", err)
				}
			})
		}
	}
}

// TestCommitAfterTheRetry: what was sent first arrives after what was sent again.
// Both are one write: one value, one generation.
func TestCommitAfterTheRetry(t *testing.T) {
	t.Parallel()
	x := startKeyVault(t).token(t, "demo")
	first, err := x.rotateToken("")
	if err != nil {
		t.Fatal(err)
	}
	x.clock.advance(time.Second)
	x.fault(keyvaultfake.OpSet, 1, keyvaultfake.Fault{LateCommit: 30 * time.Minute})
	id := uuid.NewString()
	out, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, RequestId: id})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(x.versions()); got != 2 {
		t.Fatalf("got %d versions before it arrives, want 2", got)
	}
	x.land()
	if got := len(x.versions()); got != 3 {
		t.Fatalf("got %d versions, want 3: what was sent twice arrived twice", got)
	}
	again, err := x.get("")
	if err != nil || again.GetValue() != out.GetValue() || again.GetMetadata().GetGeneration() != 2 {
		t.Errorf("got %v, %v, want the token that the caller holds, at generation 2", again.GetMetadata(), err)
	}
	d, err := x.c.DescribeSecret(x.ctx, &secretsv1.DescribeSecretRequest{Ref: x.ref})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int64{2, 2, 1} {
		if got := d.GetVersions()[i]; got.GetGeneration() != want || got.GetState() != active {
			t.Errorf("version %d: got %v, want it active at generation %d", i, got, want)
		}
	}
	// To a caller the two are one version.
	replay, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, RequestId: id})
	if err != nil || replay.GetValue() != out.GetValue() {
		t.Errorf("the same request again: got %v, want the same token", err)
	}
	if _, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: "next", Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: out.GetMetadata().GetVersion()}}); err != nil {
		t.Errorf("must_match_version with the version that the caller was told: got %v", err)
	}
	_, err = x.get(first.GetMetadata().GetVersion())
	wantReason(t, err, secret.VersionExpired, "")
	if got := x.versions(); !got[1].Enabled || !got[2].Enabled {
		t.Error("one of the two was put down")
	}
}

// unknownRotate is a rotate of the subject's token that the vault commits late,
// told to be of unknown outcome.
func (x *subject) unknownRotate(id string, late time.Duration) {
	x.t.Helper()
	x.fault(keyvaultfake.OpSet, 1, keyvaultfake.Fault{LateCommit: late})
	x.hurried.Store(true)
	_, err := x.rotateToken(id)
	wantReason(x.t, err, secret.VaultUnavailable, secret.Unknown)
	x.hurried.Store(false)
	x.fake.OnRequest(nil)
}

// TestCommitAfterAnotherWrite, after a restart too: what is late ends disabled and
// is never given to a caller.
func TestCommitAfterAnotherWrite(t *testing.T) {
	t.Parallel()
	for _, restarts := range []int{0, 1} {
		for _, reader := range []string{"get", "describe", "put", "delete"} {
			t.Run(fmt.Sprintf("%d restarts, noticed by %s", restarts, reader), func(t *testing.T) {
				t.Parallel()
				x := startKeyVault(t).token(t, "demo")
				if _, err := x.rotateToken(""); err != nil {
					t.Fatal(err)
				}
				x.clock.advance(time.Second)
				id := uuid.NewString()
				x.unknownRotate(id, 30*time.Minute)
				for range restarts {
					x.restart()
					x.reconnect()
				}
				// Another caller's write after it; after a restart also the same request.
				current := "another"
				if restarts == 0 {
					if _, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: current}); err != nil {
						t.Fatal(err)
					}
				} else {
					out, err := x.rotateToken(id)
					if err != nil {
						t.Fatal(err)
					}
					current = out.GetValue()
				}
				before := len(x.versions())
				x.land()
				if got := len(x.versions()); got != before+1 {
					t.Fatalf("got %d versions, want %d: the late one has arrived", got, before+1)
				}
				all := x.versions()
				late := all[len(all)-1].Value
				switch reader {
				case "describe":
					d, err := x.c.DescribeSecret(x.ctx, &secretsv1.DescribeSecretRequest{Ref: x.ref})
					if err != nil || d.GetMetadata().GetVersion() == all[len(all)-1].ID {
						t.Fatalf("got %v, %v, want the greater one current", d.GetMetadata(), err)
					}
				case "put":
					current = "over-it"
					if _, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: current}); err != nil {
						t.Fatal(err)
					}
				case "delete":
					if _, err := x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref}); err != nil {
						t.Fatal(err)
					}
					if _, err := x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref}); err != nil {
						t.Fatal(err)
					}
				}
				x.wantPutDown(late, current)
				d, err := x.c.DescribeSecret(x.ctx, &secretsv1.DescribeSecretRequest{Ref: x.ref})
				if err != nil {
					t.Fatal(err)
				}
				for _, v := range d.GetVersions() {
					if v.GetVersion() == all[len(all)-1].ID && v.GetState() != disabled {
						t.Errorf("got %v, want the late version shown disabled", v)
					}
				}
				_, err = x.get(all[len(all)-1].ID)
				wantReason(t, err, secret.SecretDisabled, "")
				// Whoever looks in the vault directly has the right value too.
				if _, value, err := x.store.Get(x.ctx, x.key, ""); err != nil || value.Reveal() != current {
					t.Errorf("got %v, want the current value on top in the vault", err)
				}
				// And the request is settled: the same again is a new write or its result.
				if restarts == 1 {
					if again, err := x.rotateToken(id); err == nil && reader == "get" && again.GetValue() != current {
						t.Error("the same request again gave another token than the one that counts")
					}
				}
			})
		}
	}
}

// TestPutDownKeepsWhatTheGreatestSaid: who wrote it, its grace, and the ids that
// are remembered.
func TestPutDownKeepsWhatTheGreatestSaid(t *testing.T) {
	t.Parallel()
	x := startKeyVault(t).in(t, "demo", "active")
	x.fault(keyvaultfake.OpSet, 1, keyvaultfake.Fault{LateCommit: 30 * time.Minute})
	x.hurried.Store(true)
	wantReason(t, writeCalls["put"](x, x.ctx, ""), secret.VaultUnavailable, secret.Unknown)
	x.hurried.Store(false)
	x.fake.OnRequest(nil)
	id := uuid.NewString()
	out, err := x.as(worker).RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: uri(7), GracePeriod: durationOf(2 * time.Hour), RequestId: id})
	if err != nil {
		t.Fatal(err)
	}
	x.land()
	x.wantPutDown(uri(3), uri(7))
	got, err := x.get("")
	if err != nil {
		t.Fatal(err)
	}
	if m := got.GetMetadata(); m.GetCreatedBy() != "spiffe://console.exto/worker" || m.GetGeneration() != out.GetMetadata().GetGeneration()+1 {
		t.Errorf("got %v, want it by the worker, one generation more than %d", m, out.GetMetadata().GetGeneration())
	}
	x.wantValue(x.current, uri(2)) // in grace still
	d, err := x.c.DescribeSecret(x.ctx, &secretsv1.DescribeSecretRequest{Ref: x.ref})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range d.GetVersions() {
		if v.GetVersion() == x.current && !v.GetExpireTime().AsTime().Equal(out.GetPrevious().GetExpireTime().AsTime()) {
			t.Errorf("got grace until %v, want %v", v.GetExpireTime().AsTime(), out.GetPrevious().GetExpireTime().AsTime())
		}
	}
	again, err := x.as(worker).RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: uri(7), RequestId: id})
	if err != nil || again.GetMetadata().GetVersion() != out.GetMetadata().GetVersion() {
		t.Errorf("the same request again: got %v, %v, want its version", again.GetMetadata(), err)
	}
	x.clock.advance(2 * time.Hour)
	x.wantGet(x.current, secret.VersionExpired)
}

// TestRetryOfAnUnknownWrite: the same process sends the same value, and says
// UNKNOWN as long as the first may count.
func TestRetryOfAnUnknownWrite(t *testing.T) {
	t.Parallel()
	t.Run("gives the token that may arrive late", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).token(t, "demo")
		id := uuid.NewString()
		x.unknownRotate(id, 30*time.Minute)
		out, err := x.rotateToken(id)
		if err != nil {
			t.Fatal(err)
		}
		x.land()
		all := x.versions()
		if len(all) != 2 || all[0].Value != all[1].Value || all[0].Value != out.GetValue() {
			t.Errorf("got %d versions, want two with the caller's token", len(all))
		}
		got, err := x.get("")
		if err != nil || got.GetMetadata().GetGeneration() != 1 {
			t.Errorf("got %v, %v, want generation 1", got.GetMetadata(), err)
		}
	})
	t.Run("after another write", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).token(t, "demo")
		id := uuid.NewString()
		x.unknownRotate(id, 30*time.Minute)
		if _, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: "another"}); err != nil {
			t.Fatal(err)
		}
		x.clock.advance(time.Second)
		out, err := x.rotateToken(id)
		if err != nil || out.GetMetadata().GetGeneration() != 3 {
			t.Fatalf("got %v, %v, want generation 3", out.GetMetadata(), err)
		}
		x.land()
		for range 3 {
			x.wantValue("", out.GetValue())
		}
	})
	t.Run("while the vault is down", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).token(t, "demo")
		id := uuid.NewString()
		x.unknownRotate(id, 30*time.Minute)
		x.fake.SetDown(true)
		_, err := x.rotateToken(id)
		wantReason(t, err, secret.VaultUnavailable, secret.Unknown)
		_, err = x.rotateToken("")
		wantReason(t, err, secret.VaultUnavailable, secret.NotApplied)
		x.fake.SetDown(false)
		if _, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: "another"}); err != nil {
			t.Fatal(err)
		}
		x.fake.SetDown(true)
		_, err = x.rotateToken(id) // it would be late now
		wantReason(t, err, secret.VaultUnavailable, secret.NotApplied)
	})
	t.Run("with another value", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).in(t, "demo", "active")
		x.fault(keyvaultfake.OpSet, 0, keyvaultfake.Fault{Cut: true})
		x.hurried.Store(true)
		id := uuid.NewString()
		wantReason(t, writeCalls["put"](x, x.ctx, id), secret.VaultUnavailable, secret.Unknown)
		x.fake.OnRequest(nil)
		_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(4), RequestId: id})
		wantReason(t, err, secret.RequestIDReused, secret.NotApplied)
	})
}

// TestStaleAnswer: an old answer is asked again, and never taken for a late commit.
func TestStaleAnswer(t *testing.T) {
	t.Parallel()
	for _, op := range []keyvaultfake.Op{keyvaultfake.OpGet, keyvaultfake.OpVersions} {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			x := startKeyVault(t).in(t, "demo", "active")
			x.put(3)
			x.fault(op, 3, keyvaultfake.Fault{Stale: true})
			x.wantValue("", uri(3))
			x.fault(op, 3, keyvaultfake.Fault{Stale: true})
			if m := x.put(4).GetMetadata(); m.GetGeneration() != 4 {
				t.Errorf("got generation %d, want 4", m.GetGeneration())
			}
			x.fake.OnRequest(nil)
			if got := x.versions(); len(got) != 4 || !got[0].Enabled || !got[1].Enabled || !got[2].Enabled {
				t.Errorf("got %d versions, want 4 that nobody put down", len(got))
			}
		})
	}
	t.Run("for ever", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).in(t, "demo", "active")
		x.put(3)
		x.fault(keyvaultfake.OpGet, 0, keyvaultfake.Fault{Stale: true})
		x.hurried.Store(true)
		_, err := x.get("")
		wantReason(t, err, secret.StalenessUnsatisfiable, "")
		if !contains(err.Error(), "generation 3") {
			t.Errorf("got %v, want it to name the generation", err)
		}
		wantReason(t, writeCalls["put"](x, x.ctx, ""), secret.StalenessUnsatisfiable, secret.NotApplied)
		if got := x.versions(); len(got) != 3 {
			t.Errorf("got %d versions, want 3", len(got))
		}
	})
}

// TestLateCommitInTheSameSecond: the vault counts whole seconds.
func TestLateCommitInTheSameSecond(t *testing.T) {
	t.Parallel()
	x := startKeyVault(t).token(t, "demo")
	id := uuid.NewString()
	x.unknownRotate(id, time.Millisecond)
	if _, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: "another"}); err != nil {
		t.Fatal(err)
	}
	x.clock.advance(2 * time.Millisecond)
	x.fake.Settle()
	all := x.versions()
	if len(all) != 2 || !all[0].Created.Equal(all[1].Created) {
		t.Skipf("the versions were made in different seconds")
	}
	x.wantPutDown(all[1].Value, "another")
}

// TestNewSecretAfterAPurge: a lesser generation is a new secret's when the name was
// absent in between, or the greater one is in no list any more.
func TestNewSecretAfterAPurge(t *testing.T) {
	t.Parallel()
	for _, noticed := range []bool{true, false} {
		t.Run(fmt.Sprintf("absence noticed %v", noticed), func(t *testing.T) {
			t.Parallel()
			s := startKeyVault(t)
			x := s.in(t, "demo", "active")
			x.put(3)
			name := x.key.String()
			x.fake.PersonDelete(name)
			x.settle()
			x.fake.PersonPurge(name)
			x.clock.advance(time.Minute)
			if noticed {
				x.wantGet("", secret.SecretNotFound)
			}
			// Another broker makes it anew.
			tags := s.in(t, "other", "active").versions()[0].Tags
			tags["exto-key"], tags["exto-epoch"] = name, "5 "+uuid.NewString()
			x.fake.PersonSet(name, uri(9), tags)
			x.wantValue("", uri(9))
			if m := x.put(10).GetMetadata(); m.GetGeneration() < 2 {
				t.Errorf("got generation %d, want it to count on", m.GetGeneration())
			}
			if got := x.versions(); !got[0].Enabled {
				t.Error("the new secret's version was taken for a late one")
			}
		})
	}
}
