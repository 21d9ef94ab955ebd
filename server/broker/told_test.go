package broker_test

import (
	"cmp"
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
)

// What was told counts against what is older, and against that alone.

// onFirst calls f at the first operation of that name, when the vault has answered it.
func (x *crossing) onFirst(name string, f func(err error) error) {
	var called atomic.Bool
	x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
		if op == name && called.CompareAndSwap(false, true) {
			return f(err)
		}
		return err
	})
}

// holdFirstGet keeps the first answer to a Get on its way until open is closed; answered
// is closed when it is there. It is err, unless that is nil.
func (x *crossing) holdFirstGet(err error) (answered, open chan struct{}) {
	answered, open = make(chan struct{}), make(chan struct{})
	x.onFirst("Get", func(got error) error {
		close(answered)
		<-open
		return cmp.Or(err, got)
	})
	return answered, open
}

// TestOldAbsenceSaysNothingAgainstAWrite that looked after it.
func TestOldAbsenceSaysNothingAgainstAWrite(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	answered, open := x.holdFirstGet(nil)
	result := read(t, x.Broker, broker.GetRequest{Key: key})
	<-answered // that there is none is on its way
	x.person(key, "one")
	x.advance(time.Second)
	x.onFirst("Get", func(err error) error { // the write's own look
		close(open)
		<-result
		return err
	})
	r, err := x.Put(t.Context(), another, broker.PutRequest{Key: key, Value: secret.NewValue("one")})
	if err != nil || !r.Unchanged {
		t.Fatalf("got %v, %v, want unchanged", r, err)
	}
	if _, err := x.Get(t.Context(), another, broker.GetRequest{Key: key}); err != nil {
		t.Errorf("after the write: %v", err)
	}
}

// TestAbsenceFromBeforeAWriteLandsAfterIt: it was asked for after the write was sent, and
// answered before it took effect.
func TestAbsenceFromBeforeAWriteLandsAfterIt(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	var result chan got
	var open chan struct{}
	x.onFirst("Set", func(err error) error {
		x.advance(time.Second)
		var answered chan struct{}
		answered, open = x.holdFirstGet(vault.ErrNotFound)
		result = read(t, x.Broker, broker.GetRequest{Key: key, MaxStaleness: within(0)})
		<-answered
		x.advance(time.Second)
		return err
	})
	x.put(key, "one")
	close(open)
	<-result
	x.wantInOutage(key, "one")
}

// TestHalfAnAnswerFromBeforeAWrite, which began and ended between the two halves.
func TestHalfAnAnswerFromBeforeAWrite(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	x.onFirst("GetDeleted", func(error) error {
		x.advance(time.Second)
		x.put(key, "one")
		return vault.ErrUnavailable
	})
	_, err := x.Describe(t.Context(), another, key)
	wantError(t, err, secret.VaultUnavailable, "")
	x.wantInOutage(key, "one")
}

// TestReplacedVersionThatWasDisabledMeanwhile, as somebody was told.
func TestReplacedVersionThatWasDisabledMeanwhile(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.RegistrationToken, "demo")
	old := x.put(key, "token-one")
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		if op == "Set" {
			if _, err := x.vault.Vault.Update(context.Background(), key, old, vault.Patch{}); err != nil {
				t.Error(err)
			}
			x.advance(time.Second)
			x.wantNone(key)
		}
		return nil
	})
	x.rotate(key, secret.Value{})
	if v, err := x.Verify(t.Context(), another, key, secret.NewValue("token-one")); err != nil || v.Result != broker.NoMatch {
		t.Errorf("got %v, %v, want no match", v.Result, err)
	}
	if r, err := x.Get(t.Context(), another, broker.GetRequest{Key: key, Version: old}); err == nil {
		t.Errorf("got %q of a disabled version", r.Value.Reveal())
	}
}

// slowJournal calls ended while an outcome is being recorded.
type slowJournal struct{ ended func() }

func (slowJournal) Intend(context.Context, broker.Intent) error { return nil }
func (j slowJournal) Ended(context.Context, broker.Outcome) error {
	j.ended()
	return nil
}
func (slowJournal) Settled(context.Context, bool) {}
func (slowJournal) Replayed()                     {}

// TestDeletedWhileAWriteIsBeingRecorded: the vault had answered the write by then.
func TestDeletedWhileAWriteIsBeingRecorded(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	call := another
	call.Journal = slowJournal{func() {
		x.personDeletes(key)
		x.advance(time.Second)
		x.wantNone(key)
	}}
	if _, err := x.Put(t.Context(), call, broker.PutRequest{Key: key, Value: secret.NewValue("one")}); err != nil {
		t.Fatal(err)
	}
	x.wantInOutage(key, "")
}

// TestRefusalDuringAWriteThatCameToNothing: a read that was sent before it brings
// nothing back either.
func TestRefusalDuringAWriteThatCameToNothing(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	old := x.put(key, "one")
	x.put(key, "two")
	var earlier chan got
	var open chan struct{}
	x.vault.SetBefore(func(ctx context.Context, op string, _ secret.Key) error {
		if op != "Set" {
			return nil
		}
		if err := vault.OriginOf(ctx).Effect(); err != nil { // it is on its way
			t.Error(err)
		}
		x.vault.SetBefore(nil)
		x.advance(time.Second)
		var answered chan struct{}
		answered, open = x.holdFirstGet(nil)
		earlier = read(t, x.Broker, broker.GetRequest{Key: key, MaxStaleness: within(0)})
		<-answered
		x.advance(time.Second)
		x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
			if op == "Versions" {
				return vault.ErrRefused
			}
			return nil
		})
		_, err := x.Get(x.t.Context(), another, broker.GetRequest{Key: key, Version: old, MaxStaleness: within(0)})
		wantError(t, err, secret.VaultRefused, "")
		return vault.ErrUnavailable
	})
	if _, err := x.Put(t.Context(), another, broker.PutRequest{Key: key, Value: secret.NewValue("three")}); err == nil {
		t.Fatal("got no error")
	}
	close(open)
	<-earlier
	x.wantInOutage(key, "")
}

// TestCrowdedCallerIsToldOfADelete: what its look-ups wait for is a place, not nothing.
func TestCrowdedCallerIsToldOfADelete(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.RegistrationToken, "demo")
	x.put(key, "token-one")
	x.personDeletes(key)
	x.advance(14 * time.Minute)
	crowded := another
	crowded.Crowded = true
	if v, err := x.Verify(t.Context(), crowded, key, secret.NewValue("token-one")); err != nil || v.Result != broker.NoMatch {
		t.Errorf("got %v, %v, want no match", v.Result, err)
	}
}
