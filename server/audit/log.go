package audit

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/exto/secrets-broker/internal/fsync"
)

// ErrUnavailable is every error of a Log at work: the record may not be there, so
// the call must not be answered.
var ErrUnavailable = errors.New("the audit log cannot be written")

var (
	errHanging = errors.New("a write has been hanging for seconds")
	errSyncing = errors.New("an fsync has been hanging for seconds")
	errFull    = errors.New("too many records are waiting to be written")
	errDown    = errors.New("the last write failed")
	errClosed  = errors.New("it is closed")
)

const (
	// long is how long the callers of a write wait for it without a look at their own
	// time. That is how much later they may leave.
	long = 5 * time.Millisecond
	// hangs is how long a write or an fsync may take before new records are refused at
	// once: disks of clouds, and machines with too much to do, stop for a second or two.
	hangs = 5 * time.Second
	// maxQueued bounds the bytes that wait, also of callers that gave up.
	maxQueued = 16 << 20
	// headEvery is how often the head is logged, in ticks.
	headEvery = 60
	tick      = time.Second
)

// Config configures a Log.
type Config struct {
	Path     string                // of the file, or "-" for Out: no fsync, no journal, a chain for each process
	Out      io.Writer             // where "-" goes; standard output when nil
	MaxBytes int64                 // a file of this size is followed by a new one; 0: never
	Keep     int                   // how many NAME.N to keep; 0: all
	System   System                // in force at Open, for the first line of a new file
	Logger   *slog.Logger          // nil: nothing is logged
	Metrics  prometheus.Registerer // nil: none
	Now      func() time.Time      // nil: time.Now

	wrap  func(*os.File) file    // set by tests: puts faults between the log and its file
	hangs time.Duration          // 0: hangs
	free  func() (uint64, error) // nil: what is free on the file system, in bytes
}

// file is what the log asks of an *os.File.
type file interface {
	io.Writer
	Sync() error
	Truncate(size int64) error
	Stat() (os.FileInfo, error)
	Close() error
}

// Log is an open audit log. It is safe for concurrent use.
type Log struct {
	cfg      Config
	log      *slog.Logger
	started  time.Time // durations since then are atomics
	metrics  *metrics
	unclosed []Record

	mu      sync.Mutex
	queue   []*entry
	queued  int               // bytes of the queue
	next    *batch            // of the queue; nil when that is empty
	now     *batch            // that the writer has
	slow    bool              // the writer takes long over what it does
	kept    []*entry          // written before the queue, and kept until they are
	open    map[string][]byte // by id: bodies of the intents without outcome
	syncing []*entry          // written intents that wait for an fsync
	retired []file            // files before the present one, to be synced and closed
	made    bool              // the directory has to be synced too
	file    file              // nil on a stream
	system  System
	closed  bool
	counts  map[countKey]int64

	batches int64        // begun so far: the number of the last one
	settled atomic.Int64 // number of the last batch of which all is known
	smooth  atomic.Int64 // since started: when a write last went well, with room for many more; 0: not the last one

	wake     chan struct{}
	reopen   chan struct{}
	syncWake chan struct{} // closed by the writer
	done     chan struct{}
	pool     sync.Pool

	writeFrom, syncFrom atomic.Int64 // since started, when one is under way
	writes, syncs       outage

	writer
}

// batch is what the callers of one write wait for.
type batch struct {
	number int64
	done   chan struct{} // closed when all is known, or when it takes long
	long   chan struct{} // nil unless it takes long: closed when all is known
}

// entry is a record on its way.
type entry struct {
	kind   Type
	body   []byte
	count  *counted      // of a count
	keep   bool          // it goes to kept when it can't be written
	own    bool          // no caller waits for it
	torn   bool          // it is of the writer's torn
	resume bool          // it ends an outage
	holder Holder        // of what was submitted, which nobody waits for here
	synced chan struct{} // of an intent with a file: closed when all is known
	// Under the log's mu:
	state state
	gone  bool // the caller has left
	err   error
}

type state uint8

const (
	waiting state = iota
	taken         // the writer has it
	finished
)

// Open opens the log, makes the file if it is missing, and goes on with the chain
// that it finds. A torn last line is cut off and recorded. The error is one line.
func Open(cfg Config) (*Log, error) {
	l := &Log{
		cfg: cfg, log: cfg.Logger, started: time.Now(), system: cfg.System,
		open: map[string][]byte{}, counts: map[countKey]int64{},
		wake: make(chan struct{}, 1), reopen: make(chan struct{}, 1), syncWake: make(chan struct{}, 1), done: make(chan struct{}),
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	if l.cfg.Now == nil {
		l.cfg.Now = time.Now
	}
	l.cfg.hangs = cmp.Or(l.cfg.hangs, hangs)
	if l.cfg.free == nil {
		l.cfg.free = l.free
	}
	if l.cfg.wrap == nil {
		l.cfg.wrap = func(f *os.File) file { return fsync.Wrap(f) }
	}
	l.writes = outage{log: l.log, path: cfg.Path, down: "the audit log cannot be written", up: "the audit log is written again"}
	l.syncs = outage{log: l.log, path: cfg.Path, down: "the audit log cannot be made durable", up: "the audit log is durable again"}
	l.rotates = outage{log: l.log, path: cfg.Path, down: "the audit log cannot begin a new file and goes on in the present one", up: "the audit log rotates again"}
	l.pool.New = func() any { return &entry{body: make([]byte, 0, 512)} }
	if cfg.Path == "-" {
		l.out = cfg.Out
		if l.out == nil {
			l.out = os.Stdout
		}
		l.chain = uuid.NewString()
		l.kept = append(l.kept, l.entry(TypeSystem, l.begin()))
		l.kept[0].keep, l.kept[0].own = true, true
		l.poke()
	} else if err := l.resolve(); err != nil {
		return nil, fmt.Errorf("audit log %w", err)
	} else if err := l.openFile(); err != nil {
		return nil, fmt.Errorf("audit log %w", err)
	}
	l.metrics = newMetrics(l)
	l.logHead()
	syncerDone := make(chan struct{})
	go func() { defer close(syncerDone); l.syncAll() }()
	go func() {
		defer close(l.done)
		err := l.writeAll()
		close(l.syncWake)
		<-syncerDone
		l.closeErr = errors.Join(err, l.flush()) // outcomes of intents that did not become durable
		l.logHead()
		if l.file != nil {
			_ = l.file.Close() // it was synced
		}
	}()
	return l, nil
}

// Unclosed gives the intents that had no outcome when the log was opened. Each
// stays open until an outcome with its ID is written.
func (l *Log) Unclosed() []Record { return l.unclosed }

// Write returns when the operating system has the line, so that the end of the
// process loses nothing. An outcome that can't be written is kept and written
// first as soon as it can; its intent is open until then.
func (l *Log) Write(ctx context.Context, r *Record) error {
	kind := r.Type
	if kind == "" {
		kind = TypeCall
	}
	e := l.entry(kind, r)
	return l.put(ctx, e)
}

// Intend is Write of an intent, and returns when it is on disk. An intent for
// which it gives an error needs no outcome: the log closes it.
func (l *Log) Intend(ctx context.Context, r *Record) error {
	e := l.entry(TypeIntent, r)
	if l.onFile() {
		e.synced = make(chan struct{})
	}
	return l.put(ctx, e)
}

// System remembers s for the first line of each new file, and writes a system
// line with it. A line that can't be written is kept, and written as soon as it can.
func (l *Log) System(ctx context.Context, action string, s System) error {
	l.mu.Lock()
	l.system = s
	l.mu.Unlock()
	e := l.entry(TypeSystem, &Record{Action: action, System: &s})
	e.keep = true
	return l.put(ctx, e)
}

// Reopen begins a new file if the path does not hold the present one any more.
// That is found out once a second without it too.
func (l *Log) Reopen() {
	select {
	case l.reopen <- struct{}{}:
	default:
	}
}

// Close writes and syncs what is left. It returns when that is done or ctx ends.
func (l *Log) Close(ctx context.Context) error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.poke()
	select {
	case <-l.done:
		return l.closeErr
	case <-ctx.Done():
		return unavailable(context.Cause(ctx))
	}
}

// Check reports whether records can be written, as far as is known.
func (l *Log) Check() error {
	if l.unwritable() || l.syncs.is.Load() || l.hanging(&l.syncFrom) {
		return ErrUnavailable
	}
	return nil
}

func (l *Log) unwritable() bool { return l.writes.is.Load() || l.hanging(&l.writeFrom) }

func (l *Log) onFile() bool { return l.cfg.Path != "-" }

func (l *Log) entry(kind Type, r *Record) *entry {
	e, _ := l.pool.Get().(*entry)
	body := appendBody(e.body[:0], kind, r, l.cfg.Now())
	*e = entry{kind: kind, body: body, keep: kind == TypeOutcome}
	return e
}

// put queues an entry and waits for what becomes of it.
func (l *Log) put(ctx context.Context, e *entry) error {
	b, err := l.enqueue(e)
	if err != nil {
		return err
	}
	// Most writes take less than to wait for two things at once would cost.
	known := e.synced
	if known == nil {
		<-b.done
		known = b.long
	}
	if known != nil {
		select {
		case <-known:
		case <-ctx.Done():
			return l.leave(ctx, e)
		}
	}
	if e.err != nil {
		return e.err
	}
	l.pool.Put(e)
	return nil
}

func (l *Log) enqueue(e *entry) (*batch, error) {
	l.mu.Lock()
	if err := l.refusal(e); err != nil {
		if e.keep && !l.closed {
			l.kept = l.keepOutcome(l.kept, e)
		}
		l.mu.Unlock()
		return nil, l.refused(err)
	}
	l.queue = append(l.queue, e)
	l.queued += len(e.body)
	if l.next == nil {
		l.batches++
		l.next = &batch{number: l.batches, done: make(chan struct{})}
		if l.slow {
			l.next.takesLong()
		}
	}
	b, first := l.next, len(l.queue) == 1
	l.mu.Unlock()
	if first { // for the others it was done
		l.poke()
	}
	return b, nil
}

// takesLong has those who wait look at their own time from now on. The log's mu is held,
// as in end.
func (b *batch) takesLong() {
	if b != nil && b.long == nil {
		b.long = make(chan struct{})
		close(b.done)
	}
}

// end is for when all is known.
func (b *batch) end() {
	if b.long != nil {
		close(b.long)
	} else {
		close(b.done)
	}
}

// refusal is why an entry isn't even queued. The caller holds mu.
func (l *Log) refusal(e *entry) error {
	switch {
	case l.closed:
		return errClosed
	case l.hanging(&l.writeFrom):
		return errHanging
	case e.synced != nil && l.hanging(&l.syncFrom):
		return errSyncing
	case l.queued+len(e.body) > maxQueued:
		return errFull
	}
	return nil
}

// refused counts a refusal, and logs it if it is the first of its kind.
func (l *Log) refused(cause error) error {
	of := &l.writes
	switch cause {
	case errHanging:
		of.fall(cause)
	case errSyncing:
		of = &l.syncs
		of.fall(cause)
	}
	of.refused.Add(1)
	return unavailable(cause)
}

// leave is the way of a caller whose context has ended.
func (l *Log) leave(ctx context.Context, e *entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.state == finished {
		return e.err
	}
	e.gone = true
	return unavailable(context.Cause(ctx))
}

// keepOutcome adds an outcome that can't be written to those kept, if its intent
// is open: that bounds them. What the log itself has to say is always kept. The
// caller holds mu.
func (l *Log) keepOutcome(kept []*entry, e *entry) []*entry {
	if _, ok := l.open[idOf(e.body)]; !ok && e.kind == TypeOutcome {
		return kept
	}
	return append(kept, &entry{kind: e.kind, body: e.body, keep: true, own: true}) // e itself is the caller's
}

// closeIntent has the log itself close an intent that was refused although its
// line is or may be there. The caller holds mu.
func (l *Log) closeIntent(e *entry) {
	r := recordOf(e.body)
	closing := l.entry(TypeOutcome, &Record{
		ID: r.ID, Caller: r.Caller, Serial: r.Serial, Peer: r.Peer, Action: r.Action, Key: r.Key, Instance: r.Instance,
		RequestID: r.RequestID, OperationID: r.OperationID, Code: "UNAVAILABLE", Reason: reasonAudit, Commit: commitNotApplied,
	})
	closing.own = true
	l.kept = append(l.kept, closing)
}

func (l *Log) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// hanging reports whether what began at from is taking too long.
func (l *Log) hanging(from *atomic.Int64) bool {
	at := from.Load()
	return at != 0 && time.Since(l.started)-time.Duration(at) > l.cfg.hangs
}

func unavailable(cause error) error { return fmt.Errorf("%w: %w", ErrUnavailable, cause) }

func (l *Log) logHead() {
	if l.seq > l.logged {
		l.logged = l.seq
		l.log.Info("audit log", "path", l.cfg.Path, "seq", l.seq, "head", hex.EncodeToString(l.head[:]))
	}
}
