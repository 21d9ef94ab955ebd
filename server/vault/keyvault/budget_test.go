package keyvault

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/exto/secrets-broker/server/vault"
)

// bubble runs a test of a budget in fake time.
func bubble(t *testing.T, perSecond float64, test func(t *testing.T, b *budget)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newBudget(perSecond)) })
}

// spend takes all that can be had at once, and says how much that was.
func spend(t *testing.T, b *budget) int {
	t.Helper()
	for n := 0; ; n++ {
		b.mu.Lock()
		ok := b.allow()
		b.mu.Unlock()
		if !ok {
			return n
		}
	}
}

// line has so many requests of caller wait, in order. Each sends its name when it
// is let go.
func line(t *testing.T, b *budget, c class, caller string, n int, let chan<- string) {
	t.Helper()
	for range n {
		go func() {
			if err := b.take(t.Context(), c, caller); err == nil {
				let <- caller
			}
		}()
		synctest.Wait()
	}
}

func TestBudgetLetsAQuarterGoAtOnce(t *testing.T) {
	t.Parallel()
	for perSecond, want := range map[float64]int{320: 80, 24: 6, 4: 1, 1: 1, 0.1: 1} {
		bubble(t, perSecond, func(t *testing.T, b *budget) {
			time.Sleep(time.Hour) // nothing more is saved up
			if got := spend(t, b); got != want {
				t.Errorf("at %v a second: got %d at once, want %d", perSecond, got, want)
			}
		})
	}
}

func TestBudgetRate(t *testing.T) {
	t.Parallel()
	bubble(t, 40, func(t *testing.T, b *budget) {
		began := time.Now()
		for range 10 + 400 {
			if err := b.take(t.Context(), values, ""); err != nil {
				t.Fatal(err)
			}
		}
		if got := time.Since(began); got < 10*time.Second || got > 10*time.Second+500*time.Millisecond {
			t.Errorf("got 400 beyond the burst in %v, want 10 s", got)
		}
	})
}

func TestBudgetTakesTurns(t *testing.T) {
	t.Parallel()
	bubble(t, 1, func(t *testing.T, b *budget) {
		spend(t, b)
		let := make(chan string, 2000)
		line(t, b, values, "a", 1000, let)
		line(t, b, values, "b", 1, let)
		line(t, b, values, "c", 2, let)
		var order []string
		for range 6 {
			order = append(order, <-let)
		}
		if got, want := fmt.Sprint(order), "[a b c a c a]"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		for range 997 {
			if got := <-let; got != "a" {
				t.Fatalf("got %s, want a", got)
			}
		}
	})
}

func TestBudgetPutsValuesBeforeListings(t *testing.T) {
	t.Parallel()
	bubble(t, 1, func(t *testing.T, b *budget) {
		spend(t, b)
		let := make(chan string, 10)
		line(t, b, listings, "lister", 2, let)
		line(t, b, values, "reader", 2, let)
		var order []string
		for range 4 {
			order = append(order, <-let)
		}
		if got, want := fmt.Sprint(order), "[reader reader lister lister]"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
}

// TestBudgetForgetsWhoLeft: he takes no turn, no request and no place.
func TestBudgetForgetsWhoLeft(t *testing.T) {
	t.Parallel()
	bubble(t, 1, func(t *testing.T, b *budget) {
		spend(t, b)
		let := make(chan string, 10)
		ctx, leave := context.WithCancel(t.Context())
		left := make(chan error, 10)
		for range 3 {
			go func() { left <- b.take(ctx, values, "a") }()
			synctest.Wait()
		}
		line(t, b, values, "b", 1, let)
		go func() { left <- b.take(ctx, values, "b") }()
		synctest.Wait()
		line(t, b, values, "b", 1, let)
		leave()
		for range 4 {
			if err := <-left; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want Canceled", err)
			}
		}
		wantQueue(t, b, 2, 1)
		began := time.Now()
		<-let
		<-let
		if got := time.Since(began); got > 2*time.Second+10*time.Millisecond {
			t.Errorf("got both after %v, want 2 s", got)
		}
		wantQueue(t, b, 0, 0)
	})
}

// wantQueue looks how many requests wait for values, and of how many callers.
func wantQueue(t *testing.T, b *budget, waiting, callers int) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	q, in := &b.queues[values], 0
	for _, line := range q.callers {
		in += len(line)
	}
	if b.waiting != waiting || in != waiting || len(q.turns) != callers || len(q.callers) != callers {
		t.Errorf("got %d waiting, %d in the queue, turns of %v, want %d of %d callers", b.waiting, in, q.turns, waiting, callers)
	}
}

func TestBudgetBoundsTheQueue(t *testing.T) {
	t.Parallel()
	bubble(t, 1, func(t *testing.T, b *budget) {
		spend(t, b)
		b.throttled(time.Hour) // nobody is let go
		ctx, leave := context.WithCancel(t.Context())
		ended := make(chan error, mostWaiting)
		for range mostWaiting {
			go func() { ended <- b.take(ctx, values, "a") }()
		}
		synctest.Wait()
		if err := b.take(t.Context(), values, "b"); !errors.Is(err, errBudget) {
			t.Errorf("got %v, want errBudget at once", err)
		}
		leave()
		for range mostWaiting {
			<-ended
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if err := b.take(short, values, "b"); !errors.Is(err, errBudget) || time.Since(began) < 800*time.Millisecond {
			t.Errorf("got %v after %v, want a place in the queue: those before have left", err, time.Since(began))
		}
	})
}

// TestBudgetRefusesBeforeTheDeadline, so that the caller hears why.
func TestBudgetRefusesBeforeTheDeadline(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		deadline, patience, want time.Duration // 0: none
	}{
		"deadline":         {200 * time.Millisecond, 0, 180 * time.Millisecond},
		"long deadline":    {10 * time.Second, 0, 9900 * time.Millisecond},
		"patience":         {0, 200 * time.Millisecond, 180 * time.Millisecond},
		"patience first":   {10 * time.Second, time.Second, 900 * time.Millisecond},
		"deadline first":   {time.Second, 10 * time.Second, 900 * time.Millisecond},
		"patience is over": {10 * time.Second, -time.Second, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, 1, func(t *testing.T, b *budget) {
				spend(t, b)
				b.throttled(time.Hour)
				ctx := t.Context()
				if tt.deadline > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, tt.deadline)
					defer cancel()
				}
				if tt.patience != 0 {
					ctx = vault.WithOrigin(ctx, vault.Origin{Patience: time.Now().Add(tt.patience)})
				}
				began := time.Now()
				err := b.take(ctx, values, "")
				if !errors.Is(err, errBudget) || !errors.Is(err, vault.ErrThrottled) {
					t.Errorf("got %v, want errBudget", err)
				}
				if got := time.Since(began); got != tt.want {
					t.Errorf("got it after %v, want %v", got, tt.want)
				}
			})
		})
	}
}

func TestBudgetRefusesWhoIsGone(t *testing.T) {
	t.Parallel()
	bubble(t, 1, func(t *testing.T, b *budget) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := b.take(ctx, values, ""); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want Canceled", err)
		}
		if got := spend(t, b); got != 1 {
			t.Errorf("got %d left, want 1", got)
		}
	})
}

func TestBudgetHoldsAfterARefusal(t *testing.T) {
	t.Parallel()
	for after, want := range map[time.Duration]time.Duration{0: throttlePause, 300 * time.Millisecond: throttlePause, 7 * time.Second: 7 * time.Second} {
		bubble(t, 100, func(t *testing.T, b *budget) {
			began := time.Now()
			b.throttled(after)
			b.throttled(0) // a shorter one does not shorten it
			if err := b.take(t.Context(), values, ""); err != nil {
				t.Fatal(err)
			}
			if got := time.Since(began); got != want {
				t.Errorf("Retry-After %v: got the next after %v, want %v", after, got, want)
			}
		})
	}
}

func TestBudgetHalvesAndRecovers(t *testing.T) {
	t.Parallel()
	bubble(t, 160, func(t *testing.T, b *budget) {
		want := func(limit float64) {
			t.Helper()
			if got := float64(b.limiter.Limit()); got != limit {
				t.Errorf("got %v a second, want %v", got, limit)
			}
		}
		for range 20 { // that were sent together
			b.throttled(0)
		}
		want(80)
		time.Sleep(throttlePause)
		b.throttled(0)
		want(40)
		for range 10 {
			time.Sleep(throttlePause)
			b.throttled(0)
		}
		want(10) // and no less
		b.served()
		want(10) // not at once
		for n := range 9 {
			time.Sleep(time.Second)
			for range 20 {
				b.served()
			}
			want(10 + 16*float64(n+1))
		}
		time.Sleep(time.Second)
		b.served()
		want(160)
		time.Sleep(time.Second)
		b.served()
		want(160) // and no more
	})
}

// TestBudgetHalvesAlsoWhenItJustSpedUp, or the rate would go up for ever at a
// vault that refuses again and again.
func TestBudgetHalvesAlsoWhenItJustSpedUp(t *testing.T) {
	t.Parallel()
	bubble(t, 160, func(t *testing.T, b *budget) {
		b.throttled(0)
		for range 3 {
			time.Sleep(1500 * time.Millisecond)
			b.served()
			time.Sleep(100 * time.Millisecond)
			b.throttled(0)
		}
		if got := float64(b.limiter.Limit()); got >= 80 {
			t.Errorf("got %v a second, want less than half", got)
		}
	})
}
