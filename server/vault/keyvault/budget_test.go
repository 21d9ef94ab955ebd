package keyvault

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
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

// by is ctx for a request of caller.
func by(ctx context.Context, caller string) context.Context {
	return vault.WithOrigin(ctx, vault.Origin{Caller: caller})
}

// line has so many requests of caller wait, in order. Each sends its name when it
// is let go.
func line(t *testing.T, b *budget, c class, caller string, n int, let chan<- string) {
	t.Helper()
	for range n {
		go func() {
			if err := b.take(by(t.Context(), caller), c); err == nil {
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
			if err := b.take(t.Context(), rest); err != nil {
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
		line(t, b, rest, "a", 1000, let)
		line(t, b, rest, "b", 1, let)
		line(t, b, rest, "c", 2, let)
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

// wantOrder looks in what order so many as want names are let go.
func wantOrder(t *testing.T, let <-chan string, want string) {
	t.Helper()
	var order []string
	for range strings.Fields(want) {
		order = append(order, <-let)
	}
	if got := strings.Join(order, " "); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestBudgetLetsTheFirstClassGoFirst(t *testing.T) {
	t.Parallel()
	bubble(t, 1, func(t *testing.T, b *budget) {
		spend(t, b)
		let := make(chan string, 10)
		line(t, b, listings, "lister", 1, let)
		line(t, b, rest, "writer", 2, let)
		line(t, b, rest, "watcher", 1, let)
		line(t, b, reading, "reader", 2, let)
		line(t, b, reading, "other", 1, let)
		line(t, b, verifying, "verifier", 2, let)
		line(t, b, verifying, "console", 1, let)
		line(t, b, verifyingKnown, "console", 1, let)
		// By turns within a class, and no class has so many that it yields.
		wantOrder(t, let, "console verifier console verifier reader other reader writer watcher writer lister")
	})
}

// TestBudgetYields: each class goes on, whatever waits before it.
func TestBudgetYields(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		waiting [classes]int
		want    string // each class by its first letter
	}{
		"nobody behind":   {[classes]int{verifying: 9}, "v v v v v v v v v"},
		"the next class":  {[classes]int{verifying: 9, reading: 3}, "v v v r v v v r v v v r"},
		"only the last":   {[classes]int{verifying: 6, listings: 2}, "v v v l v v v l"},
		"further behind":  {[classes]int{verifying: 15, reading: 4, rest: 1}, "v v v r v v v r v v v r v v v R v v v r"},
		"known ones":      {[classes]int{verifyingKnown: 5, verifying: 2}, "k k k v k k v"},
		"without a first": {[classes]int{reading: 4, rest: 2}, "r r r R r R"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, 1, func(t *testing.T, b *budget) {
				spend(t, b)
				let := make(chan string, 30)
				for c, letter := range [classes]string{"k", "v", "r", "R", "l"} {
					line(t, b, class(c), letter, tt.waiting[c], let)
				}
				wantOrder(t, let, tt.want)
			})
		})
	}
}

// TestBudgetOfAFlood: no class lets one caller's thousands go before another's one.
func TestBudgetOfAFlood(t *testing.T) {
	t.Parallel()
	for c := range classes {
		bubble(t, 1, func(t *testing.T, b *budget) {
			spend(t, b)
			ctx, leave := context.WithCancel(by(t.Context(), "flood"))
			var flood sync.WaitGroup
			for range 5000 {
				flood.Go(func() { _ = b.take(ctx, c) })
			}
			synctest.Wait()
			for range 3 {
				began := time.Now()
				if err := b.take(by(t.Context(), "other"), c); err != nil {
					t.Fatal(err)
				}
				if got := time.Since(began); got > 2*time.Second+10*time.Millisecond {
					t.Errorf("class %d: waited %v, want one turn of the flood's and its own, 2 s", c, got)
				}
			}
			leave()
			flood.Wait()
		})
	}
}

// TestBudgetTellsWhoWaits, and may be asked meanwhile.
func TestBudgetTellsWhoWaits(t *testing.T) {
	t.Parallel()
	bubble(t, 1, func(t *testing.T, b *budget) {
		waits := 0
		ctx := vault.WithOrigin(t.Context(), vault.Origin{Waits: func() {
			waits++
			b.served() // needs the mutex
		}})
		for want := range 3 { // the first need not wait
			if err := b.take(ctx, rest); err != nil {
				t.Fatal(err)
			}
			if waits != want {
				t.Errorf("got %d calls of Waits, want %d", waits, want)
			}
		}
	})
}

func TestClass(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		call     *call
		priority vault.Priority
		want     class
	}{
		{&call{op: "Get"}, vault.VerifyingKnown, verifyingKnown},
		{&call{op: "Get"}, vault.Verifying, verifying},
		{&call{op: "Get"}, vault.Reading, reading},
		{&call{op: "Get"}, vault.Rest, rest},
		{&call{op: "Set", change: true}, vault.Rest, rest},
		{&call{op: "List", listing: true}, vault.Verifying, listings},
		{&call{op: probeOp}, vault.Rest, verifyingKnown},
	} {
		if got := tt.call.class(tt.priority); got != tt.want {
			t.Errorf("%s of priority %d: got class %d, want %d", tt.call.op, tt.priority, got, tt.want)
		}
	}
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
			go func() { left <- b.take(by(ctx, "a"), rest) }()
			synctest.Wait()
		}
		line(t, b, rest, "b", 1, let)
		go func() { left <- b.take(by(ctx, "b"), rest) }()
		synctest.Wait()
		line(t, b, rest, "b", 1, let)
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

// wantQueue looks how many requests wait, and of how many callers.
func wantQueue(t *testing.T, b *budget, waiting, callers int) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	q, in := &b.queues[rest], 0
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
			go func() { ended <- b.take(by(ctx, "a"), rest) }()
		}
		synctest.Wait()
		if err := b.take(by(t.Context(), "a"), rest); !errors.Is(err, errBudget) {
			t.Errorf("got %v, want errBudget at once", err)
		}
		others, cancelOthers := context.WithTimeout(t.Context(), time.Second)
		defer cancelOthers()
		began := time.Now()
		if err := b.take(by(others, "b"), rest); !errors.Is(err, errBudget) || time.Since(began) < 800*time.Millisecond {
			t.Errorf("got %v after %v, want a place in the queue for another caller", err, time.Since(began))
		}
		leave()
		for range mostWaiting {
			<-ended
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began = time.Now()
		if err := b.take(by(short, "a"), rest); !errors.Is(err, errBudget) || time.Since(began) < 800*time.Millisecond {
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
				err := b.take(ctx, rest)
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
		if err := b.take(ctx, rest); !errors.Is(err, context.Canceled) {
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
			if err := b.take(t.Context(), rest); err != nil {
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
