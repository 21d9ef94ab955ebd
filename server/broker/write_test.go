package broker_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault/embedded"
	"github.com/exto/secrets-broker/server/vault/vaulttest"
)

// What a caller is told when it leaves can be seen on this side of the
// connection alone: on the other one gRPC answers for itself.

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hung is a broker whose next call of method waits until release.
func hung(t *testing.T, method string) (b *broker.Broker, reached chan struct{}, release func()) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	store, err := embedded.Open(embedded.Config{Dir: t.TempDir(), Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	faulty := vaulttest.NewFaulty(store)
	reached, gate := make(chan struct{}), make(chan struct{})
	var once sync.Once
	faulty.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		if op == method {
			once.Do(func() { close(reached) })
			<-gate
		}
		return nil
	})
	release = sync.OnceFunc(func() { close(gate) })
	b = broker.New(broker.Config{Vault: faulty, Logger: log})
	t.Cleanup(func() {
		release()
		b.Close(context.Background())
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return b, reached, release
}

func request(t *testing.T, id string) broker.PutRequest {
	t.Helper()
	key, err := secret.ParseKey("instance-demo")
	if err != nil {
		t.Fatal(err)
	}
	return broker.PutRequest{Key: key, Value: secret.NewValue("abc"), RequestID: id}
}

func wantError(t *testing.T, err error, reason secret.Reason, commit secret.CommitState) {
	t.Helper()
	var e *broker.Error
	if !errors.As(err, &e) || e.Reason != reason || e.Commit != commit {
		t.Errorf("got %v, want %s with %s", err, reason, commit)
	}
}

func TestCallerLeaves(t *testing.T) {
	t.Parallel()
	for method, want := range map[string]secret.CommitState{"Get": secret.NotApplied, "Set": secret.Unknown} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			b, reached, release := hung(t, method)
			ctx, leave := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			req := request(t, uuid.NewString())
			go func() {
				_, err := b.Put(ctx, broker.Call{}, req)
				ended <- err
			}()
			<-reached
			leave()
			wantError(t, <-ended, secret.Cancelled, want)

			past, cancel := context.WithDeadline(t.Context(), time.Now())
			defer cancel()
			if method == "Set" {
				// While it is carried on, the same request may yet succeed; another waits
				// for its turn and has not begun.
				_, err := b.Put(past, broker.Call{}, req)
				wantError(t, err, secret.DeadlineExceeded, secret.Unknown)
				_, err = b.Put(past, broker.Call{}, request(t, uuid.NewString()))
				wantError(t, err, secret.DeadlineExceeded, secret.NotApplied)
			}
			release()
			result, err := b.Put(t.Context(), broker.Call{}, req)
			if err != nil || result.Generation != 1 || result.Unchanged {
				t.Errorf("the same request again: got %+v, %v, want one version", result, err)
			}
		})
	}
}

func TestShutdown(t *testing.T) {
	t.Parallel()
	b, reached, release := hung(t, "Set")
	ended := make(chan error, 1)
	go func() {
		_, err := b.Put(t.Context(), broker.Call{}, request(t, ""))
		ended <- err
	}()
	<-reached
	closed := make(chan struct{})
	ctx, cut := context.WithCancel(t.Context())
	go func() {
		b.Close(ctx)
		close(closed)
	}()
	// Close waits for the write; cut off, the write ends at its next step.
	select {
	case <-closed:
		t.Fatal("Close did not wait for the write under way")
	default:
	}
	cut()
	release()
	<-closed
	if err := <-ended; err != nil {
		wantError(t, err, secret.ShuttingDown, secret.NotApplied)
	}
	_, err := b.Put(t.Context(), broker.Call{}, request(t, ""))
	wantError(t, err, secret.ShuttingDown, secret.NotApplied)
}
