package keyvault

import (
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/exto/secrets-broker/server/vault"
)

// class is what a request is for. When the budget is short, the first class that
// waits goes first.
type class int

const (
	verifyingKnown class = iota
	verifying
	reading
	rest     // of what is about one secret
	listings // many names
	classes
)

const (
	// mostWaiting bounds each caller's line in a class. What comes then is refused at
	// once, and nobody else's.
	mostWaiting = 10_000
	// yieldEvery is which turn of a class goes to those behind it, if any wait. Else
	// a flood of verifications, of instances that somebody made up, would stop all
	// other reads for as long as it lasts.
	yieldEvery = 4
	// After a 429 nothing is sent for a while and then at half the rate, a tenth
	// of the full rate more each second. Key Vault counts over 10 s.
	throttlePause = time.Second
	leastShare    = 16
	steps         = 10
)

// budget is the share of the vault's requests that may be used. Who finds it
// spent waits, and within a class callers take turns: each gets one before anybody
// gets two. Safe for concurrent use.
type budget struct {
	full rate.Limit

	mu      sync.Mutex
	limiter *rate.Limiter
	queues  [classes]queue
	waiting int
	armed   bool
	held    time.Time // nothing is sent until then
	slowed  time.Time // when the rate was last lowered
	raised  time.Time // and raised
}

func newBudget(perSecond float64) *budget {
	return &budget{
		full:    rate.Limit(perSecond),
		limiter: rate.NewLimiter(rate.Limit(perSecond), max(1, int(perSecond/4))),
	}
}

// waiter is a request that waits.
type waiter struct{ granted chan struct{} }

// queue has the requests of one class, by caller.
type queue struct {
	turns   []string // callers that have one waiting, in order of their turns
	callers map[string][]*waiter
	turn    int // of the class, since it last yielded one
}

func (q queue) empty() bool { return len(q.turns) == 0 }

func (q *queue) push(caller string, w *waiter) {
	if q.callers == nil {
		q.callers = map[string][]*waiter{}
	}
	if len(q.callers[caller]) == 0 {
		q.turns = append(q.turns, caller)
	}
	q.callers[caller] = append(q.callers[caller], w)
}

// remove takes a request out that does not wait any more.
func (q *queue) remove(caller string, w *waiter) {
	line := q.callers[caller]
	at := slices.Index(line, w)
	if line = slices.Delete(line, at, at+1); len(line) > 0 {
		q.callers[caller] = line
		return
	}
	delete(q.callers, caller)
	at = slices.Index(q.turns, caller)
	q.turns = slices.Delete(q.turns, at, at+1)
}

// pop takes the next request out of a queue that has one.
func (q *queue) pop() *waiter {
	caller := q.turns[0]
	q.turns = q.turns[1:]
	line := q.callers[caller]
	w := line[0]
	if line = line[1:]; len(line) > 0 {
		q.callers[caller] = line
		q.turns = append(q.turns, caller)
	} else {
		delete(q.callers, caller)
	}
	return w
}

// take waits until one request may be sent: errBudget when a call with ctx may not
// wait so long. It tells the origin when it has to wait.
func (b *budget) take(ctx context.Context, c class) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	b.mu.Lock()
	if b.waiting == 0 && b.allow() {
		b.mu.Unlock()
		return nil
	}
	w, origin := &waiter{granted: make(chan struct{})}, vault.OriginOf(ctx)
	if len(b.queues[c].callers[origin.Caller]) >= mostWaiting {
		b.mu.Unlock()
		return errBudget
	}
	b.queues[c].push(origin.Caller, w)
	b.waiting++
	b.arm()
	b.mu.Unlock()

	if origin.Waits != nil {
		origin.Waits()
	}
	var tooLate <-chan time.Time
	if until, ok := vault.Until(ctx); ok {
		t := time.NewTimer(time.Until(until))
		defer t.Stop()
		tooLate = t.C
	}
	var err error
	select {
	case <-w.granted:
		return nil
	case <-tooLate:
		err = errBudget
	case <-ctx.Done():
		err = ctx.Err()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-w.granted: // meanwhile; it may as well be used
		return ctx.Err()
	default:
		b.queues[c].remove(origin.Caller, w)
		b.waiting--
		return err
	}
}

// allow takes one from the budget if it can be had now. b.mu is held.
func (b *budget) allow() bool {
	now := time.Now()
	return !now.Before(b.held) && b.limiter.AllowN(now, 1)
}

// arm lets dispatch run when the next request may be sent. b.mu is held.
func (b *budget) arm() {
	if b.armed || b.waiting == 0 {
		return
	}
	b.armed = true
	now := time.Now()
	in := time.Duration((1 - b.limiter.TokensAt(now)) / float64(b.limiter.Limit()) * float64(time.Second))
	time.AfterFunc(max(in, b.held.Sub(now), time.Millisecond), b.dispatch)
}

// dispatch lets those go whose turn it is.
func (b *budget) dispatch() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.armed = false
	for b.waiting > 0 {
		if !b.allow() {
			b.arm()
			return
		}
		close(b.next().granted)
	}
}

// next takes who has the next turn out of the queues. Somebody waits, and b.mu is
// held.
func (b *budget) next() *waiter {
	b.waiting--
	for c := range b.queues {
		q := &b.queues[c]
		if q.empty() {
			continue
		}
		q.turn++
		behind := slices.ContainsFunc(b.queues[c+1:], func(q queue) bool { return !q.empty() })
		if !behind || q.turn < yieldEvery {
			return q.pop()
		}
		q.turn = 0
	}
	panic("keyvault: more are waiting than are in the queues")
}

// throttled slows down after a 429: at most once for those that were sent
// together.
func (b *budget) throttled(retryAfter time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if held := now.Add(max(retryAfter, throttlePause)); held.After(b.held) {
		b.held = held
	}
	if now.Sub(b.slowed) < throttlePause {
		return
	}
	b.slowed = now
	b.limiter.SetLimitAt(now, max(b.limiter.Limit()/2, b.full/leastShare))
}

// served speeds up again.
func (b *budget) served() {
	b.mu.Lock()
	defer b.mu.Unlock()
	limit, now := b.limiter.Limit(), time.Now()
	if limit == b.full || now.Sub(b.slowed) < time.Second || now.Sub(b.raised) < time.Second {
		return
	}
	b.raised = now
	b.limiter.SetLimitAt(now, min(b.full, limit+b.full/steps))
}
