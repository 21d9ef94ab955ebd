package broker_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
)

// watch gives the events of a watch, and ends it with the test.
func (x *crossing) watch(keys ...secret.Key) <-chan broker.Event {
	x.t.Helper()
	ctx, end := context.WithCancel(context.Background())
	events, ended := make(chan broker.Event), make(chan struct{})
	go func() {
		defer close(ended)
		defer close(events)
		err := x.Watch(ctx, another, keys, func(e broker.Event) error {
			select {
			case events <- e:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		if told := (*broker.Error)(nil); !errors.Is(err, context.Canceled) && !(errors.As(err, &told) && told.Reason == secret.Cancelled) {
			x.t.Errorf("the watch ended: %v", err)
		}
	}()
	x.t.Cleanup(func() { end(); <-ended })
	return events
}

// next is the next event; the zero one when there is none for long.
func next(events <-chan broker.Event) (e broker.Event) {
	select {
	case e = <-events:
	case <-time.After(10 * time.Second):
	}
	return e
}

// TestHangingSecretKeepsNoOtherFromBeingPolled, however long it hangs.
func TestHangingSecretKeepsNoOtherFromBeingPolled(t *testing.T) {
	t.Parallel()
	x, hanging, other := newCrossing(t), keyOf(t, secret.DatabaseURI, "hanging"), keyOf(t, secret.DatabaseURI, "other")
	x.ttl = time.Second
	x.restart()
	x.put(hanging, "one")
	x.put(other, "one")
	events := x.watch(hanging, other)
	next(events)
	next(events)
	open := make(chan struct{})
	asked := make(chan struct{}, 100)
	x.vault.SetBefore(func(ctx context.Context, op string, key secret.Key) error {
		if key != hanging {
			return nil
		}
		asked <- struct{}{}
		select {
		case <-open:
		case <-ctx.Done():
		}
		return ctx.Err()
	})
	for n := range 80 {
		x.person(other, fmt.Sprint("outside-", n))
		x.advance(time.Second)
		if e := next(events); e.Change != broker.ChangedOutside || e.Key != other {
			t.Fatalf("got %v of %s, want that the other one was changed outside", e.Change, e.Key)
		}
	}
	if n := len(asked); n != 1 {
		t.Errorf("the hanging one was asked for %d times at once, want 1", n)
	}
	close(open)
}

// TestSlowVaultEndsNoWatch that begins.
func TestSlowVaultEndsNoWatch(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	x.SetFirstTry(20 * time.Millisecond)
	var once sync.Once
	x.vault.SetBefore(func(ctx context.Context, _ string, _ secret.Key) (err error) {
		once.Do(func() {
			<-ctx.Done() // it never answers
			err = ctx.Err()
		})
		return err
	})
	if e := next(x.watch(key)); e.Change != broker.Missing {
		t.Errorf("got %v, want that it is missing", e.Change)
	}
}
