package broker

import (
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unique"

	"github.com/maypok86/otter/v2"

	"github.com/exto/secrets-broker/secret"
)

const (
	// cacheBytes bounds the cache, by what entries weigh. No entry weighs less than
	// entryBytes, so that their number is bounded too.
	cacheBytes = 256 << 20
	entryBytes = 1 << 10
	// mostOlder is how many versions beside the current one are kept of a secret, and of
	// how many more that they are not served.
	mostOlder = 4
	shards    = 64
)

// entry is a secret as the vault had it at one moment, as far as reads need it. It
// is not changed once others can see it, but for what is at its end.
type entry struct {
	Metadata              // of the current version; State is Absent when there is none
	value    secret.Value // unless State is not Active
	digest   digest       // of the value of a token
	asOf     time.Time
	// since is from when on somebody who asks and is told otherwise knows better: of what
	// a write left, when the vault had answered that.
	since time.Time
	// unsure reports that an Absent secret may as well be deleted: nobody looked.
	unsure bool
	// partial reports that it says how the secret stands, without the value.
	partial bool
	// Which version the current one replaced by a rotate, and until when that one
	// is honoured.
	previous string
	graceEnd time.Time
	change   Change // how it came to this, by op if that is not 0
	op       uint64 // a hash of the id of the last operation that it names
	older    []*older

	renewed atomic.Bool  // a newer one was asked for, ahead of its end
	failed  atomic.Int64 // when asking again failed, as the vault could not be reached; Unix ns
	looked  atomic.Int64 // when it was last asked for again for a token that does not match
	// When the version before could not be asked for.
	beforeFailed atomic.Int64
}

// older is another version than the current one, or why it is not served.
type older struct {
	Metadata
	value   secret.Value
	digest  digest
	asOf    time.Time
	refusal *Error
}

// gone reports that there is no value to be read.
func (e *entry) gone() bool { return e.State != Active }

// entryOf is what reads need of s.
func (b *Broker) entryOf(s *snapshot) *entry {
	e := &entry{Metadata: compact(s.metadata(s.current)), value: s.value, asOf: s.asOf, since: s.asOf, unsure: s.unsure}
	e.change, e.op = b.lastChange(s)
	e.State = s.state
	if s.state == Active || s.state == Disabled {
		e.previous, e.graceEnd = strings.Clone(s.current.Previous), s.current.GraceEnd
	}
	if s.state != Active {
		e.value = secret.Value{}
	}
	e.digest = b.digests.of(e.Key, e.value)
	return e
}

// left is what a write left, of which the vault has just told.
func (b *Broker) left(s *snapshot) *entry {
	e := b.entryOf(s)
	e.since = b.now()
	return e
}

// compact lets go of the larger strings that those of m may be parts of, and keeps
// the names of the few callers once.
func compact(m Metadata) Metadata {
	m.Version, m.CreatedBy = strings.Clone(m.Version), unique.Make(m.CreatedBy).Value()
	return m
}

// olderOf is a version of s that is not its current one, with its value or why that
// is not served.
func (b *Broker) olderOf(s *snapshot, v version, value secret.Value, refusal *Error) *older {
	o := &older{Metadata: compact(s.metadata(v)), value: value, asOf: s.asOf, refusal: refusal}
	o.Key = s.key
	o.digest = b.digests.of(s.key, value)
	return o
}

// find is the version with this id, if it is kept.
func (e *entry) find(version string) *older {
	for _, o := range e.older {
		if o.Version == version {
			return o
		}
	}
	return nil
}

// with is e and o beside it.
func (e *entry) with(o *older) *entry {
	n := e.copy()
	n.older = []*older{o}
	for _, other := range e.older {
		if other.Version != o.Version {
			n.older = append(n.older, other)
		}
	}
	// Anybody may ask for versions that there are not: those take no value's place. And
	// no other value takes that of the one in grace.
	count, last := 0, 0
	for i, other := range n.older {
		if (other.refusal == nil) == (o.refusal == nil) {
			count++
			if other.Version != n.previous {
				last = i
			}
		}
	}
	if count > mostOlder {
		n.older = slices.Delete(n.older, last, last+1)
	}
	return n
}

func (e *entry) copy() *entry {
	n := &entry{
		Metadata: e.Metadata, value: e.value, digest: e.digest, asOf: e.asOf, since: e.since, unsure: e.unsure,
		previous: e.previous, graceEnd: e.graceEnd, change: e.change, op: e.op, older: e.older,
	}
	n.looked.Store(e.looked.Load())
	n.beforeFailed.Store(e.beforeFailed.Load())
	n.failed.Store(e.failed.Load())
	return n
}

func (e *entry) weight() uint32 {
	w := entryBytes + len(e.value.Reveal())
	for _, o := range e.older {
		w += entryBytes/2 + len(o.value.Reveal())
	}
	return uint32(w)
}

// age is how old something is, on the clock that went further of the two that the
// system has: the monotonic one stands still while the machine sleeps, and the wall
// clock can be set.
func age(now, then time.Time) time.Duration {
	return max(now.Sub(then), now.Round(0).Sub(then.Round(0)))
}

// cache is what the broker remembers of the values in the vault, and who is asking
// for them now. A write of a secret and what is kept of it never disagree: from its
// first effect to its end nothing is kept, and what was asked for before that end
// is not kept either.
type cache struct {
	entries *otter.Cache[secret.Key, *entry]
	seed    maphash.Seed
	shards  [shards]shard
}

// shard orders what happens to the secrets that fall to it.
type shard struct {
	mu      sync.Mutex
	flights map[secret.Key][]*flight
	asides  map[secret.Key][]*aside
	writing map[secret.Key]bool // since a write's first effect
	sent    int                 // flights
}

// aside is a look at a secret beside the flights: by a write, a Describe or a List.
type aside struct {
	// written reports that another write of the secret began or ended meanwhile.
	written bool
	// denied is when the last of those asked who were told meanwhile that there is nothing
	// to be read. What was found before that is not kept.
	denied time.Time
}

// newCache keeps values for so long, and that there is none as long as it is
// believed.
func newCache(keep time.Duration) *cache {
	c := &cache{seed: maphash.MakeSeed()}
	c.entries = otter.Must(&otter.Options[secret.Key, *entry]{
		MaximumWeight: cacheBytes,
		Weigher:       func(_ secret.Key, e *entry) uint32 { return e.weight() },
		ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[secret.Key, *entry]) time.Duration {
			if e.Value.State == Absent {
				return absentFor
			}
			return keep
		}),
	})
	for i := range c.shards {
		c.shards[i].flights, c.shards[i].asides, c.shards[i].writing = map[secret.Key][]*flight{}, map[secret.Key][]*aside{}, map[secret.Key]bool{}
	}
	return c
}

func (c *cache) close() { c.entries.StopAllGoroutines() }

func (c *cache) shard(key secret.Key) *shard {
	return &c.shards[maphash.Comparable(c.seed, key)%shards]
}

// get is what is kept of a secret; nil when nothing is.
func (c *cache) get(key secret.Key) *entry {
	e, _ := c.entries.GetIfPresent(key)
	return e
}

// aside begins a look beside the flights, which over ends.
func (c *cache) aside(key secret.Key) *aside {
	s := c.shard(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	a := &aside{}
	s.asides[key] = append(s.asides[key], a)
	return a
}

func (c *cache) over(key secret.Key, a *aside) {
	s := c.shard(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(key, a)
}

func (s *shard) remove(key secret.Key, a *aside) {
	asides := slices.DeleteFunc(s.asides[key], func(other *aside) bool { return other == a })
	if len(asides) > 0 {
		s.asides[key] = asides
	} else {
		delete(s.asides, key)
	}
}

// begin is called before the first effect of a write is sent.
func (c *cache) begin(op *operation) {
	s := c.shard(op.key)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing[op.key] = true
	c.entries.Invalidate(op.key)
	s.outdate(op.key)
}

// end is called before a write returns.
func (b *Broker) end(op *operation) {
	s := b.cache.shard(op.key)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(op.key, op.aside)
	if op.held {
		delete(s.writing, op.key)
		b.cache.entries.Invalidate(op.key)
	}
	e := op.after
	switch {
	case e != nil && e == op.seen:
		// The vault is as it was found. What was asked for since then holds.
		for _, f := range s.flights[op.key] {
			f.full = true
			f.outdated = f.outdated || f.before(e.asOf)
		}
	case op.held || e != nil:
		s.outdate(op.key)
	}
	if e == nil || e.since.Before(op.aside.denied) {
		return
	}
	if len(e.older) > 0 && e.older[0].asOf.Before(op.aside.denied) {
		e.older = nil // what it replaced, as it was found
	}
	b.keep(s, e)
}

// outdate keeps those who come from now on from waiting for what was asked before, and
// what was found before from being kept.
func (s *shard) outdate(key secret.Key) {
	for _, f := range s.flights[key] {
		f.outdated = true
	}
	for _, a := range s.asides[key] {
		a.written = true
	}
}

// deny keeps what was found beside the flights before somebody asked who was told that
// there is nothing to be read.
func (s *shard) deny(key secret.Key, asked time.Time) {
	for _, a := range s.asides[key] {
		if a.denied.Before(asked) {
			a.denied = asked
		}
	}
}

// keep stores e unless something newer is kept, and tells those who watch or wait.
// The mutex of s is held.
func (b *Broker) keep(s *shard, e *entry) {
	if b.discards {
		return
	}
	if e.gone() {
		s.deny(e.Key, e.asOf)
	}
	old := b.cache.get(e.Key)
	if old != nil && old.asOf.After(e.asOf) {
		return
	}
	if old != nil && e.older == nil && old.Version == e.Version && (e.State == Active || e.State == Disabled) {
		e.older = old.older
		if o := e.find(e.previous); o != nil && !o.ExpireTime.Equal(e.graceEnd) {
			ended := *o // the current version's tags were changed
			ended.ExpireTime = e.graceEnd
			e = e.with(&ended)
		}
	}
	b.watches.publish(e)
	if e.partial {
		b.cache.entries.Invalidate(e.Key)
	} else {
		b.cache.entries.Set(e.Key, e)
	}
	for _, f := range s.flights[e.Key] {
		f.supersede()
		// Its answer is older, also when e is not kept any more by then.
		f.outdated = f.outdated || f.before(e.asOf)
	}
}

// drop forgets a secret of which the vault would not tell who asked at that time.
func (b *Broker) drop(key secret.Key, asked time.Time) {
	s := b.cache.shard(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	b.cache.forget(s, key, asked)
}

// forget is for what callers are told that is not kept: that there is nothing to be read,
// or that the vault would not tell. It leaves nothing of the secret from before they asked,
// nor lets what is under way bring it back. The mutex of s is held.
func (c *cache) forget(s *shard, key secret.Key, asked time.Time) {
	if kept := c.get(key); kept != nil && kept.since.Before(asked) {
		c.entries.Invalidate(key)
	}
	for _, f := range s.flights[key] {
		f.outdated = f.outdated || f.before(asked)
	}
	s.deny(key, asked)
}

// offer keeps what was found beside the flights, unless it is outdated by now.
func (b *Broker) offer(found *snapshot, a *aside) {
	e := b.entryOf(found)
	s := b.cache.shard(found.key)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.flights[found.key] {
		f.outdated = true
	}
	switch {
	case !s.writing[found.key] && !a.written && !e.asOf.Before(a.denied):
		b.keep(s, e)
	case e.gone():
		b.cache.forget(s, found.key, e.asOf)
	}
}

// hold is called before each effect of an operation, which counts from then on for
// everything that is read.
func (b *Broker) hold(op *operation) {
	if !op.held {
		op.held = true
		b.cache.begin(op)
	}
	op.after, op.sentAt = nil, b.now()
}
