package broker

import (
	"cmp"
	"context"
	"hash/maphash"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// Change says how a secret came to its state.
type Change int

// The changes, numbered as in the contract.
const (
	Current Change = iota + 1
	Missing
	PutChange
	Rotated
	DeletedChange
	Recovered
	ChangedOutside
)

// Event is the newest state of a watched secret. Of a missing one Metadata has the
// key alone.
type Event struct {
	Change Change
	Metadata
}

// Watch sends the present state of each secret, and then each newer one, until ctx or
// the broker ends or send fails. What came while send was busy is joined: the newest
// state of each secret is kept, and no queue. keys are distinct.
func (b *Broker) Watch(ctx context.Context, call Call, keys []secret.Key, send func(Event) error) error {
	w := &watcher{call: call, pending: map[secret.Key]Event{}, ready: make(chan struct{}, 1)}
	for _, key := range keys {
		b.watch(key, w)
	}
	defer b.watches.remove(keys, w)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begun := make(chan error, 1)
	go func() { begun <- b.beginWatch(ctx, keys, w) }()
	for {
		for event, ok := w.next(); ok && ctx.Err() == nil; event, ok = w.next() {
			if err := send(event); err != nil {
				return err
			}
		}
		select {
		case <-w.ready:
		case err := <-begun:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return contextError(ctx, secret.Key{})
		case <-b.stopped.Done():
			return refuse(secret.Key{}, secret.ShuttingDown, "this broker is shutting down; watch again, at another one if there is one")
		}
	}
}

const (
	// atOnce is how many secrets are looked at together for a watch that begins, and
	// pollsAtOnce for all watches, to find changes made outside: enough for the budget
	// where the vault takes a fifth of a second.
	atOnce      = 16
	pollsAtOnce = 64
	// A watched secret is looked at again after two thirds of the bound, so that what
	// others changed is seen within it, and after a sixth when that failed. The shares
	// are of the bound; how often somebody looks which are due is between the two
	// ticks.
	pollShare, retryShare, tickShare = 2.0 / 3, 1.0 / 6, 1.0 / 100
	leastTick, mostTick              = 10 * time.Millisecond, time.Second
)

// beginWatch looks at each secret once.
func (b *Broker) beginWatch(ctx context.Context, keys []secret.Key, w *watcher) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for _, key := range keys {
		group.Go(func() error {
			e, err := b.firstLook(ctx, key, w)
			if err != nil {
				return vaultError(ctx, key, err)
			}
			b.watches.begin(w, e)
			return nil
		})
	}
	return group.Wait()
}

// firstLook looks at a secret for a watch that begins. A vault that takes long, or a
// turn in the budget that does not come, is no reason to end the watch.
func (b *Broker) firstLook(ctx context.Context, key secret.Key, w *watcher) (*entry, error) {
	for {
		try, end := context.WithTimeout(ctx, b.firstTry)
		a, err := b.read(try, need{key: key, max: b.ttl, own: true, depth: whole, priority: vault.Rest, call: w.call})
		// A flight that it shared may have ended a little before.
		until, _ := try.Deadline()
		late := unreachable(err) && time.Until(until) < 2*hurry || try.Err() != nil
		end()
		if err == nil || !late || ctx.Err() != nil {
			return a.entry, err
		}
	}
}

// watches is who watches which secrets.
type watches struct {
	mu      sync.RWMutex
	keys    map[secret.Key]*watched
	polling bool
}

// watched is a secret that somebody watches.
type watched struct {
	watchers map[*watcher]bool // and whether it was told of this secret yet
	last     standing          // zero: nothing is known yet
	asked    time.Time         // when the vault was last asked because of this
	asking   bool              // and has not answered yet
	due      bool              // to be asked at once
}

// standing is how a secret stands.
type standing struct {
	Metadata
	asOf time.Time
	op   uint64
}

// next is what follows on s. An operation is remembered while the name is absent or
// somebody else's, so that it is not taken for a new one after that.
func (s standing) next(e *entry) standing {
	return standing{e.Metadata, e.asOf, cmp.Or(e.op, s.op)}
}

// changed says how e differs from s; 0: it does not.
func (s standing) changed(e *entry) Change {
	same := s.Version == e.Version && s.Generation == e.Generation
	switch {
	case s.asOf.IsZero():
		return Current
	case same && s.State == e.State:
		return 0
	case e.op == 0, (e.State == Deleted) != (e.change == DeletedChange), e.op == s.op && (s.Version == e.Version || s.State != e.State):
		return ChangedOutside
	case s.Generation > 0 && e.Generation > s.Generation+1:
		return Current // there was another one in between
	}
	return e.change
}

// watch adds w to those who watch key.
func (b *Broker) watch(key secret.Key, w *watcher) {
	ws := &b.watches
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.keys[key] == nil {
		ws.keys[key] = &watched{watchers: map[*watcher]bool{}}
	}
	ws.keys[key].watchers[w] = false
	if !ws.polling && !b.discards && b.background() {
		ws.polling = true
		go func() {
			defer b.loads.Done()
			b.poll()
		}()
	}
}

func (ws *watches) remove(keys []secret.Key, w *watcher) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, key := range keys {
		if delete(ws.keys[key].watchers, w); len(ws.keys[key].watchers) == 0 {
			delete(ws.keys, key)
		}
	}
}

// has reports whether anybody watches key.
func (ws *watches) has(key secret.Key) bool {
	ws.mu.RLock()
	defer ws.mu.RUnlock()
	return ws.keys[key] != nil
}

// begin tells w of a secret for the first time, unless publish did.
func (ws *watches) begin(w *watcher, e *entry) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	k := ws.keys[e.Key]
	if k == nil {
		return // it has ended
	}
	told, ok := k.watchers[w]
	if k.last.asOf.IsZero() || k.last.asOf.Before(e.asOf) && k.last.changed(e) == 0 {
		k.last = k.last.next(e)
	}
	if ok && !told {
		k.watchers[w] = true
		w.tell(k.last.Metadata, Current)
	}
}

// publish tells those who watch its secret of e, if that is another state than the
// last one. It is called in the order in which the answers of a secret count.
func (ws *watches) publish(e *entry) {
	if e.unsure || !ws.has(e.Key) {
		return
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	k := ws.keys[e.Key]
	if k == nil {
		return
	}
	if k.last.asOf.After(e.asOf) {
		// A watch began during the write that ends with e: which of the two is the
		// newer, the vault has to say.
		k.due = true
		return
	}
	change := k.last.changed(e)
	k.last = k.last.next(e)
	if change == 0 {
		return
	}
	for w, told := range k.watchers {
		k.watchers[w] = true
		if !told {
			w.tell(e.Metadata, Current)
		} else {
			w.tell(e.Metadata, change)
		}
	}
}

// watcher is one watch: of each secret the state that it has yet to be told.
type watcher struct {
	call    Call
	mu      sync.Mutex
	pending map[secret.Key]Event
	order   []secret.Key
	ready   chan struct{}
}

// tell puts a state in line, in the place of an older one that is there yet.
func (w *watcher) tell(m Metadata, change Change) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.pending[m.Key]; ok {
		change = Current
	} else {
		w.order = append(w.order, m.Key)
	}
	if m.State == Absent {
		m, change = Metadata{Key: m.Key}, Missing
	}
	w.pending[m.Key] = Event{change, m}
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

// next takes the state that has waited longest.
func (w *watcher) next() (Event, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.order) == 0 {
		return Event{}, false
	}
	key := w.order[0]
	w.order = w.order[1:]
	event := w.pending[key]
	delete(w.pending, key)
	return event, true
}

// poll looks at watched secrets for what others changed in the vault, until the
// broker ends or nobody watches.
func (b *Broker) poll() {
	tick := time.NewTicker(min(mostTick, max(leastTick, time.Duration(tickShare*float64(b.ttl)))))
	defer tick.Stop()
	free := make(chan struct{}, pollsAtOnce)
	for range pollsAtOnce {
		free <- struct{}{}
	}
	for {
		select {
		case <-tick.C:
		case <-b.stopped.Done():
			return
		}
		due, over := b.watches.due(b.now(), b.ttl)
		if over {
			return
		}
		for _, n := range due {
			select {
			case <-free:
			case <-b.stopped.Done():
				return
			}
			go func() {
				if f := b.board(time.Now().Add(renewal), &n); f.flight != nil { // else it was read meanwhile
					<-f.done // nobody leaves it: it ends by itself
				}
				b.watches.asked(n.key)
				free <- struct{}{}
			}()
		}
	}
}

// due gives what is to be looked at, the oldest first. over reports that nobody
// watches any more.
func (ws *watches) due(now time.Time, ttl time.Duration) (due []need, over bool) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if len(ws.keys) == 0 {
		ws.polling = false
		return nil, true
	}
	since := map[secret.Key]time.Time{}
	for key, k := range ws.keys {
		old := age(now, k.last.asOf) >= time.Duration(pollShare*float64(ttl)) && age(now, k.asked) >= time.Duration(retryShare*float64(ttl))
		if k.asking || k.last.asOf.IsZero() || !old && !k.due {
			continue
		}
		k.asking, k.asked, k.due = true, now, false
		since[key] = k.last.asOf
		for w := range k.watchers {
			due = append(due, need{key: key, depth: whole, priority: vault.Rest, call: w.call, began: now})
			break
		}
	}
	slices.SortFunc(due, func(x, y need) int { return since[x.key].Compare(since[y.key]) })
	return due, false
}

// asked is for when the vault answered, or did not.
func (ws *watches) asked(key secret.Key) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if k := ws.keys[key]; k != nil {
		k.asking = false
	}
}

// lastChange is the last operation that s names, and a hash of its id; Missing and 0
// when it names none.
func (b *Broker) lastChange(s *snapshot) (Change, uint64) {
	h := s.current.History(s.current.Version)
	if s.state == Absent || len(h) == 0 {
		return Missing, 0
	}
	change := map[byte]Change{versions.LetterPut: PutChange, versions.LetterRotate: Rotated, versions.LetterDelete: DeletedChange, versions.LetterRecover: Recovered}[h[0].Letter]
	return change, maphash.String(b.cache.seed, h[0].ID)
}
