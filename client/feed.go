package client

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/exto/secrets-broker/secret"
)

const (
	maxRefs = 256 // of one watch
	// refreshes bounds the reads under way for all Sources of a Client.
	refreshes = 16
	// joinDelay is how long a group gathers new keys before it opens its stream anew.
	joinDelay = 100 * time.Millisecond
	// reopenTime is how long changes may go unseen before followers are told so.
	reopenTime = time.Second
	// The pause before a watch is opened again, as with retries.
	firstRewatch   = time.Second
	longestRewatch = 30 * time.Second
)

// follower is told of the changes of one key. Its methods are called with feed.mu
// held: they wait for nothing and call no method of the feed.
type follower interface {
	// seen gets each change, and the reads that it wants done.
	seen(Change) (read func())
	// lost says that changes go unseen from now on, until the next seen.
	lost()
}

// feed shares watch streams and the work of refreshing among the Sources of a
// Client. Without a client it watches nothing.
type feed struct {
	ctx     context.Context
	client  *Client
	reads   errgroup.Group
	streams sync.WaitGroup

	mu     sync.Mutex
	closed bool
	groups []*group
}

// group is the keys of one stream. All of it is guarded by feed.mu.
type group struct {
	followers map[secret.Key][]follower
	end       context.CancelFunc // for good
	reopen    context.CancelFunc // of the stream now open
	open      bool               // it has told something
	joining   *time.Timer        // nil unless keys wait for it
}

func newFeed(ctx context.Context, c *Client) *feed {
	f := &feed{ctx: ctx, client: c}
	f.reads.SetLimit(refreshes)
	return f
}

// wait blocks until all is ended; ctx must be.
func (f *feed) wait() {
	f.streams.Wait()
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	_ = f.reads.Wait()
}

// try does read in the background, unless there is enough to do already.
func (f *feed) try(read func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return !f.closed && f.reads.TryGo(func() error { read(); return nil })
}

func (f *feed) add(key secret.Key, of follower) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.client == nil || f.closed || f.ctx.Err() != nil {
		return
	}
	for _, g := range f.groups {
		if _, known := g.followers[key]; known || len(g.followers) < maxRefs {
			g.followers[key] = append(g.followers[key], of)
			// Also for a known key: its first message is the new follower's too.
			if g.joining == nil {
				g.joining = time.AfterFunc(joinDelay, func() {
					f.mu.Lock()
					defer f.mu.Unlock()
					g.joining = nil
					g.reopen()
				})
			}
			return
		}
	}
	g := &group{followers: map[secret.Key][]follower{key: {of}}}
	ctx, end := context.WithCancel(f.ctx)
	g.end, g.reopen = end, func() {}
	f.groups = append(f.groups, g)
	f.streams.Go(func() { f.run(ctx, g) })
}

func (f *feed) remove(key secret.Key, of follower) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, g := range f.groups {
		at := slices.Index(g.followers[key], of)
		if at < 0 {
			continue
		}
		// The stream keeps the key until it is opened anew.
		if g.followers[key] = slices.Delete(g.followers[key], at, at+1); len(g.followers[key]) == 0 {
			delete(g.followers, key)
		}
		if len(g.followers) == 0 {
			g.end()
			if g.joining != nil {
				g.joining.Stop()
			}
			f.groups = slices.Delete(f.groups, i, i+1)
		}
		return
	}
}

// run keeps a stream for g open.
func (f *feed) run(ctx context.Context, g *group) {
	bound := firstRewatch
	for ctx.Err() == nil {
		streamCtx, cancel := context.WithCancel(ctx)
		f.mu.Lock()
		keys := slices.Collect(maps.Keys(g.followers))
		g.reopen, g.open = cancel, false
		f.mu.Unlock()
		// Where one stream follows another, nobody is told of the moment between the
		// two, unless it grows long.
		late := time.AfterFunc(reopenTime, func() { f.lose(g) })
		_, err := f.client.watch(streamCtx, keys, func(change Change) bool {
			bound = firstRewatch
			f.tell(g, change)
			return true
		})
		late.Stop()
		if streamCtx.Err() == nil && !errors.Is(err, errMoved) {
			f.mu.Lock()
			g.open = false
			f.mu.Unlock()
			f.lose(g)
			pause(ctx, rand.N(bound))
			bound = min(2*bound, longestRewatch)
		}
		cancel()
	}
}

func (f *feed) tell(g *group, change Change) {
	var reads []func()
	f.mu.Lock()
	g.open = true
	for _, one := range g.followers[change.Key] {
		if read := one.seen(change); read != nil {
			reads = append(reads, read)
		}
	}
	f.mu.Unlock()
	for _, read := range reads {
		// Blocks while there is enough to do. The broker joins what comes meanwhile.
		f.reads.Go(func() error { read(); return nil })
	}
}

// lose tells the followers that nothing is seen, unless something is by now.
func (f *feed) lose(g *group) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if g.open {
		return
	}
	for _, followers := range g.followers {
		for _, one := range followers {
			one.lost()
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
