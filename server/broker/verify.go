package broker

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"hash"
	"sync"
	"time"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

const (
	// secondLook is how old an answer must be to be asked for once more for a token
	// that does not match, and how often at most.
	secondLook = 2 * time.Second
	// vain is how many look-ups a second, and at once, may be for tokens that match
	// nothing before those of unknown instances wait behind everybody else: anyone on
	// the internet can cause them.
	vain      = 20
	vainBurst = 200
	// strangeFor is how long after the start nobody is suspected whom the process does not
	// know: it knows none. Later, more than vainBurst at once are made up, most likely.
	strangeFor = 5 * time.Minute
	// mostDubious is how many look-ups of one caller wait for the vault at once, of those
	// for tokens that may well match nothing: for the others there must be room on the
	// connection, which bears 2,048 calls.
	mostDubious = 512
)

// VerifyResult says whether a token is an instance's.
type VerifyResult int

// The results, numbered as in the contract.
const (
	MatchCurrent VerifyResult = iota + 1
	MatchPrevious
	NoMatch
)

// Verification is a judgement on a token.
type Verification struct {
	Result VerifyResult
	// Generation is that of the version that matches.
	Generation int64
	// ExpireTime is when the matching version stops being honoured; zero unless it is
	// the previous one.
	ExpireTime time.Time
}

// Verify says whether token is the registration token that key names: the current
// one or, in its grace, the one before.
func (b *Broker) Verify(ctx context.Context, call Call, key secret.Key, token secret.Value) (Verification, error) {
	if secret.CheckValue(secret.RegistrationToken, token) != nil {
		return Verification{Result: NoMatch}, nil // no token at all, or one with a typo
	}
	presented := b.digests.of(key, token)
	n := need{key: key, max: b.ttl, own: true, depth: live, priority: vault.Verifying, call: call}
	v, a, err := b.match(ctx, n, presented)
	for range 2 { // the first look may be one that was under way, and old when it ends
		now := b.now()
		// What is stale may have been asked for just now, in vain.
		if err != nil || v.Result != NoMatch || a.source == StaleOnError && a.entry.failing(now) || age(now, a.entry.asOf) <= secondLook {
			break
		}
		if v, a, err = b.lookAgain(ctx, n, a, presented); a.source != Live {
			break
		}
	}
	if err != nil {
		return Verification{}, vaultError(ctx, key, err)
	}
	if v.Result == NoMatch && a.source == Live {
		b.vain.AllowN(b.now(), 1)
	}
	return v, nil
}

// places are those of look-ups that wait, by caller.
type places struct {
	mu    sync.Mutex
	taken map[string]int
}

// take reports whether there is one; it is given back.
func (p *places) take(caller string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken[caller] >= mostDubious {
		return false
	}
	p.taken[caller]++
	return true
}

func (p *places) give(caller string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken[caller]--; p.taken[caller] == 0 {
		delete(p.taken, caller)
	}
}

// urgency is the priority of a look-up of key. That of an instance which the broker has
// seen goes first; any other may be made up, and is likely to be after many such.
// It is asked for where the vault is, so that from memory an instance that is unknown
// costs no more time than one that is known.
func (b *Broker) urgency(key secret.Key) vault.Priority {
	if e := b.cache.get(key); e != nil && e.State != Absent {
		return vault.VerifyingKnown
	}
	if !b.stranger(key) {
		return vault.VerifyingKnown
	}
	now := b.now()
	if b.vain.TokensAt(now) < 1 || b.strangers.Load() > vainBurst && age(now, b.begun) > strangeFor {
		return vault.Rest
	}
	return vault.Verifying
}

// match compares a token with its secret's current version and with the one in
// grace. How long it takes says nothing of the token but whether it matches.
func (b *Broker) match(ctx context.Context, n need, presented digest) (Verification, answer, error) {
	for {
		a, err := b.read(ctx, n)
		if err != nil {
			return Verification{}, a, err
		}
		e := a.entry
		graced := e.State == Active && e.previous != "" && e.previous != e.Version && b.now().Before(e.graceEnd)
		switch {
		case e.digest.equal(presented) && e.State == Active:
			return Verification{Result: MatchCurrent, Generation: e.Generation}, a, nil
		case !graced:
			return Verification{Result: NoMatch}, a, nil
		}
		before := n
		before.version, before.max = e.previous, b.ttl
		before.mayAsk = func(now time.Time) bool { return now.Sub(time.Unix(0, e.beforeFailed.Load())) >= secondLook }
		old, err := b.read(ctx, before)
		switch {
		case errors.Is(err, errNotAsked):
			err = errSlow // a moment ago, and memory does not have it
		case unreachable(err) && !errors.Is(err, errTooLate) && !errors.Is(err, errNoTurn) && !errors.Is(err, errNoPlace): // which say nothing of the vault
			e.beforeFailed.Store(b.now().UnixNano())
		}
		if err != nil {
			return Verification{}, a, err
		}
		if o := old.older; o != nil {
			if o.digest.equal(presented) && o.refusal == nil && !o.over(b.now()) {
				return Verification{Result: MatchPrevious, Generation: o.Generation, ExpireTime: o.ExpireTime}, a, nil
			}
			return Verification{Result: NoMatch}, a, nil
		}
		if ctx.Err() != nil { // it was changed in between, time and again
			return Verification{}, a, ctx.Err()
		}
	}
}

// lookAgain asks the vault once more before a token is refused by what is
// remembered: it may have been changed there by others.
func (b *Broker) lookAgain(ctx context.Context, n need, remembered answer, presented digest) (Verification, answer, error) {
	n.max, n.patient = secondLook, true
	looked := &remembered.entry.looked
	n.mayAsk = func(now time.Time) bool { // and nobody else for a while
		last := looked.Load()
		return now.Sub(time.Unix(0, last)) >= secondLook && looked.CompareAndSwap(last, now.UnixNano())
	}
	v, a, err := b.match(ctx, n, presented)
	if errors.Is(err, errNotAsked) || unreachable(err) {
		return Verification{Result: NoMatch}, remembered, nil
	}
	return v, a, err
}

// digest stands for a token in comparisons: of its bytes nothing can be told from how
// long they take. That of no token is all zero and equals no other.
type digest [sha256.Size]byte

func (d digest) equal(other digest) bool { return subtle.ConstantTimeCompare(d[:], other[:]) == 1 }

// digests makes digests with a key that this process alone has.
type digests struct{ pool *sync.Pool }

func newDigests() digests {
	key := make([]byte, sha256.Size)
	_, _ = rand.Read(key) // never fails: crypto/rand ends the process instead
	return digests{&sync.Pool{New: func() any { return hmac.New(sha256.New, key) }}}
}

// of is the digest of a value of key, if that is a token.
func (d digests) of(key secret.Key, value secret.Value) (sum digest) {
	if key.Kind() != secret.RegistrationToken || value.IsEmpty() {
		return sum
	}
	mac := d.pool.Get().(hash.Hash)
	defer d.pool.Put(mac)
	mac.Reset()
	_, _ = mac.Write([]byte(value.Reveal()))
	mac.Sum(sum[:0])
	return sum
}
