package client

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc/codes"

	"github.com/exto/secrets-broker/secret"
)

// Getter is what a Source reads from: a Client, which also tells it of changes,
// or something else that gives the same answers.
type Getter interface {
	Get(context.Context, secret.Key, GetOptions) (GetResult, error)
}

var _ Getter = (*Client)(nil)

// askInterval is how often Unauthorized reads, at most, and how old what it reads
// may be.
const (
	askInterval  = 3 * time.Second
	askStaleness = time.Second
)

// SourceOptions say how a Source begins and goes on. The zero value is good for
// most.
type SourceOptions struct {
	// MaxWait bounds how long NewSource waits for the first value. 0: 30 s.
	MaxWait time.Duration
	// AllowMissing begins without a value when there is no such secret, instead of
	// ErrNotFound.
	AllowMissing bool
	// Interval is about how often the secret is read when nothing tells of its
	// changes. 0: 30 s.
	Interval time.Duration
}

// Held is what a Source holds.
type Held struct {
	// Value is the secret, the last that was readable. Empty if none ever was.
	Value secret.Value
	// Metadata is that of the version that Value is.
	Metadata
	// AsOf is when Value was known to be the current one: now, while the broker
	// tells of changes and none is left to read. A connection that died silently is
	// noticed within 25 s.
	AsOf time.Time
	// Err is why Value is not known to be the current one: ErrNotFound when the
	// secret was deleted, ErrDisabled, or why the last read failed. Nil when all is
	// well.
	Err error
}

// Source holds one secret in memory and keeps it current until its context ends.
// It keeps the last value through an outage. All methods are safe for concurrent
// use.
type Source struct {
	from     Getter
	key      secret.Key
	interval time.Duration
	feed     *feed
	ctx      context.Context
	asking   singleflight.Group
	apart    atomic.Bool // from the watches, while it may not be read

	mu      sync.Mutex
	held    Held
	changed chan struct{}
	timer   *time.Timer // the next read without a watch
	watched bool        // the watch has shown it and was not lost since
	asked   time.Time   // the last read of Unauthorized

	// Reads are numbered as they begin, so that an answer never takes the place of
	// one to a later question.
	started, answered int
	// behind is the last read that was begun when a change was seen: that one and
	// those before may have missed it.
	behind int
}

// NewSource reads the secret and holds it from then on until ctx ends, or the
// Client is closed. It blocks until the first value is there, o.MaxWait is over
// or the secret can't be read. All Sources of one Client share its connection and
// a few watches.
//
// Errors: those of Get.
func NewSource(ctx context.Context, from Getter, key secret.Key, o SourceOptions) (*Source, error) {
	s := &Source{from: from, key: key, interval: o.Interval, changed: make(chan struct{})}
	if s.interval <= 0 {
		s.interval = 30 * time.Second
	}
	if o.MaxWait <= 0 {
		o.MaxWait = readTimeout
	}
	if c, ok := from.(*Client); ok {
		s.feed = c.feed
	} else {
		s.feed = newFeed(ctx, nil)
	}
	var cancel context.CancelFunc
	s.ctx, cancel = context.WithCancel(ctx)
	firstCtx, done := context.WithTimeout(s.ctx, o.MaxWait)
	defer done()
	if err := s.first(firstCtx); err != nil && !(o.AllowMissing && errors.Is(err, ErrNotFound)) {
		cancel()
		return nil, err
	}
	s.mu.Lock()
	s.timer = time.AfterFunc(s.jittered(), s.poll)
	s.mu.Unlock()
	stop := context.AfterFunc(s.feed.ctx, cancel)
	context.AfterFunc(s.ctx, func() {
		stop()
		s.feed.remove(key, s)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.timer.Stop()
		s.lose()
	})
	s.feed.add(key, s)
	if s.ctx.Err() != nil { // the other way round, it could be left there
		s.feed.remove(key, s)
	}
	return s, nil
}

// first reads until there is an answer, for as long as what there is to wait for may
// come by itself. A Client does so of its own.
func (s *Source) first(ctx context.Context) error {
	for attempt := 0; ; attempt++ {
		err := s.read(ctx, GetOptions{})
		var e *Error
		if !errors.As(err, &e) || e.Code != codes.Unavailable || e.Reason == secret.VaultRefused {
			return err
		}
		wait := e.RetryAfter + rand.N(min(firstPause<<min(attempt, 10), longestPause))
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= wait {
			return err
		}
		pause(ctx, wait)
	}
}

// Value gives what is held. It never blocks.
func (s *Source) Value() Held {
	s.mu.Lock()
	defer s.mu.Unlock()
	held := s.held
	if s.live() {
		held.AsOf = time.Now()
	}
	return held
}

// Changed gives a channel that is closed when what is held changes: when there is
// another version, or the secret goes or comes back. Ask for it before Value, so
// that no change falls between the two.
func (s *Source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Unauthorized is for when somebody refuses the value of this version, as with a
// 401. It reads the secret again and returns what is held then; with the same
// Version there is no newer value. Calls share one read, and there is at most one
// in 3 s: within that, and when a newer value is held already, it returns at once.
func (s *Source) Unauthorized(ctx context.Context, version string) (Held, error) {
	if held := s.Value(); held.Version != version {
		return held, nil
	}
	answer := s.asking.DoChan("", func() (any, error) {
		s.mu.Lock()
		wanted := s.held.Version == version && time.Since(s.asked) >= askInterval
		if wanted {
			s.asked = time.Now()
		}
		s.mu.Unlock()
		if !wanted {
			return nil, nil
		}
		readCtx, cancel := context.WithTimeout(s.ctx, readTimeout)
		defer cancel()
		return nil, s.read(readCtx, GetOptions{MaxStaleness: new(askStaleness)})
	})
	select {
	case result := <-answer:
		return s.Value(), result.Err
	case <-ctx.Done():
		return s.Value(), newError(contextStatus(ctx), "")
	}
}

// read asks once and holds the answer.
func (s *Source) read(ctx context.Context, o GetOptions) error {
	s.mu.Lock()
	s.started++
	number := s.started
	o.KnownVersion = s.held.Version
	s.mu.Unlock()
	start := time.Now()
	got, err := s.from.Get(ctx, s.key, o)

	s.mu.Lock()
	defer s.mu.Unlock()
	if number < s.answered {
		return err
	}
	gone := errors.Is(err, ErrNotFound) || errors.Is(err, ErrDisabled)
	if err == nil || gone {
		s.answered = number
	}
	wasGone := errors.Is(s.held.Err, ErrNotFound) || errors.Is(s.held.Err, ErrDisabled)
	if err != nil {
		if gone || !wasGone { // an outage doesn't bring it back
			s.held.Err = err
		}
		if gone && !wasGone {
			s.tell()
		}
		return err
	}
	s.held.Err = nil
	s.held.AsOf = start
	if !got.AsOf.IsZero() {
		s.held.AsOf = got.AsOf
	}
	other := got.Version != s.held.Version
	if other {
		s.held.Value, s.held.Metadata = got.Value, got.Metadata
	}
	if other || wasGone {
		s.tell()
	}
	return nil
}

// refresh reads in the background and sees to the next time.
func (s *Source) refresh(o GetOptions) {
	ctx, cancel := context.WithTimeout(s.ctx, readTimeout)
	defer cancel()
	err := s.read(ctx, o)
	switch notAllowed := errors.Is(err, ErrNotAllowed); {
	case notAllowed && !s.apart.Swap(true):
		s.feed.remove(s.key, s) // one such key ends the watch of all that share it
	case !notAllowed && s.apart.Swap(false):
		s.feed.add(s.key, s)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.watched || s.answered <= s.behind {
		s.arm()
	}
}

func (s *Source) poll() {
	if !s.feed.try(func() { s.refresh(GetOptions{}) }) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.arm()
	}
}

func (s *Source) seen(change Change) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watched = true
	if s.held.Err == nil && change.Version == s.held.Version && change.State == Active ||
		errors.Is(s.held.Err, ErrNotFound) && (change.Type == ChangeMissing || change.State == Deleted) ||
		errors.Is(s.held.Err, ErrDisabled) && change.State == Disabled {
		s.timer.Stop()
		return nil
	}
	s.behind = s.started
	s.arm() // should the read fail
	o := GetOptions{MinGeneration: change.Generation}
	if o.MinGeneration == 0 { // any would meet it
		o.MaxStaleness = new(askStaleness)
	}
	return func() { s.refresh(o) }
}

func (s *Source) lost() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lose()
	s.arm()
}

// The rest needs s.mu.

// live reports whether what is held is the current value, as far as the broker
// knows.
func (s *Source) live() bool { return s.watched && s.held.Err == nil && s.answered > s.behind }

func (s *Source) lose() {
	if s.live() {
		s.held.AsOf = time.Now()
	}
	s.watched = false
}

func (s *Source) arm() {
	if s.ctx.Err() == nil {
		s.timer.Reset(s.jittered())
	}
}

// jittered is the interval, give or take half of it: all Sources lose their watch
// at one moment.
func (s *Source) jittered() time.Duration { return s.interval/2 + rand.N(s.interval) }

func (s *Source) tell() {
	close(s.changed)
	s.changed = make(chan struct{})
}
