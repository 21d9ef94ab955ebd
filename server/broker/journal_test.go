package broker_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/noop"
)

// ledger is a journal in memory, with faults.
type ledger struct {
	mu              sync.Mutex
	lines           []string
	intents         []broker.Intent
	full, endsFull  error
	settled         chan bool
	beforeItIsKnown func() // called with each Intend
}

func newLedger() *ledger { return &ledger{settled: make(chan bool, 1)} }

func (l *ledger) call() broker.Call {
	return broker.Call{Caller: another.Caller, AuditID: uuid.NewString(), Journal: l}
}

func (l *ledger) add(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

func (l *ledger) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := l.lines
	l.lines = nil
	return lines
}

func (l *ledger) Intend(_ context.Context, i broker.Intent) error {
	if l.beforeItIsKnown != nil {
		l.beforeItIsKnown()
	}
	if l.full != nil {
		return l.full
	}
	l.add("intent %s deleted=%v", i.Action, i.Deleted)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.intents = append(l.intents, i)
	return nil
}

func (l *ledger) Ended(_ context.Context, o broker.Outcome) error {
	var told *broker.Error
	if errors.As(o.Err, &told) {
		l.add("ended %s %s", told.Reason, told.Commit)
	} else {
		l.add("ended generation=%d", o.Generation)
	}
	return l.endsFull
}

func (l *ledger) Settled(_ context.Context, applied bool) { l.settled <- applied }

func (l *ledger) Replayed() { l.add("replayed") }

func (l *ledger) want(t *testing.T, what string, want ...string) {
	t.Helper()
	if got := l.take(); !slices.Equal(got, want) {
		t.Errorf("%s: got the lines %q, want %q", what, got, want)
	}
}

// TestIntents: what changes the vault is intended before, and ended after; what changes
// nothing is not.
func TestIntents(t *testing.T) {
	t.Parallel()
	x, key, l := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo"), newLedger()
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		if slices.Contains([]string{"Set", "Update", "Delete", "Recover"}, op) {
			l.add("%s", op)
		}
		return nil
	})
	id := uuid.NewString()
	put := func(value string) error {
		_, err := x.Put(t.Context(), l.call(), broker.PutRequest{Key: key, Value: secret.NewValue(value), RequestID: id})
		return err
	}
	deleted := func() error {
		_, err := x.Delete(t.Context(), l.call(), broker.DeleteRequest{Key: key})
		return err
	}
	recovered := func() error {
		_, err := x.Recover(t.Context(), l.call(), broker.RecoverRequest{Key: key})
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
		want []string
	}{
		{"put", func() error { return put("one") }, []string{"intent put deleted=false", "Set", "ended generation=1"}},
		{"the same request", func() error { return put("one") }, []string{"replayed"}},
		{"an equal value", func() error { id = uuid.NewString(); return put("one") }, nil},
		{"recover of what is not deleted", recovered, nil},
		{"rotate", func() error {
			_, err := x.Rotate(t.Context(), l.call(), broker.RotateRequest{Key: key, NewValue: secret.NewValue("two")})
			return err
		}, []string{"intent rotate deleted=false", "Set", "ended generation=2"}},
		{"delete", deleted, []string{"intent delete deleted=false", "Update", "Delete", "ended generation=2"}},
		{"delete of what is deleted", deleted, nil},
		{"recover", recovered, []string{"intent recover deleted=false", "Recover", "Update", "ended generation=2"}},
		{"a person's delete", func() error { _, err := x.vault.Vault.Delete(t.Context(), key); return err }, nil},
		{"put over that", func() error { id = uuid.NewString(); return put("three") },
			[]string{"intent put deleted=false", "intent put deleted=true", "Recover", "Set", "ended generation=3"}},
	} {
		err := step.do()
		got := l.take()
		// Whether a put over what is deleted finds that out by trying depends on the vault.
		if step.name == "put over that" && len(got) == 4 {
			step.want = step.want[1:]
		}
		if !slices.Equal(got, step.want) {
			t.Errorf("%s: got the lines %q (%v), want %q", step.name, got, err, step.want)
		}
	}
}

// TestNothingUnrecorded: without an intent nothing is sent, and what was done and could
// not be recorded is no success.
func TestNothingUnrecorded(t *testing.T) {
	t.Parallel()
	x, key, l := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo"), newLedger()
	put := func(value string) error {
		_, err := x.Put(t.Context(), l.call(), broker.PutRequest{Key: key, Value: secret.NewValue(value)})
		return err
	}
	l.full = errors.New("disk full")
	wantError(t, put("one"), secret.AuditUnavailable, secret.NotApplied)
	_, err := x.Get(t.Context(), another, broker.GetRequest{Key: key, MaxStaleness: within(0)})
	wantError(t, err, secret.SecretNotFound, "")

	l.full, l.endsFull = nil, errors.New("disk full")
	wantError(t, put("two"), secret.AuditUnavailable, secret.Applied)
	if r, err := x.Get(t.Context(), another, broker.GetRequest{Key: key}); err != nil || r.Value.Reveal() != "two" {
		t.Errorf("got %q, %v, want two", r.Value.Reveal(), err)
	}
}

// TestCallerLeavesDuringTheIntent: nothing is sent, and the intent is ended.
func TestCallerLeavesDuringTheIntent(t *testing.T) {
	t.Parallel()
	x, key, l := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo"), newLedger()
	ctx, leave := context.WithCancel(t.Context())
	l.beforeItIsKnown = leave
	_, err := x.Put(ctx, l.call(), broker.PutRequest{Key: key, Value: secret.NewValue("one")})
	wantError(t, err, secret.Cancelled, secret.NotApplied)
	x.Close(context.Background())
	l.want(t, "left", "intent put deleted=false", "ended CANCELLED NOT_APPLIED")
	if slices.ContainsFunc(x.vault.Calls(), func(c string) bool { return strings.HasPrefix(c, "Set ") }) && len(x.versions(key)) > 0 {
		t.Error("the vault was changed")
	}
}

func (x *crossing) versions(key secret.Key) []vault.Properties {
	versions, _ := x.vault.Vault.Versions(context.Background(), key)
	return versions
}

// TestUnknownIsSettled: when a write ended with an unknown outcome, the broker finds out.
func TestUnknownIsSettled(t *testing.T) {
	t.Parallel()
	for name, applied := range map[string]bool{"applied": true, "not applied": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, key, l := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo"), newLedger()
			var waits atomic.Int64
			back := make(chan struct{})
			x.wait = func(context.Context, time.Duration) error {
				if waits.Add(1) == 1 {
					return context.DeadlineExceeded // for the write it was the last
				}
				<-back
				return nil
			}
			x.restart()
			away := func(context.Context, string, secret.Key) error { return vault.ErrUnavailable }
			x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
				if op != "Set" {
					return nil
				}
				x.vault.SetBefore(away)
				if applied {
					return nil
				}
				return vault.Uncertain(vault.ErrUnavailable)
			})
			x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
				if op == "Set" {
					return vault.Uncertain(vault.ErrUnavailable)
				}
				return err
			})
			_, err := x.Put(t.Context(), l.call(), broker.PutRequest{Key: key, Value: secret.NewValue("one")})
			wantError(t, err, secret.VaultUnavailable, secret.Unknown)
			l.want(t, "unknown", "intent put deleted=false", "ended VAULT_UNAVAILABLE UNKNOWN")
			x.vault.SetBefore(nil)
			x.vault.SetAfter(nil)
			if !applied {
				x.advance(2 * time.Hour) // for an hour it may still arrive
			}
			close(back)
			if got := <-l.settled; got != applied {
				t.Errorf("got settled as applied=%v, want %v", got, applied)
			}
		})
	}
}

// TestCutOffWritesAreSettled cuts a broker off at each change that a write makes in the
// vault, before it and after it. The next one, told of the open intent, ends what was
// left half done: nothing is live that was deleted, unless the write was applied.
func TestCutOffWritesAreSettled(t *testing.T) {
	t.Parallel()
	person := func(x *crossing, key secret.Key) {
		if _, err := x.vault.Vault.Delete(context.Background(), key); err != nil {
			x.t.Fatal(err)
		}
	}
	broken := func(x *crossing, key secret.Key) {
		if _, err := x.Delete(context.Background(), another, broker.DeleteRequest{Key: key}); err != nil {
			x.t.Fatal(err)
		}
	}
	put := func(ctx context.Context, x *crossing, call broker.Call, key secret.Key) {
		_, _ = x.Put(ctx, call, broker.PutRequest{Key: key, Value: secret.NewValue("two")})
	}
	rotate := func(ctx context.Context, x *crossing, call broker.Call, key secret.Key) {
		_, _ = x.Rotate(ctx, call, broker.RotateRequest{Key: key, NewValue: secret.NewValue("two"), AllowMissing: true})
	}
	for name, test := range map[string]struct {
		before func(*crossing, secret.Key)
		do     func(context.Context, *crossing, broker.Call, secret.Key)
		// applied has, for each change that is tried, whether the write is applied then.
		// A put or rotate over what is deleted first tries whether it is absent.
		applied []bool
		// without is what is read when the write was not applied, with it when it was;
		// empty: not found.
		without, with string
	}{
		"put":                           {nil, put, []bool{true}, "one", "two"},
		"rotate":                        {nil, rotate, []bool{true}, "one", "two"},
		"put over the broker's delete":  {broken, put, []bool{false, false, true}, "", "two"},
		"put over a person's delete":    {person, put, []bool{false, false, true}, "", "two"},
		"rotate over a person's delete": {person, rotate, []bool{false, false, true}, "", "two"},
		"delete": {nil, func(ctx context.Context, x *crossing, call broker.Call, key secret.Key) {
			_, _ = x.Delete(ctx, call, broker.DeleteRequest{Key: key})
		}, []bool{true, true}, "one", ""},
		"recover of the broker's delete": {broken, func(ctx context.Context, x *crossing, call broker.Call, key secret.Key) {
			_, _ = x.Recover(ctx, call, broker.RecoverRequest{Key: key})
		}, []bool{false, true}, "", "one"},
		"recover of a person's own delete": {person, func(ctx context.Context, x *crossing, call broker.Call, key secret.Key) {
			_, _ = x.Recover(ctx, call, broker.RecoverRequest{Key: key})
		}, []bool{true, true}, "", "one"},
	} {
		for at := range 2 * len(test.applied) {
			change, made := at/2, at%2 == 1
			t.Run(fmt.Sprintf("%s, change %d made=%v", name, change+1, made), func(t *testing.T) {
				t.Parallel()
				x, key, l := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo"), newLedger()
				x.put(key, "one")
				if test.before != nil {
					test.before(x, key)
				}
				x.restart()
				first := x.Broker
				ctx, cutOff := context.WithCancel(t.Context())
				changes := 0
				dead := func(ctx context.Context, _ string, _ secret.Key) error {
					cutOff()
					<-ctx.Done()
					return vault.Uncertain(vault.ErrUnavailable)
				}
				x.vault.SetBefore(func(ctx context.Context, op string, key secret.Key) error {
					if !strings.Contains("Set Update Delete Recover", op) {
						return nil
					}
					if changes++; changes == change+1 && !made {
						x.vault.SetBefore(dead)
						return dead(ctx, op, key)
					}
					return nil
				})
				x.vault.SetAfter(func(ctx context.Context, op string, key secret.Key, err error) error {
					if changes == change+1 && made && strings.Contains("Set Update Delete Recover", op) {
						x.vault.SetBefore(dead)
						return dead(ctx, op, key)
					}
					return err
				})
				test.do(ctx, x, l.call(), key)
				over, end := context.WithCancel(t.Context())
				end()
				first.Close(over)
				if len(l.intents) == 0 {
					t.Fatal("there is no intent")
				}
				intent := l.intents[len(l.intents)-1]

				x.vault.SetBefore(nil)
				x.vault.SetAfter(nil)
				x.restart()
				x.Hide(intent, x.now())
				if !test.applied[change] && test.without == "" && made {
					_, err := x.Get(t.Context(), another, broker.GetRequest{Key: key})
					wantError(t, err, secret.SecretNotFound, "")
				}
				applied := made && test.applied[change] || change > 0 && test.applied[change-1]
				settled := false
				x.Settle(t.Context(), []broker.Unfinished{{Call: another, Intent: intent}}, func(_ int, got bool) {
					if settled = true; got != applied {
						t.Errorf("got applied=%v, want %v", got, applied)
					}
				})
				if !settled {
					t.Error("it is not settled")
				}
				want := test.without
				if applied {
					want = test.with
				}
				r, err := x.Get(t.Context(), another, broker.GetRequest{Key: key, MaxStaleness: within(0)})
				if r.Value.Reveal() != want || (err == nil) != (want != "") {
					t.Errorf("got %q, %v, want %q", r.Value.Reveal(), err, want)
				}
				if _, _, err := x.vault.Vault.Get(t.Context(), key, ""); (err == nil) != (want != "") {
					t.Errorf("in the vault: got %v, want it readable: %v", err, want != "")
				}
			})
		}
	}
}

// TestWhatCannotBeSettled holds up no other write: it is left open, and looked for again.
func TestWhatCannotBeSettled(t *testing.T) {
	t.Parallel()
	x := newCrossing(t)
	x.wait = func(ctx context.Context, _ time.Duration) error { return ctx.Err() }
	x.restart()
	x.vault.SetBefore(func(_ context.Context, _ string, key secret.Key) error {
		if strings.HasPrefix(key.String(), "instance-stuck") {
			return vault.ErrRefused
		}
		return nil
	})
	var writes []broker.Unfinished
	for n := range 20 {
		writes = append(writes, broker.Unfinished{Call: another, Intent: broker.Intent{Action: broker.ActionPut, Key: keyOf(t, secret.DatabaseURI, "stuck-%d", n), OperationID: uuid.NewString()}})
	}
	writes = append(writes, broker.Unfinished{Call: another, Intent: broker.Intent{Action: broker.ActionPut, Key: keyOf(t, secret.DatabaseURI, "fine"), OperationID: uuid.NewString()}})
	ctx, end := context.WithCancel(t.Context())
	x.Settle(ctx, writes, func(n int, applied bool) {
		if n != len(writes)-1 || applied {
			t.Errorf("got %d settled as applied=%v, want the last alone, not applied", n, applied)
		}
		end()
	})
}

// TestNoopSettlesNothing: what another store did it cannot know.
func TestNoopSettlesNothing(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	b := broker.New(broker.Config{Vault: noop.New(log), Logger: log})
	t.Cleanup(func() { b.Close(context.Background()) })
	b.Settle(t.Context(), []broker.Unfinished{{Call: another, Intent: broker.Intent{Action: broker.ActionPut, Key: keyOf(t, secret.DatabaseURI, "demo"), OperationID: uuid.NewString()}}},
		func(int, bool) { t.Error("a write of another store was settled") })
}
