package broker

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// operation is one write on its way.
type operation struct {
	Call
	key    secret.Key
	letter byte
	id     string // the caller's request id, or one made here
	asked  bool   // the caller gave the id, so it may have been done before
	phase  atomic.Int32

	// What lasts when the write is judged again, because the secret changed under
	// it.
	depth  depth         // whether it has to look at what is deleted
	minted secret.Value  // the token that it made
	again  *pendingWrite // the same request, sent before with unknown outcome
	// held reports that its first effect was sent, and sentAt when the last one was.
	held   bool
	sentAt time.Time
	// after is the secret as the operation last saw or left it, for the reads that
	// come after it; nil when that is not known.
	after *entry
	// seen is the secret as it was when the operation was last judged, and aside its
	// looks at it.
	seen  *entry
	aside *aside
	// begun reports that a step of it was done, so that the rest is not the
	// caller's to wait for.
	begun bool
	// found is the intent that it would have now, and intended the one that the journal
	// was told last. settles reports that it only finds out about one.
	found    Intent
	intended *Intent
	settles  bool
	// wrote is the version that it made or changed.
	wrote version
}

// Phases of an operation. It leaves pending once, for one of the others.
const (
	pending   = iota // nothing was sent: the caller's end ends it
	started          // its first effect was sent: it is carried on
	abandoned        // the caller left before that: nothing will be sent
)

func newOperation(call Call, key secret.Key, letter byte, requestID string) *operation {
	op := &operation{Call: call, key: key, letter: letter, id: requestID, asked: requestID != ""}
	if !op.asked {
		op.id = uuid.NewString()
	}
	if op.Journal == nil {
		op.Journal = noJournal{}
	}
	op.found = Intent{Action: actionOf[letter], Key: key, OperationID: op.id}
	return op
}

// begin is called before anything is sent that changes the vault. It fails when
// the caller is gone already; from its success on, the operation is carried on.
func (op *operation) begin() error {
	if op.phase.CompareAndSwap(pending, started) || op.phase.Load() == started {
		return nil
	}
	return context.Canceled
}

// do runs a write: one at a time per secret, to its end once it has had an
// effect, and with a commit state on every error. work gets a context of its
// own, which outlives the caller's by up to carryOn once something was sent that
// changes the vault. It runs again when the secret changed under it before that.
func do[R any](b *Broker, ctx context.Context, op *operation, work func(context.Context) (R, error)) (R, error) {
	var none R
	// The caller hears what became of it a little before its deadline: its own gRPC
	// knows nothing of that.
	if until, ok := vault.Until(ctx); ok {
		var end context.CancelFunc
		ctx, end = context.WithDeadline(ctx, until)
		defer end()
	}
	b.mu.Lock()
	if b.closing {
		b.mu.Unlock()
		return none, b.told(ctx, op, refuse(op.key, secret.ShuttingDown, "this broker is shutting down; try again, at another one if there is one"))
	}
	b.writes.Add(1)
	b.mu.Unlock()

	unlock, sameID := b.locks.lock(ctx, op.key, op.id)
	if unlock == nil {
		b.writes.Done()
		err := contextError(ctx, op.key)
		if sameID {
			err.Message += "; the same request is under way and may succeed"
			return none, withCommit(err, secret.Unknown)
		}
		err.Message += "; another write of this secret is under way"
		return none, b.told(ctx, op, err)
	}

	workCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), carryOn)
	patience, _ := ctx.Deadline()
	workCtx = vault.WithOrigin(workCtx, vault.Origin{Caller: op.Caller, RequestID: op.AuditID, Patience: patience, Effect: func() error {
		err := op.effect(ctx)
		if err == nil {
			b.hold(op)
		}
		return err
	}})
	op.aside = b.cache.aside(op.key)
	leave := context.AfterFunc(ctx, func() {
		if op.phase.CompareAndSwap(pending, abandoned) {
			cancel()
		}
	})
	cut := context.AfterFunc(b.stopped, cancel)
	type outcome struct {
		result R
		err    error
	}
	ended := make(chan outcome, 1)
	go func() {
		var o outcome
		defer func() {
			if p := recover(); p != nil {
				b.log.Error("panic in a write", "audit_id", op.AuditID, "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
				o.err = refuse(op.key, secret.Defect, "the broker failed")
				if op.phase.Load() == started {
					withCommit(o.err, secret.Unknown)
				}
			}
			if o.err != nil {
				if workCtx.Err() != nil && ctx.Err() == nil && b.stopped.Err() != nil {
					// Cut off by shutdown rather than by the caller or the vault.
					o.err = shutdownError(op, o.err)
				}
				o.err = b.told(ctx, op, o.err)
			}
			if ctx.Err() != nil && op.phase.Load() == started {
				b.log.Info("a write ended after its caller was gone", "key", op.key.String(), "audit_id", op.AuditID, "operation_id", op.id, "applied", o.err == nil, "error", o.err)
			}
			leave()
			cut()
			cancel()
			o.err = b.recordEnd(ctx, op, o.err)
			var told *Error
			if op.held && !op.begun && errors.As(o.err, &told) && told.Commit == secret.NotApplied {
				op.after = op.seen // nothing came of it
			}
			b.end(op)
			unlock()
			b.writes.Done()
			ended <- o
		}()
		o.result, o.err = untilSettled(b, workCtx, op, work)
	}()

	select {
	case o := <-ended:
		return o.result, o.err
	case <-ctx.Done():
	}
	select {
	case o := <-ended:
		return o.result, o.err
	default:
	}
	err := contextError(ctx, op.key)
	if op.phase.CompareAndSwap(pending, abandoned) || op.phase.Load() == abandoned {
		return none, b.told(ctx, op, err)
	}
	err.Message += "; the broker carries the write on, and the same request id tells its outcome"
	return none, withCommit(err, secret.Unknown)
}

const (
	// mostTries bounds how often a write is judged again.
	mostTries = 4
	// Waits for a name that is being purged, and between a write of unknown outcome
	// and the next look.
	movedPause   = time.Second
	firstPause   = 200 * time.Millisecond
	longestPause = 15 * time.Second
)

// untilSettled does the work, again where the secret was moved under it: to be
// judged by the state that it is in now.
func untilSettled[R any](b *Broker, ctx context.Context, op *operation, work func(context.Context) (R, error)) (R, error) {
	pauses := vault.NewPauses(movedPause, longestPause)
	for tries := 1; ; tries++ {
		result, err := work(ctx)
		if !moved(err) {
			return result, err
		}
		op.seen, op.after = nil, nil // it is not so any more
		if !errors.Is(err, vault.ErrDeleted) {
			if tries == mostTries {
				return result, err
			}
			continue
		}
		op.depth = whole
		settled := b.vault.Settle(ctx, op.key)
		if settled != nil && !errors.Is(settled, vault.ErrNotFound) {
			if vault.IsUncertain(err) {
				settled = vault.Uncertain(settled)
			}
			return result, settled
		}
		// Absent, and yet the name is taken: it is being purged. Or the vault says now
		// this and now that.
		if (settled != nil || tries >= mostTries) && !b.pause(ctx, op, pauses.NextBackOff()) {
			return result, err
		}
	}
}

// moved reports whether a write found the secret in another state than the one
// that it was judged by, and did nothing; or nothing that would be there now, where
// the name turned out to be deleted.
func moved(err error) bool {
	var told *Error
	return !errors.As(err, &told) && (changed(err) && !vault.IsUncertain(err) || errors.Is(err, vault.ErrDeleted))
}

// told is err in the contract's words. A request that was sent before with unknown
// outcome stays unknown, as long as that one would count if it arrived.
func (b *Broker) told(ctx context.Context, op *operation, err error) error {
	e := vaultError(ctx, op.key, err)
	switch {
	case e.Commit != "":
	case vault.IsUncertain(err):
		e.Commit = secret.Unknown
	case op.asked && e.Reason != secret.RequestIDReused && b.mayStillApply(op.key, op.id):
		e.Commit = secret.Unknown
	default:
		e.Commit = secret.NotApplied
	}
	return e
}

// pause lets time pass, as long as the caller is there or the write is carried on
// without.
func (b *Broker) pause(ctx context.Context, op *operation, d time.Duration) bool {
	if op.phase.Load() == started {
		ctx = carried(ctx)
	}
	return vault.Pause(ctx, b.wait, d)
}

// shutdownError keeps the commit state of a write that shutdown cut off.
func shutdownError(op *operation, err error) error {
	e := refuse(op.key, secret.ShuttingDown, "this broker shut down during the write; the same request id tells its outcome, at another broker or after the restart")
	e.Commit, e.cause = vaultError(context.Background(), op.key, err).Commit, err
	if vault.IsUncertain(err) {
		e.Commit = secret.Unknown
	}
	return e
}

// prepare loads the secret for a write, refuses what a newer release wrote, and
// finds the operation among those that were done already, by the caller's
// request id: then replay is not nil.
func (b *Broker) prepare(ctx context.Context, op *operation) (s *snapshot, base version, replay *done, err error) {
	for {
		if s, err = b.load(ctx, op.key, op.depth); err != nil {
			return nil, version{}, nil, err
		}
		if !s.hasLate() {
			break
		}
		if err := b.putDown(ctx, op, s); err != nil {
			return nil, version{}, nil, err
		}
	}
	if base, err = b.base(ctx, s); err != nil {
		return nil, version{}, nil, err
	}
	if max(s.current.Format, base.Format) > versions.CurrentFormat {
		return nil, version{}, nil, refuse(op.key, secret.KeyMismatch, "a newer release wrote this secret in a format that this one cannot write; upgrade the broker")
	}
	b.raiseEpoch(base.Epoch)
	op.found.Version, op.found.Deleted = s.current.Version, s.state == Deleted && !s.current.Marked()
	op.seen = b.entryOf(s)
	op.after = op.seen
	if op.asked || op.settles {
		for _, d := range s.history(base) {
			if d.ID == op.id {
				if d.Letter != op.letter {
					return nil, version{}, nil, errRequestIDReused(op.key)
				}
				b.settled(op.key, op.id)
				if !op.settles {
					op.Journal.Replayed()
				}
				return s, base, &d, nil
			}
		}
		if w, ok := b.pendingOf(op.key, op.id); ok {
			if w.Made.Letter != op.letter {
				return nil, version{}, nil, errRequestIDReused(op.key)
			}
			op.again = &w
		}
	}
	return s, base, nil, nil
}

func errRequestIDReused(key secret.Key) error {
	e := refuse(key, secret.RequestIDReused, "this request_id was used for another request on this secret; make a new UUID for each new request")
	e.Field = "request_id"
	return e
}

// history is what is remembered of the operations on the secret: what the
// current version says, or where that is not the broker's, what the last one of
// the broker's own says, with the deletes and recovers of the current one.
func (s *snapshot) history(base version) []done {
	if base.Version == s.current.Version || len(s.current.Others) > 0 {
		return s.current.History(s.current.Version)
	}
	h := append(s.current.History(s.current.Version), base.History(base.Version)...)
	return h[:min(len(h), versions.Remembered+1)]
}

// matches judges must_match_version against the current version. A write that was
// sent twice may have made two versions: they are one to a caller.
func (b *Broker) matches(ctx context.Context, s *snapshot, mustMatch string) error {
	there := s.state != Absent && s.state != Deleted
	if mustMatch == "" || there && mustMatch == s.current.Version {
		return nil
	}
	if there && s.current.Made.ID != "" {
		v, ok, err := b.find(ctx, s, mustMatch)
		if err != nil {
			return err
		}
		if ok && v.Made == s.current.Made && v.Epoch == s.current.Epoch {
			return nil
		}
	}
	return refuse(s.key, secret.VersionMismatch, "the current version is not the one that must_match_version names; read the secret again and decide anew")
}

func errDisabled(key secret.Key) error {
	return refuse(key, secret.SecretDisabled, "somebody disabled this secret in the vault; have it enabled there, or name the disabled version in must_match_version to overwrite it")
}

// lockTable lets one operation at a time work on a secret. Its zero held is not
// usable.
type lockTable struct {
	mu   sync.Mutex
	held map[secret.Key]*lock
}

type lock struct {
	turn  chan struct{}
	users int    // holder and waiters
	id    string // of the holder's operation
}

// lock waits its turn on key, in order of arrival, until ctx ends: then unlock is
// nil, and sameID reports whether the holder is an operation with this very id.
func (t *lockTable) lock(ctx context.Context, key secret.Key, id string) (unlock func(), sameID bool) {
	t.mu.Lock()
	l := t.held[key]
	if l == nil {
		l = &lock{turn: make(chan struct{}, 1)}
		t.held[key] = l
	}
	l.users++
	t.mu.Unlock()
	leave := func() {
		if l.users--; l.users == 0 {
			delete(t.held, key)
		}
	}
	select {
	case l.turn <- struct{}{}:
		t.mu.Lock()
		l.id = id
		t.mu.Unlock()
		return func() {
			t.mu.Lock()
			l.id = ""
			leave()
			t.mu.Unlock()
			<-l.turn
		}, false
	case <-ctx.Done():
		t.mu.Lock()
		defer t.mu.Unlock()
		leave()
		return nil, l.id == id
	}
}
