package server

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/authz"
	"github.com/exto/secrets-broker/server/broker"
)

// bounds are what callers may use of the server. An idle connection costs about
// 74 KB.
type bounds struct {
	// handshakes that are under way; beyond it the oldest is shed, so that a client
	// that does finish its own is not kept out by any number of silent ones.
	handshakes int
	// connections of all callers, and of one identity: as many as the replicas of
	// the Console and its workers may have. Each alone costs 740 MB and 74 MB.
	connections, callerConnections int
	// calls and streams of one identity at once. 10,000 Gets at once are usual after
	// the broker was away; and as many streams are two watches for each connection
	// that there may be of all callers.
	calls, streams int64
	// held is the bytes of requests of one identity: what has come of those that are
	// unfinished, and writes until they are answered. Beyond half of it new calls are
	// refused; beyond all of it connections on which more comes are closed. That is
	// 500 unfinished requests of 64 KiB, or 1,300 writes of the longest value.
	held int64
	// heldByAll is the same for all identities together: beyond it, whoever holds
	// more than heldAnyway is treated as if beyond held.
	heldByAll, heldAnyway int64
	// receive is how long a request may be on its way, from its headers to its end.
	receive time.Duration
	// idleFrames are those that make the server work and no call go on: streams that
	// are reset, settings, priorities, continued headers, what is unknown. A connection
	// may break off all its calls several times over, and then as many a second as it
	// may have.
	idleFrames, idleFramesPerSecond int
}

var usualBounds = bounds{
	handshakes:        1024,
	connections:       10_000,
	callerConnections: 1000,
	calls:             16 << 10,
	streams:           16 << 10,
	held:              64 << 20,
	heldByAll:         256 << 20,
	heldAnyway:        1 << 20,
	receive:           30 * time.Second,

	idleFrames: 4 * maxStreams, idleFramesPerSecond: maxStreams,
}

// refusalLines is how many refusals a second of one identity have a line of their own in
// the audit log and the normal one; beyond that they are counted together, so that nobody
// fills the disk who may do nothing.
const refusalLines = 100

// tells reports whether a refusal has a line of its own.
func (a *account) tells(now time.Time) bool { return a.refusals == nil || a.refusals.AllowN(now, 1) }

// busyRetry is what a caller waits for that has too much under way: nobody knows
// when its calls end.
const busyRetry = time.Second

// account is what one identity uses of the server, over all its connections.
type account struct {
	requests       *rate.Limiter // nil: no limit
	refusals       *rate.Limiter // of which each has a line of its own in the audit log
	pace           *rate.Limiter // of refusals by quota
	calls, streams atomic.Int64  // under way
	refused        atomic.Int64  // by quota, and held back
	held           atomic.Int64
	connections    int // guarded by accounts.mu
}

// accounts has an account for each identity that has a connection, and for some time
// after the last is closed: an identity gets no fresh one by connecting again.
type accounts struct {
	bounds
	perSecond float64 // requests of one identity; 0: no limit
	now       func() time.Time
	held      atomic.Int64

	mu sync.Mutex
	of map[spiffeid.ID]*account // those without an identity have one together
}

// open gives a further connection its identity's account, or nil when it has as many
// as it may have.
func (a *accounts) open(id spiffeid.ID) *account {
	a.mu.Lock()
	defer a.mu.Unlock()
	acc := a.of[id]
	if acc == nil {
		acc = &account{refusals: rate.NewLimiter(refusalLines, refusalLines)}
		if a.perSecond > 0 {
			acc.requests = rate.NewLimiter(rate.Limit(a.perSecond), max(1, int(a.perSecond)))
			acc.pace = rate.NewLimiter(quotaRefusals, 1)
		}
		a.of[id] = acc
	}
	if acc.connections >= a.callerConnections {
		return nil
	}
	acc.connections++
	return acc
}

// close is for a connection that is gone.
func (a *accounts) close(id spiffeid.ID, acc *account) {
	a.mu.Lock()
	defer a.mu.Unlock()
	acc.connections--
	a.forget(id, acc)
}

// forget drops an account once it is like a new one: nothing is under way, and all
// tokens are there again.
func (a *accounts) forget(id spiffeid.ID, acc *account) {
	if acc.connections > 0 {
		return
	}
	full := acc.requests == nil || acc.requests.TokensAt(a.now()) >= float64(acc.requests.Burst())
	if full && acc.calls.Load() == 0 && acc.streams.Load() == 0 {
		if a.of[id] == acc {
			delete(a.of, id)
		}
		return
	}
	time.AfterFunc(time.Second, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.forget(id, acc)
	})
}

// hold takes n more bytes of requests, or fewer if negative, and reports whether the
// identity is within its bound.
func (a *accounts) hold(acc *account, n int64) bool {
	own, all := acc.held.Add(n), a.held.Add(n)
	return own <= a.bounds.held && (all <= a.heldByAll || own <= a.heldAnyway)
}

// crowded reports whether an identity is to make no further calls before it is
// answered some.
func (a *accounts) crowded(acc *account) bool {
	own := acc.held.Load()
	return own > a.bounds.held/2 || own > a.heldAnyway && a.held.Load() > a.heldByAll
}

// enter is admit for a call that begins, which takes its place among the identity's
// calls or streams until leave. A caller's own limits come right after the question
// who it is, so that calls without permission count too.
func (g *gate) enter(ctx context.Context, c *call, underWay *atomic.Int64, most int64) error {
	err := g.admit(c)
	if err != nil {
		if refused := (*broker.Error)(nil); errors.As(err, &refused) && refused.Reason == secret.CallerUnknown {
			return err
		}
	}
	if c.account.requests != nil && !c.health && !g.spend(c, err) {
		c.account.holdBack(ctx, most)
		return c.overQuota
	}
	if err != nil {
		return err
	}
	if underWay.Add(1) > most || g.accounts.crowded(c.account) && !c.health {
		busy := &broker.Error{Reason: secret.CallerQuotaExceeded, RetryAfter: busyRetry,
			Message: "this caller has too much under way; let some of its calls end, and send fewer or smaller ones at once"}
		if c.action == authz.Verify {
			c.overQuota, c.crowded = busy, true // as spend does
			return nil
		}
		underWay.Add(-1)
		return busy
	}
	return nil
}

// A refusal by quota is held back, for quotaPause and as much longer as it takes that
// one identity gets no more than quotaRefusals a second. A caller that never rests is so
// kept from spending on refusals what the others' calls need; with as many calls at once
// as one may have, each waits for some 8 s.
const (
	quotaPause    = 20 * time.Millisecond
	quotaRefusals = 2000
)

// holdBack is for a refusal by quota, which takes no place among the identity's calls.
func (a *account) holdBack(ctx context.Context, most int64) {
	defer a.refused.Add(-1)
	if a.refused.Add(1) > most {
		return
	}
	if turn := a.pace.Reserve(); !wait(ctx, max(quotaPause, turn.Delay())) {
		turn.Cancel()
	}
}

// wait reports whether d has passed before ctx ended.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// spend takes one of the requests that the caller has a second; if there is none, the
// call is over its quota. Of VerifyToken that is judged after the look at the token:
// one that matches is refused by no limit, since anybody can make the Console API ask
// about wrong ones.
func (g *gate) spend(c *call, refused error) bool {
	now := g.now()
	if c.account.requests.AllowN(now, 1) {
		return true
	}
	missing := 1 - c.account.requests.TokensAt(now)
	retry := time.Duration(max(0, missing) / g.accounts.perSecond * float64(time.Second))
	c.overQuota = &broker.Error{Reason: secret.CallerQuotaExceeded, RetryAfter: max(retry, time.Millisecond),
		Message: "this caller makes more requests a second than it may; try again after the time in RetryInfo"}
	return refused == nil && c.action == authz.Verify
}

// holdWrite counts a write among what its caller holds, until the func is called.
func (a *accounts) holdWrite(c *call, req any) (done func()) {
	n := int64(proto.Size(req.(proto.Message)))
	a.hold(c.account, n)
	return func() { a.hold(c.account, -n) }
}
