package server_test

import (
	"context"
	"slices"
	"sync/atomic"
	"testing"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// failing makes the calls of these vault methods fail, unmade.
func (x *subject) failing(methods ...string) {
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		for _, m := range methods {
			if op == m {
				return vault.ErrUnavailable
			}
		}
		return nil
	})
}

// failingAfter is failing from a call of the method first on.
func (x *subject) failingAfter(first string, methods ...string) {
	var begun atomic.Bool
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		if op == first {
			begun.Store(true)
		}
		if begun.Load() && slices.Contains(methods, op) {
			return vault.ErrUnavailable
		}
		return nil
	})
}

// TestPutOverWhatAPersonDeletedFails: in whichever step it fails, the name is
// deleted in the vault again, nothing was applied, and a person's recover is
// theirs.
func TestPutOverWhatAPersonDeletedFails(t *testing.T) {
	notRacing(t)
	t.Parallel()
	onEachVault(t, testPutOverWhatAPersonDeletedFails)
}

func testPutOverWhatAPersonDeletedFails(t *testing.T, start func(*testing.T) *system) {
	tests := map[string]func(x *subject){
		"the vault does not recover": func(x *subject) { x.failing("Recover") },
		"the vault does not store":   func(x *subject) { x.failingAfter("Recover", "Set") },
		"a second put fails too": func(x *subject) {
			x.failingAfter("Recover", "Set", "Delete")
			wantReason(x.t, writeCalls["put"](x, x.ctx, ""), secret.VaultUnavailable, secret.NotApplied)
			x.wantGet("", secret.SecretNotFound) // live in the vault and hidden
			if !contains(x.log.String(), "is live in the vault after a failed put") {
				x.t.Error("the log does not tell the operator")
			}
			x.failing("Set")
		},
	}
	for name, fail := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", "deleted outside")
			fail(x)
			wantReason(t, writeCalls["put"](x, x.ctx, ""), secret.VaultUnavailable, secret.NotApplied)
			x.settle()
			if _, err := x.store.GetDeleted(x.ctx, x.key); err != nil {
				t.Fatalf("got %v, want the name deleted in the vault", err)
			}
			x.wantGet("", secret.SecretNotFound)
			if err := x.store.Recover(x.ctx, x.key); err != nil {
				t.Fatal(err)
			}
			x.wantValue("", uri(2))
		})
	}
}

// TestSlowReadDuringPutOverWhatAPersonDeleted: the vault answers a read while the
// deleted value is live, and the answer comes when the put is over.
func TestSlowReadDuringPutOverWhatAPersonDeleted(t *testing.T) {
	t.Parallel()
	onEachVault(t, testSlowReadDuringPutOverWhatAPersonDeleted)
}

func testSlowReadDuringPutOverWhatAPersonDeleted(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "deleted outside")
	reached, release := x.hang("Set", false)
	put := make(chan error, 1)
	go func() { put <- writeCalls["put"](x, x.ctx, "") }()
	<-reached

	answered, arrive := make(chan struct{}), make(chan struct{})
	var first atomic.Bool
	x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
		if op == "Get" && first.CompareAndSwap(false, true) {
			close(answered)
			<-arrive
		}
		return err
	})
	type answer struct {
		out *secretsv1.GetSecretResponse
		err error
	}
	read := make(chan answer, 1)
	go func() {
		out, err := x.get("")
		read <- answer{out, err}
	}()
	<-answered
	release()
	err := <-put
	close(arrive)
	if err != nil {
		t.Fatal(err)
	}
	if got := <-read; got.err != nil || got.out.GetValue() != uri(3) {
		t.Errorf("got %v, %v, want the value that was put", got.out.GetMetadata(), got.err)
	}
}

// TestRecoverOfWhatAPersonDeletedIsAppliedWithTheVaultsOwn: there is no mark that
// would keep it deleted.
func TestRecoverOfWhatAPersonDeletedIsAppliedWithTheVaultsOwn(t *testing.T) {
	t.Parallel()
	onEachVault(t, testRecoverOfWhatAPersonDeletedIsAppliedWithTheVaultsOwn)
}

func testRecoverOfWhatAPersonDeletedIsAppliedWithTheVaultsOwn(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "deleted outside")
	x.failing("Update")
	wantReason(t, writeCalls["recover"](x, x.ctx, ""), secret.VaultUnavailable, secret.Applied)
	x.wantValue("", uri(2))
}
