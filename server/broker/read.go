package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

const (
	// DefaultCacheTTL and DefaultStaleOnError are the broker's own bounds.
	DefaultCacheTTL     = 30 * time.Second
	DefaultStaleOnError = 15 * time.Minute
	// NoStaleOnError, as Config.StaleOnError, lets no outage widen a bound.
	NoStaleOnError time.Duration = -1
	// absentFor is how long it is believed that there is no such secret or version.
	absentFor = 5 * time.Second
	// renewal is how long the vault may take for an answer that nobody waits for: a
	// value that is used in the last quarter of its time is renewed ahead.
	renewal = 30 * time.Second
	// patience is how long a read waits for the vault when it could be answered from
	// memory, and outagePatience while the vault could not be reached in the last
	// outageFor.
	patience       = 2 * time.Second
	outagePatience = 300 * time.Millisecond
	outageFor      = 10 * time.Second
)

// Source says where an answer came from.
type Source int

// The sources, numbered as in the contract.
const (
	Live Source = iota + 1
	Cached
	StaleOnError
)

// GetRequest asks for a value.
type GetRequest struct {
	Key secret.Key
	// Version is the wanted version; empty: the current one.
	Version string
	// MaxStaleness is how old the answer may be; nil: the broker's own bound, which
	// an outage of the vault widens.
	MaxStaleness *time.Duration
	// MinGeneration is the lowest generation that will do, but that 0 in the vault
	// always does.
	MinGeneration int64
	// KnownVersion, when it is the current version, is answered without value.
	KnownVersion string
}

// GetResult is a value, or that it is not modified.
type GetResult struct {
	Metadata
	Value       secret.Value
	NotModified bool
	// AsOf is when the vault was asked.
	AsOf   time.Time
	Source Source
}

// Get reads a value, from memory where that is young enough.
func (b *Broker) Get(ctx context.Context, call Call, req GetRequest) (GetResult, error) {
	n := need{key: req.Key, version: req.Version, max: b.ttl, own: true, least: req.MinGeneration, depth: live, priority: vault.Reading, call: call}
	if req.MaxStaleness != nil {
		n.max, n.own = *req.MaxStaleness, false
	}
	a, err := b.read(ctx, n)
	if err != nil {
		return GetResult{}, vaultError(ctx, req.Key, err)
	}
	result := GetResult{Source: a.source}
	if err := b.serve(a, &result); err != nil {
		return GetResult{}, err
	}
	if req.KnownVersion != "" && req.KnownVersion == result.Version && a.older == nil {
		result.Value, result.NotModified = secret.Value{}, true
	}
	return result, nil
}

// answer is what a read found: the secret, and the wanted version where that is not
// the current one.
type answer struct {
	entry  *entry
	older  *older
	source Source
}

// serve judges whether what was found may be read now.
func (b *Broker) serve(a answer, r *GetResult) error {
	e := a.entry
	switch {
	case e.State == Absent, e.State == Deleted:
		return errNotFound(e.Key)
	case a.older == nil && e.State == Disabled:
		return errReadDisabled(e.Key)
	case a.older == nil:
		r.Metadata, r.Value, r.AsOf = e.Metadata, e.value, e.asOf
		return nil
	}
	o := a.older
	switch {
	case o.refusal != nil:
		return o.refusal
	case o.over(b.now()):
		return errExpired(e.Key)
	}
	r.Metadata, r.Value, r.AsOf = o.Metadata, o.value, o.asOf
	return nil
}

// over reports whether its grace is.
func (o *older) over(now time.Time) bool {
	return !o.ExpireTime.IsZero() && !now.Before(o.ExpireTime)
}

// read finds a secret, in memory or in the vault.
func (b *Broker) read(ctx context.Context, n need) (answer, error) {
	n.began = b.now()
	e := b.cache.get(n.key)
	if o, ok := n.met(e, n.max, n.began); ok {
		if n.own && age(n.began, e.asOf) >= b.ttl*3/4 && e.renewed.CompareAndSwap(false, true) {
			b.renew(n)
		}
		return answer{e, o, Cached}, nil
	}
	return b.ask(ctx, n)
}

// met reports whether what is kept of a secret is an answer that is no older than
// bound.
func (n *need) met(e *entry, bound time.Duration, now time.Time) (*older, bool) {
	if e == nil {
		return nil, false
	}
	var o *older
	asOf := e.asOf
	switch {
	case e.State == Absent, e.State == Deleted:
		if n.least > 0 || n.depth == whole && e.unsure {
			return nil, false
		}
		bound = min(bound, absentFor)
	case n.version != "" && n.version != e.Version:
		if o = e.find(n.version); o == nil {
			return nil, false
		}
		if asOf = o.asOf; o.refusal != nil {
			bound = min(bound, absentFor)
		}
	case e.Generation < n.least:
		return nil, false
	}
	return o, asOf.After(n.began) || bound > 0 && age(now, asOf) <= bound
}

// renew asks for a newer answer in the background.
func (b *Broker) renew(n need) {
	n.priority, n.max = vault.Rest, absentFor
	b.board(time.Now().Add(renewal), &n) // nobody leaves it: it ends by itself
}

// ask waits for the vault's answer, and falls back on memory where that is allowed.
func (b *Broker) ask(ctx context.Context, n need) (answer, error) {
	deadline, _ := ctx.Deadline()
	if n.priority == vault.Verifying {
		n.priority = b.urgency(n.key)
		if n.priority != vault.VerifyingKnown {
			b.strangers.Add(1)
			defer b.strangers.Add(-1)
		}
		if n.patient || n.priority == vault.Rest || n.call.Crowded {
			if !b.dubious.take(n.call.Caller) {
				return b.withoutPlace(n)
			}
			defer b.dubious.give(n.call.Caller)
		}
	}
	var last *flight
	for {
		f := b.board(deadline, &n)
		if f.kept != nil {
			return *f.kept, nil
		}
		if f.flight == nil {
			e := b.cache.get(n.key)
			if o, ok := b.fallback(&n, e, b.now()); ok {
				return answer{e, o, StaleOnError}, nil
			}
			return answer{}, errNotAsked
		}
		n.mayAsk = nil // or somebody did
		err := b.await(ctx, &n, f.flight, f.flight != last)
		last = f.flight
		now := b.now()
		e := b.cache.get(n.key)
		switch {
		case err == nil && !f.after && (n.unmet(f.entry) || n.least > 0 && f.entry.gone()):
			n.max = 0 // it was asked for before this read began
			continue
		case err == nil && n.unmet(f.entry):
			return answer{}, refuse(n.key, secret.StalenessUnsatisfiable, "the vault holds generation %d, which is below min_generation %d", f.entry.Generation, n.least)
		case err == nil:
			return answer{f.entry, f.older, Live}, nil
		case errors.Is(err, errElsewhere):
			continue
		case errors.Is(err, errSlow), errors.Is(err, errNoTurn), errors.Is(err, errTooLate): // for this read
		case f.hurried(err, deadline):
			continue // with more time
		case b.stopped.Err() != nil:
			return answer{}, refuse(n.key, secret.ShuttingDown, "this broker is shutting down; try again, at another one if there is one")
		case !unreachable(err):
			return answer{}, err
		}
		if o, ok := b.fallback(&n, e, now); ok {
			b.tellStale(err)
			return answer{e, o, StaleOnError}, nil
		}
		if !n.own || e != nil && e.State == Active && e.Generation < n.least {
			told := vaultError(ctx, n.key, err)
			refusal := refuse(n.key, secret.StalenessUnsatisfiable, "the vault cannot be reached, and the broker remembers nothing that is as young as this call allows; try again, or allow more")
			refusal.cause, refusal.RetryAfter = err, told.RetryAfter
			return answer{}, refusal
		}
		return answer{}, err
	}
}

// withoutPlace answers a look-up that may not wait for the vault: from memory, which is
// renewed meanwhile, or not at all.
func (b *Broker) withoutPlace(n need) (answer, error) {
	e := b.cache.get(n.key)
	o, ok := b.fallback(&n, e, b.now())
	if !ok || n.patient { // who looks again has memory's answer
		return answer{}, errNoPlace
	}
	b.renew(n)
	return answer{e, o, StaleOnError}, nil
}

// failing reports that the vault could not be reached for it a moment ago.
func (e *entry) failing(now time.Time) bool {
	failed := e.failed.Load()
	return failed != 0 && now.Sub(time.Unix(0, failed)) < outageFor
}

// fallback is what memory may answer while the vault cannot be reached: a value.
func (b *Broker) fallback(n *need, e *entry, now time.Time) (*older, bool) {
	if !n.own {
		return nil, false
	}
	o, ok := n.met(e, b.stale, now)
	return o, ok && (o == nil && e.State == Active || o != nil && o.refusal == nil)
}

// unmet reports that e is of a generation that will not do. One that was written
// outside always does.
func (n *need) unmet(e *entry) bool {
	return (e.State == Active || e.State == Disabled) && e.Generation > 0 && e.Generation < n.least
}

var (
	errNotAsked = errors.New("broker: the vault was asked a moment ago")
	// errElsewhere: another flight brought an answer, or this one is another caller's
	// and waits for its turn.
	errElsewhere = errors.New("broker: to be asked for elsewhere")
	errSlow      = fmt.Errorf("%w: it does not answer", vault.ErrUnavailable)
	errNoTurn    = fmt.Errorf("%w: the turn did not come in time", vault.ErrThrottled)
	errNoPlace   = fmt.Errorf("%w: too many wait for it", vault.ErrThrottled)
	// errTooLate: the caller has no more time.
	errTooLate = fmt.Errorf("broker: no answer in time: %w", context.DeadlineExceeded)
)

// hurry is how much sooner a flight's deadline must be than that of a read for which
// the vault is asked once more when it has passed.
const hurry = 200 * time.Millisecond

// hurried reports that a flight ended for the deadline of the caller that began it,
// which is before the given one.
func (f *flight) hurried(err error, deadline time.Time) bool {
	if time.Until(f.deadline) > hurry || !deadline.IsZero() && deadline.Sub(f.deadline) < hurry {
		return false
	}
	var told *Error
	return unreachable(err) || errors.As(err, &told) && told.Reason == secret.StalenessUnsatisfiable
}

// await waits for f as long as this read may: up to its deadline, and less while
// memory could answer it. It looks elsewhere when that is said and may be better.
func (b *Broker) await(ctx context.Context, n *need, f *flight, elsewhere bool) error {
	limit := untilOf(ctx)
	now, impatient := b.now(), false
	e := b.cache.get(n.key)
	if _, ok := b.fallback(n, e, now); ok {
		wait := patience
		if e.failing(now) {
			wait = outagePatience
		}
		if wait = max(0, wait-age(now, f.began)); wait < limit {
			limit, impatient = wait, true
		}
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	waits, newer := f.waits, f.newer
	if !elsewhere {
		waits, newer = nil, nil
	} else if f.caller == n.call.Caller && f.priority >= n.priority {
		waits = nil
	}
	for {
		err := errElsewhere
		select {
		case <-f.done:
			return f.err
		case <-newer:
			if _, ok := n.met(b.cache.get(n.key), n.max, b.now()); !ok {
				newer = nil // it does not help
				continue
			}
		case <-waits:
		case <-ctx.Done():
			err = ctx.Err()
		case <-timer.C:
			err = b.tooLate(f)
			noTurn := errors.Is(err, errNoTurn)
			now = b.now()
			e := b.cache.get(n.key)
			_, ok := b.fallback(n, e, now)
			switch {
			case impatient && (!ok || n.patient && (noTurn || !e.failing(now))):
				impatient = false
				timer.Reset(untilOf(ctx))
				continue
			case ok && !noTurn:
				// It is not left, and goes on: whoever comes next is to find the answer.
				if impatient {
					e.failed.Store(now.UnixNano())
					err = errSlow
				}
				return err
			}
		}
		b.leave(f)
		return err
	}
}

// untilOf is how long a call with ctx may wait.
func untilOf(ctx context.Context) time.Duration {
	if until, ok := vault.Until(ctx); ok {
		return time.Until(until)
	}
	return math.MaxInt64
}

// tooLate says what f waited for in vain.
func (b *Broker) tooLate(f *flight) error {
	s := b.cache.shard(f.key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.queued {
		return errNoTurn
	}
	return errTooLate
}

// tellStale logs now and then that answers are old.
func (b *Broker) tellStale(why error) {
	now := b.now()
	last := b.staleTold.Load()
	if now.Sub(time.Unix(0, last)) >= time.Minute && b.staleTold.CompareAndSwap(last, now.UnixNano()) {
		b.log.Warn("the vault cannot be reached: reads are answered from memory", "at_most_old", b.stale, "error", why)
	}
}

// valueOf judges whether a version may be read, and reads it.
func (b *Broker) valueOf(ctx context.Context, s *snapshot, id string) (version, secret.Value, error) {
	if s.state == Absent || s.state == Deleted {
		return version{}, secret.Value{}, errNotFound(s.key)
	}
	if id == s.current.Version {
		if s.state == Disabled {
			return version{}, secret.Value{}, errReadDisabled(s.key)
		}
		return s.current, s.value, nil
	}
	v, ok, err := b.find(ctx, s, id)
	switch {
	case err != nil:
		return version{}, secret.Value{}, err
	case !ok:
		// A list in pages is cut short when the name is deleted between two of them.
		if _, _, err := b.vault.Get(ctx, s.key, id); err == nil || errors.Is(err, vault.ErrDisabled) {
			return version{}, secret.Value{}, errUnlike
		} else if !errors.Is(err, vault.ErrNotFound) {
			return version{}, secret.Value{}, err
		}
		// And it is found nowhere while the name is being deleted.
		now, _, err := b.vault.Get(ctx, s.key, "")
		if same := err == nil && now.Version == s.current.Version; !same && !(s.state == Disabled && errors.Is(err, vault.ErrDisabled)) {
			return version{}, secret.Value{}, cmp.Or(err, errUnlike)
		}
		return version{}, secret.Value{}, refuse(s.key, secret.VersionNotFound, "the secret has no such version; DescribeSecret lists those it has")
	case !s.listed.Served(v):
		return version{}, secret.Value{}, refuse(s.key, secret.VersionExpired, "this version is from before the secret was deleted and overwritten; read the current one")
	}
	if end := s.listed.Expiry(v, s.asOf); !end.IsZero() && !b.now().Before(end) {
		return version{}, secret.Value{}, errExpired(s.key)
	}
	if !v.Enabled {
		return version{}, secret.Value{}, refuse(s.key, secret.SecretDisabled, "this version is disabled in the vault; read the current one")
	}
	props, value, err := b.vault.Get(ctx, s.key, id)
	if err != nil {
		return version{}, secret.Value{}, err
	}
	return versions.New(props), value, nil
}

func errNotFound(key secret.Key) error {
	return refuse(key, secret.SecretNotFound, "there is no such secret, or it is deleted")
}

func errReadDisabled(key secret.Key) error {
	return refuse(key, secret.SecretDisabled, "somebody disabled this secret in the vault; have it enabled there")
}

func errExpired(key secret.Key) error {
	return refuse(key, secret.VersionExpired, "this version was replaced by a rotation and its grace is over; read the current one")
}
