package broker

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// behind is how long a question waits for the one before it on the same secret, so
// that all who come meanwhile share it.
const behind = 250 * time.Millisecond

// leastFlight is how long the vault may take for a caller in a hurry, if others wait or
// memory answered it.
const leastFlight = 5 * time.Second

// flight is one look at a secret in the vault, for all who can use its answer. What
// may change is under the mutex of the secret's shard.
type flight struct {
	key      secret.Key
	version  string // the version that is wanted too; empty: none but the current one
	depth    depth
	caller   string
	priority vault.Priority
	deadline time.Time

	began    time.Time
	sent     time.Time // zero until the vault is asked
	order    int       // of those that were sent, this one's place
	queued   bool      // it waits for the caller's turn
	outdated bool      // the secret was written since, or something newer is known
	full     bool      // a write ended since: nobody waits for it any more who comes now
	users    int
	cancel   context.CancelFunc

	// waits is closed when it is queued: others may have a better place. newer is
	// closed when what another flight found is kept.
	waits, newer chan struct{}
	done         chan struct{}
	// What it found, once it is done.
	entry *entry
	older *older
	err   error
}

// need is what a read asks of an answer.
type need struct {
	key secret.Key
	// version is the wanted version; empty: the current one.
	version string
	// max is how old the answer may be. Zero: asked for after the read began.
	max time.Duration
	// own reports that max is the broker's own bound, which an outage widens.
	own bool
	// least is the lowest generation that will do.
	least int64
	// depth says whether it matters that an absent secret is deleted.
	depth    depth
	priority vault.Priority
	call     Call
	// mayAsk, unless nil, says whether the vault may be asked, where nobody asks it
	// yet.
	mayAsk func(now time.Time) bool
	// patient reports that memory is no answer as long as that of the vault may come.
	patient bool

	began time.Time
}

// serves reports whether who needs n can wait for f. The shard's mutex is held.
func (f *flight) serves(n *need, now time.Time) bool {
	switch {
	case f.outdated, f.full, f.version != n.version, f.depth == live && n.depth == whole:
		return false
	case !f.sent.IsZero():
		return f.sent.After(n.began) || n.max > 0 && age(now, f.sent) <= n.max
	case f.queued:
		return f.caller == n.call.Caller && f.priority >= n.priority
	}
	return true
}

// before reports whether the vault was asked before then.
func (f *flight) before(then time.Time) bool { return !f.sent.IsZero() && f.sent.Before(then) }

func (f *flight) supersede() {
	select {
	case <-f.newer:
	default:
		close(f.newer)
	}
}

// boarding is what to wait for, or not to.
type boarding struct {
	*flight      // nil: there is an answer, or the vault may not be asked
	after   bool // the vault is asked after this
	kept    *answer
}

// board is the flight to wait for, which is begun when there is none and what is kept
// is still no answer. deadline is that of the read; zero: it has none.
func (b *Broker) board(deadline time.Time, n *need) boarding {
	s := b.cache.shard(n.key)
	now := b.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := b.cache.get(n.key); e != nil {
		if o, ok := n.met(e, n.max, now); ok {
			source := Cached
			if e.asOf.After(n.began) {
				source = Live // asked for by somebody else, for this one as well
			}
			return boarding{kept: &answer{e, o, source}}
		}
	}
	var before *flight
	asked := false
	shared := *n
	if s.writing[n.key] {
		shared.max = 0 // others may have seen already what is being written
	}
	for _, f := range s.flights[n.key] {
		if f.serves(&shared, now) {
			f.users++
			return boarding{flight: f, after: f.sent.IsZero() || f.sent.After(n.began)}
		}
		if !f.sent.IsZero() && !f.outdated && f.version == n.version {
			before = f
		}
		asked = asked || f.queued && !f.outdated && f.version == n.version // by another caller, in vain as yet
	}
	if n.mayAsk != nil && !asked && !n.mayAsk(now) {
		return boarding{}
	}
	// Whoever shares it may have more time than the caller that began it, and nobody
	// waits for it longer than that without asking again.
	if soon, late := time.Now().Add(leastFlight), time.Now().Add(renewal); deadline.IsZero() || deadline.After(late) {
		deadline = late
	} else if deadline.Before(soon) {
		deadline = soon
	}
	f := &flight{
		key: n.key, version: n.version, depth: n.depth, caller: n.call.Caller, priority: n.priority, deadline: deadline, began: now, users: 1,
		waits: make(chan struct{}), newer: make(chan struct{}), done: make(chan struct{}),
	}
	if b.watches.has(n.key) {
		f.depth = whole
	}
	if n.mayAsk != nil {
		f.users++ // the only look for a while is not taken back
	}
	ctx, cancel := context.WithDeadline(b.stopped, f.deadline)
	f.cancel = cancel
	s.flights[n.key] = append(s.flights[n.key], f)
	counted := b.background()
	go func() {
		b.fly(ctx, s, f, n.call, before)
		if counted {
			b.loads.Done()
		}
	}()
	return boarding{flight: f, after: true}
}

// leave is called by each of its users, but not when it is done.
func (b *Broker) leave(f *flight) {
	s := b.cache.shard(f.key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.users--; f.users == 0 {
		f.outdated = true // no write after this knows of it
		f.cancel()
		s.land(f)
	}
}

func (s *shard) land(f *flight) {
	flights := slices.DeleteFunc(s.flights[f.key], func(other *flight) bool { return other == f })
	if len(flights) > 0 {
		s.flights[f.key] = flights
	} else {
		delete(s.flights, f.key)
	}
}

// fly asks the vault.
func (b *Broker) fly(ctx context.Context, s *shard, f *flight, call Call, before *flight) {
	defer f.cancel()
	if before != nil {
		wait := time.NewTimer(behind)
		select {
		case <-before.done:
		case <-wait.C:
		case <-ctx.Done():
		}
		wait.Stop()
	}
	sends := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.sent++
		f.sent, f.order, f.queued = b.now(), s.sent, false
	}
	sends()
	ctx = vault.WithOrigin(ctx, vault.Origin{
		Caller: call.Caller, RequestID: call.AuditID, Priority: f.priority, Sends: sends,
		Waits: func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			f.sent = time.Time{}
			if !f.queued {
				f.queued = true
				select {
				case <-f.waits:
				default:
					close(f.waits)
				}
			}
		},
	})
	e, o, err := b.fetch(ctx, f)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.land(f)
	f.entry, f.older, f.err = e, o, err
	if err == nil {
		// Whoever comes after this is not to be told what was before it: a write of
		// unknown outcome may have landed in between.
		for _, other := range s.flights[f.key] {
			other.outdated = other.outdated || !other.sent.IsZero() && other.order < f.order
		}
	}
	switch {
	case refused(err):
		b.cache.forget(s, f.key, f.sent)
	case f.outdated || s.writing[f.key]:
		if e != nil && e.gone() {
			b.cache.forget(s, f.key, f.sent)
		}
	case err == nil && o != nil && len(f.version) <= versions.MaxVersion: // a longer one is none, and not worth the memory
		b.keep(s, e)
		b.keepOlder(e, o)
	case e != nil:
		b.keep(s, e)
	case unreachable(err):
		// A caller in a hurry says nothing of the vault.
		now := b.now()
		if kept := b.cache.get(f.key); kept != nil && !f.queued && (!errors.Is(err, context.DeadlineExceeded) || age(now, f.began) >= patience) {
			kept.failed.Store(now.UnixNano())
		}
	}
	close(f.done)
}

// fetch reads a secret as reads need it, and of another version than the current one
// what may be said of it.
func (b *Broker) fetch(ctx context.Context, f *flight) (e *entry, o *older, err error) {
	defer func() {
		if p := recover(); p != nil {
			b.log.Error("panic in a read", "audit_id", vault.OriginOf(ctx).RequestID, "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
			err = refuse(f.key, secret.Defect, "the broker failed")
		}
	}()
	var s *snapshot
	_, err = steady(func() (_ struct{}, err error) {
		e, o = nil, nil
		if s, err = b.load(ctx, f.key, f.depth); err != nil {
			return struct{}{}, err
		}
		if s.hasLate() {
			b.repair(f.key)
		}
		if f.version == "" || f.version == s.current.Version || s.state == Absent || s.state == Deleted {
			return struct{}{}, nil
		}
		v, value, err := b.valueOf(unheard(ctx), s, f.version)
		var refusal *Error
		if err != nil && !errors.As(err, &refusal) {
			e = b.entryOf(s) // what is known by now
			return struct{}{}, err
		}
		v.Version = f.version
		o = b.olderOf(s, v, value, refusal)
		return struct{}{}, nil
	})
	if err != nil {
		return e, nil, err
	}
	return b.entryOf(s), o, nil
}

// keepOlder keeps o beside its secret's current version. Others may see e by now.
func (b *Broker) keepOlder(e *entry, o *older) {
	if kept := b.cache.get(e.Key); kept != nil && kept.Version == e.Version {
		b.cache.entries.Set(e.Key, kept.with(o))
	}
}

// unreachable reports that the vault could not be asked, which says nothing of the
// secret or of the broker's rights.
func unreachable(err error) bool {
	return !refused(err) && (errors.Is(err, vault.ErrUnavailable) || errors.Is(err, vault.ErrThrottled) || errors.Is(err, context.DeadlineExceeded))
}

// refused reports that the vault answered, and what was kept is not to be served any
// more.
func refused(err error) bool {
	var told *Error
	if errors.As(err, &told) {
		return told.Reason == secret.KeyMismatch
	}
	return errors.Is(err, vault.ErrRefused) || errors.As(err, &halfAnswer{})
}
