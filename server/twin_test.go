package server_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
)

// unknownPut is a put of uri(3) that the vault commits late, told to be of unknown
// outcome.
func (x *subject) unknownPut(id string, late time.Duration) {
	x.t.Helper()
	x.fault(keyvaultfake.OpSet, 1, keyvaultfake.Fault{LateCommit: late})
	x.hurried.Store(true)
	wantReason(x.t, writeCalls["put"](x, x.ctx, id), secret.VaultUnavailable, secret.Unknown)
	x.hurried.Store(false)
	x.fake.OnRequest(nil)
}

// wantFewRequests fails when something asked the vault over and over.
func (x *subject) wantFewRequests() {
	x.t.Helper()
	if got := len(x.fake.Journal()); got > 30 {
		x.t.Errorf("got %d requests to the vault, want a handful", got)
	}
}

// TestLateCommitOverWhatIsDisabledOrMarked: what counts cannot be written again;
// the late one is disabled, and all goes on by what counts.
func TestLateCommitOverWhatIsDisabledOrMarked(t *testing.T) {
	t.Parallel()
	t.Run("disabled by a person", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).in(t, "demo", "active")
		x.unknownPut("", 30*time.Minute)
		current := x.put(4).GetMetadata().GetVersion()
		x.fake.PersonUpdate(x.key.String(), current, false, nil)
		x.land()
		x.fake.ResetJournal()
		wantReason(t, writeCalls["put"](x, x.ctx, ""), secret.SecretDisabled, secret.NotApplied)
		x.wantGet("", secret.SecretDisabled)
		if all := x.versions(); len(all) != 4 || all[3].Enabled {
			t.Errorf("got %d versions, want 4 with the late one disabled", len(all))
		}
		x.wantFewRequests()
		_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(5), Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: current}})
		if err != nil {
			t.Fatalf("a put that names the disabled version: %v", err)
		}
		x.wantValue("", uri(5))
	})
	t.Run("marked", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).in(t, "demo", "active")
		x.unknownPut("", 30*time.Minute)
		x.put(4)
		x.fault(keyvaultfake.OpDelete, 0, keyvaultfake.Fault{Cut: true})
		x.hurried.Store(true)
		id := uuid.NewString()
		wantReason(t, writeCalls["delete"](x, x.ctx, id), secret.VaultUnavailable, secret.Applied)
		x.hurried.Store(false)
		x.fake.OnRequest(nil)
		x.land()
		x.fake.ResetJournal()
		x.wantGet("", secret.SecretNotFound)
		if err := writeCalls["delete"](x, x.ctx, id); err != nil {
			t.Fatalf("the same request again: %v", err)
		}
		x.wantGet("", secret.SecretNotFound)
		x.wantFewRequests()
		if got := x.fake.State(x.key.String()); got != keyvaultfake.Deleting {
			t.Errorf("the name is %s, want the delete ended", got)
		}
	})
}

// TestTwinAfterSomethingWasDone: what was sent twice arrives a second time, and
// knows nothing of what was done with the first.
func TestTwinAfterSomethingWasDone(t *testing.T) {
	t.Parallel()
	// twin is a rotate that was sent twice, of which the first is under way still.
	twin := func(t *testing.T) (x *subject, first, second string) {
		x = startKeyVault(t).token(t, "demo")
		out, err := x.rotateToken("")
		if err != nil {
			t.Fatal(err)
		}
		first = out.GetMetadata().GetVersion()
		x.clock.advance(time.Second)
		x.fault(keyvaultfake.OpSet, 1, keyvaultfake.Fault{LateCommit: 30 * time.Minute})
		out, err = x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, GracePeriod: durationOf(20 * time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		x.fake.OnRequest(nil)
		return x, first, out.GetMetadata().GetVersion()
	}
	t.Run("a delete that the vault has yet to do", func(t *testing.T) {
		t.Parallel()
		x, _, _ := twin(t)
		x.fault(keyvaultfake.OpDelete, 0, keyvaultfake.Fault{Cut: true})
		x.hurried.Store(true)
		wantReason(t, writeCalls["delete"](x, x.ctx, ""), secret.VaultUnavailable, secret.Applied)
		x.hurried.Store(false)
		x.fake.OnRequest(nil)
		x.wantGet("", secret.SecretNotFound)
		x.land()
		x.wantGet("", secret.SecretNotFound)
	})
	t.Run("a person's disabling", func(t *testing.T) {
		t.Parallel()
		x, _, second := twin(t)
		x.fake.PersonUpdate(x.key.String(), second, false, nil)
		x.wantGet("", secret.SecretDisabled)
		x.land()
		x.wantGet("", secret.SecretDisabled)
	})
	t.Run("a delete and a recover", func(t *testing.T) {
		t.Parallel()
		x, first, _ := twin(t)
		id := uuid.NewString()
		if err := writeCalls["delete"](x, x.ctx, id); err != nil {
			t.Fatal(err)
		}
		if err := writeCalls["recover"](x, x.ctx, ""); err != nil {
			t.Fatal(err)
		}
		x.wantGet(first, secret.VersionExpired)
		x.land()
		x.wantGet(first, secret.VersionExpired)
		if err := writeCalls["delete"](x, x.ctx, id); err != nil {
			t.Fatal(err)
		}
		if _, err := x.get(""); err != nil {
			t.Errorf("got %v: the delete was done twice", err)
		}
	})
}

// TestRetryOverADelete: a put of unknown outcome, a delete, and the put again is
// another write than the first: it covers what was deleted.
func TestRetryOverADelete(t *testing.T) {
	t.Parallel()
	x := startKeyVault(t).in(t, "demo", "active")
	id, deleteID := uuid.NewString(), uuid.NewString()
	x.unknownPut(id, 30*time.Minute)
	if err := writeCalls["delete"](x, x.ctx, deleteID); err != nil {
		t.Fatal(err)
	}
	x.clock.advance(time.Minute)
	if err := writeCalls["put"](x, x.ctx, id); err != nil {
		t.Fatal(err)
	}
	x.land()
	x.wantValue("", uri(3))
	x.wantGet(x.first, secret.VersionExpired)
	x.wantGet(x.current, secret.VersionExpired)
	if err := writeCalls["delete"](x, x.ctx, deleteID); err != nil {
		t.Fatal(err)
	}
	x.wantValue("", uri(3)) // it was done, and is not done again
}

// TestGenerationsAreNotGivenTwice: neither that of a copy whose outcome is unknown,
// nor that of a put whose retry found the value unchanged.
func TestGenerationsAreNotGivenTwice(t *testing.T) {
	t.Parallel()
	t.Run("of what was written again on top", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).in(t, "demo", "active")
		x.unknownPut("", 30*time.Minute)
		x.put(4)
		x.land()
		x.unknownPut("", 30*time.Minute) // it was the copy that was cut off
		x.setOutside(uri(5))
		x.put(6)
		x.land()
		for range 3 {
			x.wantValue("", uri(6))
		}
	})
	t.Run("of a put that was unchanged", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).in(t, "demo", "active")
		id := uuid.NewString()
		x.unknownPut(id, 30*time.Minute)
		x.setOutside(uri(3))
		if err := writeCalls["put"](x, x.ctx, id); err != nil {
			t.Fatal(err)
		}
		x.put(7)
		x.land()
		for range 3 {
			x.wantValue("", uri(7))
		}
	})
}

// TestRefusedPutKeepsWhatIsHidden: a name that is being recovered looks absent, and
// what was recovered for a put over it stays hidden all the same.
func TestRefusedPutKeepsWhatIsHidden(t *testing.T) {
	t.Parallel()
	x := startKeyVault(t).in(t, "demo", "deleted outside")
	x.fault(keyvaultfake.OpRecover, 1, keyvaultfake.Fault{CutAfter: true})
	x.hurried.Store(true)
	wantReason(t, writeCalls["put"](x, x.ctx, ""), secret.VaultUnavailable, secret.Unknown)
	x.hurried.Store(false)
	x.fake.OnRequest(nil)
	_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(9), Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: x.current}})
	wantReason(t, err, secret.VersionMismatch, secret.NotApplied)
	x.clock.advance(2 * time.Minute)
	x.wantGet("", secret.SecretNotFound)
}

// TestLateCommitBetweenMarkAndDelete: it was the newest when the vault deleted the
// name, and is not what comes back with it.
func TestLateCommitBetweenMarkAndDelete(t *testing.T) {
	t.Parallel()
	x := startKeyVault(t).in(t, "demo", "active")
	x.unknownPut("", 30*time.Minute)
	x.put(4)
	x.fake.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op == keyvaultfake.OpDelete && !r.Challenge {
			x.land()
		}
		return keyvaultfake.Fault{}
	})
	if err := writeCalls["delete"](x, x.ctx, ""); err != nil {
		t.Fatal(err)
	}
	x.fake.OnRequest(nil)
	x.settle()
	x.wantGet("", secret.SecretNotFound)
	x.fake.PersonRecover(x.key.String())
	x.clock.advance(time.Minute)
	x.wantGet("", secret.SecretNotFound) // deleted until enabled
	if err := writeCalls["recover"](x, x.ctx, ""); err != nil {
		t.Fatal(err)
	}
	x.wantValue("", uri(4))
}

// TestLaterStepsGoOnPastTheDeadline: once a step of it is done, a write is carried
// on, though what it meets then makes it wait.
func TestLaterStepsGoOnPastTheDeadline(t *testing.T) {
	t.Parallel()
	x := startKeyVault(t).in(t, "demo", "deleted")
	x.settle()
	ctx, cancel := context.WithTimeout(x.ctx, 1500*time.Millisecond)
	defer cancel()
	refused := false
	x.fake.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		switch {
		case r.Op == keyvaultfake.OpRecover && !r.Challenge:
			return keyvaultfake.Fault{HoldAfter: ctx.Done()}
		case r.Op == keyvaultfake.OpSet && !refused: // one writer, one request at a time
			refused = true
			return keyvaultfake.Fault{Status: 409, Inner: "ObjectIsBeingRecovered"}
		}
		return keyvaultfake.Fault{}
	})
	id := uuid.NewString()
	if err := writeCalls["put"](x, ctx, id); err == nil {
		t.Fatal("got success before its deadline")
	}
	if err := writeCalls["put"](x, x.ctx, id); err != nil {
		t.Fatalf("the same request again: %v", err)
	}
	if !contains(x.log.String(), "applied=true") {
		t.Error("the first request was not carried on to its end")
	}
	x.wantValue("", uri(3))
	if got := len(x.versions()); got != 3 {
		t.Errorf("got %d versions, want the write once: 3", got)
	}
}
