// Package broker is the heart: what each operation means for a secret in each
// of its states, how a write happens once or is honestly unknown, and which
// versions may still be read. It stands on a vault alone and knows neither the
// wire nor who may call.
//
// All state that must outlive the process is in the vault, as tags on the
// versions (tags.go). A broker can be killed between any two vault calls, and
// the next operation on that secret, at this broker or another, goes on by the
// rules that stand at Delete, Recover and Put.
package broker

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/time/rate"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// carryOn bounds a write whose caller is gone.
const carryOn = 5 * time.Minute

// noticeCut is what Close gives writes that it cut off to come back.
const noticeCut = time.Second

// Config is what a Broker stands on.
type Config struct {
	// Vault keeps the secrets. Required. The caller closes it, after Close.
	Vault vault.Vault
	// CacheTTL is how old an answer may be when the caller names no bound, and
	// StaleOnError when moreover the vault cannot be reached. Zero means the defaults.
	CacheTTL, StaleOnError time.Duration
	// Logger takes what no caller is told, such as tags that had to be dropped.
	// Required.
	Logger *slog.Logger
	// Repairs makes the calls on whose behalf the broker itself repairs; nil makes
	// such without a journal.
	Repairs func() Call
	// Now is the wall clock, and Wait lets time pass until ctx ends; nil means the
	// system's.
	Now  func() time.Time
	Wait func(ctx context.Context, d time.Duration) error
}

// Broker serves the secrets of a vault. All methods are safe for concurrent use.
// Writes of one secret take turns; a write whose first effect was sent to the
// vault goes on when its caller's context ends.
//
// Every error is an *Error; those of Put, Rotate, Delete and Recover say whether
// the write happened.
type Broker struct {
	vault vault.Vault
	log   *slog.Logger
	now   func() time.Time
	wait  func(context.Context, time.Duration) error
	own   func() Call
	// epoch goes into each version. The broker is alone: it is the start in
	// milliseconds, forced upward by any later one that is found in the vault.
	epoch atomic.Int64
	locks lockTable

	ttl, stale time.Duration
	firstTry   time.Duration // of a look for a watch that begins
	cache      *cache
	watches    watches
	digests    digests
	vain       *rate.Limiter // look-ups for tokens that match nothing
	begun      time.Time
	strangers  atomic.Int64   // look-ups under way of instances that are not known
	dubious    places         // of look-ups that others go before
	loads      sync.WaitGroup // flights and what polls, begun before closing
	staleTold  atomic.Int64   // when the log said last that answers are stale; Unix ns

	mu      sync.Mutex
	known   map[secret.Key]known
	met     map[secret.Key]bool // where somebody else's version was found
	pending map[secret.Key][]pendingWrite
	hidden  map[secret.Key]hiddenVersion
	// hidings counts the changes of hidden, so that a read can tell whether one
	// came between its request and its answer.
	hidings int64
	// repairing holds the secrets of which a late version is being put down.
	repairing map[secret.Key]bool

	writes   sync.WaitGroup
	closing  bool // under mu: no further write begins
	stop     context.CancelFunc
	stopped  context.Context
	discards bool
}

// New makes a Broker. It does not ask the vault anything.
func New(cfg Config) *Broker {
	b := &Broker{
		vault:     cfg.Vault,
		log:       cfg.Logger,
		now:       cfg.Now,
		wait:      cfg.Wait,
		own:       cfg.Repairs,
		known:     map[secret.Key]known{},
		met:       map[secret.Key]bool{},
		pending:   map[secret.Key][]pendingWrite{},
		hidden:    map[secret.Key]hiddenVersion{},
		repairing: map[secret.Key]bool{},
		discards:  cfg.Vault.Info().Discards,
	}
	if b.wait == nil {
		b.wait = vault.Wait
	}
	if b.now == nil {
		b.now = time.Now
	}
	if b.own == nil {
		b.own = func() Call { return Call{AuditID: uuid.NewString()} }
	}
	if b.ttl = cfg.CacheTTL; b.ttl == 0 {
		b.ttl = DefaultCacheTTL
	}
	if b.stale = cfg.StaleOnError; b.stale == 0 {
		b.stale = DefaultStaleOnError
	}
	b.firstTry, b.begun = renewal, b.now()
	b.cache = newCache(max(b.ttl, b.stale))
	b.digests = newDigests()
	b.vain = rate.NewLimiter(vain, vainBurst)
	b.dubious.taken = map[string]int{}
	b.watches.keys = map[secret.Key]*watched{}
	b.locks.held = map[secret.Key]*lock{}
	b.epoch.Store(b.now().UnixMilli())
	b.stopped, b.stop = context.WithCancel(context.Background())
	return b
}

// Close refuses further writes and waits for those under way until ctx ends;
// then it cuts them off, as a crash would, and waits for them to notice, at most
// a second. Reads that still wait for the vault then, and watches, end too.
func (b *Broker) Close(ctx context.Context) {
	b.mu.Lock()
	b.closing = true
	b.mu.Unlock()
	done := make(chan struct{})
	go func() {
		b.writes.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		b.log.Warn("writes cut off by shutdown; a retry with the same request id tells what became of them")
	}
	b.stop()
	quiet := make(chan struct{})
	go func() {
		<-done
		b.loads.Wait()
		close(quiet)
	}()
	select {
	case <-quiet:
	case <-time.After(noticeCut):
		b.log.Error("the vault does not let go of a request; shutting down without its outcome")
	}
	b.cache.close()
}

// background counts what Close waits for; false when it does not any more.
func (b *Broker) background() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closing {
		b.loads.Add(1)
	}
	return !b.closing
}

// Check reports whether the vault can be used now.
func (b *Broker) Check(ctx context.Context) error { return b.vault.Check(ctx) }

// Call says on whose behalf an operation runs.
type Call struct {
	// Caller is the SPIFFE ID of the caller, at most 512 bytes.
	Caller string
	// AuditID is the id of this call in logs, errors and the vault.
	AuditID string
	// Journal takes what the call changes; nil is none. Reads need none.
	Journal Journal
	// Crowded says that the caller has as much under way as it may: a Verify that has to
	// ask the vault needs one of few places.
	Crowded bool
}

// on is ctx for the vault calls of a read.
func (c Call) on(ctx context.Context) context.Context {
	return vault.WithOrigin(ctx, vault.Origin{Caller: c.Caller, RequestID: c.AuditID})
}

// State says what can be done with a secret or a version.
type State int

// The states. Absent is the zero value and stands in no Metadata.
const (
	Absent State = iota
	Active
	Disabled
	Deleted
)

// Metadata is what is known of a secret or of one of its versions besides the
// value. Times that do not apply are zero.
type Metadata struct {
	Key        secret.Key
	Version    string
	Generation int64
	State      State
	CreatedBy  string
	CreateTime time.Time
	ExpireTime time.Time
	DeleteTime time.Time
	PurgeTime  time.Time
}
