package server_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/google/uuid"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// kill makes the broker die at its n-th vault call that changes something, before
// or after it took effect: from then on nothing reaches the vault. It reports
// whether the broker came that far.
func (x *subject) kill(n int, after bool) (died func() bool) {
	var mu sync.Mutex
	effects, dead := 0, false
	hurried := x.hurried
	x.vault.SetBefore(func(ctx context.Context, op string, _ secret.Key) error {
		mu.Lock()
		defer mu.Unlock()
		if isEffect(op) {
			effects++
			dead = dead || !after && effects == n
		}
		if dead {
			hurried.Store(true)
			return vault.Uncertain(vault.ErrUnavailable)
		}
		return nil
	})
	x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
		mu.Lock()
		defer mu.Unlock()
		if after && isEffect(op) && effects == n {
			dead = true
		}
		if dead {
			hurried.Store(true)
			return vault.Uncertain(vault.ErrUnavailable)
		}
		return err
	})
	return func() bool {
		mu.Lock()
		defer mu.Unlock()
		return dead
	}
}

func TestKilledBetweenAnyTwoSteps(t *testing.T) {
	notRacing(t)
	t.Parallel()
	putOver := func(x *subject, ctx context.Context, id string) error {
		_, err := x.c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(3), RequestId: id})
		return err
	}
	rotateOver := func(x *subject, ctx context.Context, id string) error {
		_, err := x.c.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: uri(3), AllowMissing: true, RequestId: id})
		return err
	}
	tests := []struct {
		name, state string
		call        func(*subject, context.Context, string) error
		steps       int // vault calls that change something
		// applied is how many of them make it happen; before that the state is as it was.
		applied int
		want    string // what Get gives once it happened: a value or a reason
		// exposed is after how many steps the old value can be read by rights of
		// nobody but the person who deleted the secret; 0: never.
		exposed int
		// fresh is for a broker that has not seen the secret before. A put asks the
		// vault first whether there is anything to be put over.
		fresh bool
	}{
		{"delete", "active", writeCalls["delete"], 2, 1, "SECRET_NOT_FOUND", 0, false},
		{"delete what a person disabled", "disabled", writeCalls["delete"], 2, 1, "SECRET_NOT_FOUND", 0, false},
		{"recover", "deleted", writeCalls["recover"], 2, 2, uri(2), 0, false},
		{"recover what is marked", "marked", writeCalls["recover"], 1, 1, uri(2), 0, false},
		{"put over deleted", "deleted", putOver, 2, 2, uri(3), 0, false},
		{"put over deleted, not seen", "deleted", putOver, 3, 3, uri(3), 0, true},
		{"put over marked", "marked", putOver, 1, 1, uri(3), 0, false},
		{"put over deleted by a person", "deleted outside", putOver, 2, 2, uri(3), 1, false},
		{"put over deleted by a person, not seen", "deleted outside", putOver, 3, 3, uri(3), 2, true},
		{"rotate over deleted", "deleted", rotateOver, 2, 2, uri(3), 0, false},
		{"rotate over deleted, not seen", "deleted", rotateOver, 3, 3, uri(3), 0, true},
		{"put", "active", writeCalls["put"], 1, 1, uri(3), 0, false},
		{"rotate", "active", writeCalls["rotate"], 1, 1, uri(3), 0, false},
	}
	got := func(x *subject) string {
		out, err := x.get("")
		if err != nil {
			return string(failed(x.t, err).reason)
		}
		return out.GetValue()
	}
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		for _, test := range tests {
			for step := 1; step <= test.steps; step++ {
				for _, after := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s/step %d/after %v", test.name, step, after), func(t *testing.T) {
						t.Parallel()
						x := start(t).in(t, "demo", test.state)
						before := got(x)
						if test.fresh {
							x.restart()
							x.reconnect()
						}
						died := x.kill(step, after)
						id := uuid.NewString()
						err := test.call(x, x.ctx, id)
						if !died() {
							t.Fatalf("it never came to step %d", step)
						}
						if err == nil {
							t.Fatal("got success from a dead broker")
						}
						x.restart()
						x.reconnect()
						x.settle()

						done := step
						if !after {
							done--
						}
						want := before
						switch {
						case done >= test.applied:
							want = test.want
						case test.exposed > 0 && done >= test.exposed:
							want = uri(2)
						}
						if g := got(x); g != want {
							t.Errorf("after %d of %d steps: got %q, want %q", done, test.steps, g, want)
						}
						if err := test.call(x, x.ctx, id); err != nil {
							t.Fatalf("the same request again: %v", err)
						}
						if g := got(x); g != test.want {
							t.Errorf("after the same request again: got %q, want %q", g, test.want)
						}
						if test.want == "SECRET_NOT_FOUND" {
							x.settle()
							if _, err := x.store.GetDeleted(x.ctx, x.key); err != nil {
								t.Errorf("the delete was not ended in the vault: %v", err)
							}
						}
						if test.want == uri(3) {
							all, err := x.store.Versions(x.ctx, x.key)
							if err != nil || len(all) != 3 {
								t.Errorf("got %d versions, %v, want the write once: 3", len(all), err)
							}
						}
					})
				}
			}
		}
	})
}

// TestPutWhileTheNameIsBeingRecovered: found neither live nor deleted, it is not
// absent. What it has become is what the put is judged by.
func TestPutWhileTheNameIsBeingRecovered(t *testing.T) {
	t.Parallel()
	t.Run("by a person", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).in(t, "demo", "deleted outside")
		x.fake.PersonRecover(x.key.String())
		_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(3), Precondition: &secretsv1.PutSecretRequest_MustNotExist{MustNotExist: true}})
		wantReason(t, err, secret.SecretExists, secret.NotApplied)
		x.delete()
		x.settle()
		x.fake.PersonRecover(x.key.String())
		if m := x.put(3).GetMetadata(); m.GetGeneration() != 3 {
			t.Errorf("got generation %d, want 3", m.GetGeneration())
		}
	})
	t.Run("by a put over it that was cut off", func(t *testing.T) {
		t.Parallel()
		x := startKeyVault(t).in(t, "demo", "deleted")
		x.settle()
		x.fault(keyvaultfake.OpRecover, 1, keyvaultfake.Fault{CutAfter: true})
		x.hurried.Store(true)
		if err := writeCalls["put"](x, x.ctx, uuid.NewString()); err == nil {
			t.Fatal("got success of what was cut off")
		}
		x.fake.OnRequest(nil)
		x.restart()
		x.reconnect()
		if got := x.fake.State(x.key.String()); got != keyvaultfake.Recovering {
			t.Fatalf("the name is %s, want it recovering", got)
		}
		if m := x.put(4).GetMetadata(); m.GetGeneration() != 3 {
			t.Errorf("got generation %d, want 3", m.GetGeneration())
		}
		x.wantGet(x.first, secret.VersionExpired)
		x.wantGet(x.current, secret.VersionExpired)
	})
}

// TestPutOverWhatAPersonDeleted: the old value is live in the vault between the
// recover and the overwrite, and not to be had from the broker.
func TestPutOverWhatAPersonDeleted(t *testing.T) {
	t.Parallel()
	onEachVault(t, testPutOverWhatAPersonDeleted)
}

func testPutOverWhatAPersonDeleted(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "deleted outside")
	reached, release := x.hang("Set", false)
	done := make(chan error, 1)
	go func() { done <- writeCalls["put"](x, x.ctx, "") }()
	<-reached
	if _, value, err := x.store.Get(x.ctx, x.key, ""); err != nil || value.Reveal() != uri(2) {
		t.Fatalf("got %v, want the old value live in the vault", err)
	}
	x.wantGet("", secret.SecretNotFound)
	x.wantGet(x.first, secret.SecretNotFound)
	if o := operations["list"](x); o.m != nil || o.err != nil {
		t.Errorf("List: got %v, %v, want nothing", o.m, o.err)
	}
	if o := operations["describe"](x); o.String(t) != "DELETED/2  1" {
		t.Errorf("Describe: got %s", o.String(t))
	}
	release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	x.wantValue("", uri(3))
}

func TestFailedPutOverWhatAPersonDeletedDeletesAgain(t *testing.T) {
	t.Parallel()
	onEachVault(t, testFailedPutOverWhatAPersonDeletedDeletesAgain)
}

func testFailedPutOverWhatAPersonDeletedDeletesAgain(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "deleted outside")
	fail := map[string]bool{"Set": true}
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		if fail[op] {
			return vault.ErrUnavailable
		}
		return nil
	})
	wantReason(t, writeCalls["put"](x, x.ctx, ""), secret.VaultUnavailable, secret.NotApplied)
	x.settle()
	if _, err := x.store.GetDeleted(x.ctx, x.key); err != nil {
		t.Errorf("the secret is not deleted again: %v", err)
	}
	// Where that fails too, the broker goes on hiding it, and a delete ends it.
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		if op == "Set" || op == "Delete" {
			return vault.ErrUnavailable
		}
		return nil
	})
	wantReason(t, writeCalls["put"](x, x.ctx, ""), secret.VaultUnavailable, secret.NotApplied)
	x.wantGet("", secret.SecretNotFound)
	x.vault.SetBefore(nil)
	if _, err := x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref, AllowMissing: true}); err != nil {
		t.Fatal(err)
	}
	x.settle()
	if _, err := x.store.GetDeleted(x.ctx, x.key); err != nil {
		t.Errorf("the secret is not deleted again: %v", err)
	}
	// Recovered by a person afterwards it is theirs again.
	if err := x.store.Recover(x.ctx, x.key); err != nil {
		t.Fatal(err)
	}
	x.wantValue("", uri(2))
}
