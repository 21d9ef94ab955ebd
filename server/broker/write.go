package broker

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

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
		return none, withCommit(refuse(op.key, secret.ShuttingDown, "this broker is shutting down; try again, at another one if there is one"), secret.NotApplied)
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
		return none, withCommit(err, secret.NotApplied)
	}

	workCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), carryOn)
	patience, _ := ctx.Deadline()
	workCtx = vault.WithOrigin(workCtx, vault.Origin{Caller: op.Caller, RequestID: op.AuditID, Patience: patience, Effect: op.begin})
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
			} else {
				b.settled(op.key, op.id)
			}
			if ctx.Err() != nil && op.phase.Load() == started {
				b.log.Info("a write ended after its caller was gone", "key", op.key.String(), "audit_id", op.AuditID, "operation_id", op.id, "applied", o.err == nil, "error", o.err)
			}
			leave()
			cut()
			cancel()
			unlock()
			b.writes.Done()
			ended <- o
		}()
		o.result, o.err = work(workCtx)
		pauses := vault.NewPauses(movedPause, longestPause)
		for tries := 1; moved(o.err) && (tries < mostTries || errors.Is(o.err, vault.ErrDeleted)); tries++ {
			if errors.Is(o.err, vault.ErrDeleted) {
				op.depth = whole
				err := b.vault.Settle(workCtx, op.key)
				if err != nil && !errors.Is(err, vault.ErrNotFound) {
					o.err = err
					break
				}
				// Absent, and yet the name is taken: it is being purged.
				if err != nil && !b.pause(workCtx, op, pauses.NextBackOff()) {
					break
				}
			}
			o.result, o.err = work(workCtx)
		}
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
		return none, withCommit(err, secret.NotApplied)
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

// carried is ctx for what goes on when the caller's patience is at its end.
func carried(ctx context.Context) context.Context {
	o := vault.OriginOf(ctx)
	o.Patience = time.Time{}
	return vault.WithOrigin(ctx, o)
}

// settle makes a vault write until its outcome is known. After one of unknown
// outcome landed tells whether it is there; if not, it is made again, by the
// context's end. What the vault refuses for a time is made again as long as the
// caller waits.
func (b *Broker) settle(ctx context.Context, op *operation, write func(context.Context) error, landed func(context.Context) (bool, error)) error {
	pauses := vault.NewPauses(firstPause, longestPause)
	var doubt error
	for {
		err := write(ctx)
		again := vault.IsUncertain(err)
		switch {
		case err == nil:
			return nil
		case again:
			doubt = err
			ctx = carried(ctx)
		case errors.Is(err, vault.ErrThrottled) && op.phase.Load() == started:
			again = true
		case doubt == nil:
			return err
		}
		there, lookErr := landed(ctx)
		for lookErr != nil && doubt != nil && vault.Pause(ctx, b.wait, max(pauses.NextBackOff(), vault.RetryAfter(lookErr))) {
			there, lookErr = landed(ctx)
		}
		switch {
		case there:
			return nil
		case lookErr != nil && doubt != nil:
			return doubt
		case !again: // refused now, after one that may have been done
			return vault.Uncertain(err)
		case !vault.Pause(ctx, b.wait, max(pauses.NextBackOff(), vault.RetryAfter(err))):
			if doubt != nil {
				return doubt
			}
			return err
		}
	}
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
		if s.late == nil {
			break
		}
		if err := b.putDown(ctx, op, s); err != nil {
			return nil, version{}, nil, err
		}
	}
	if s.state == Absent && !s.unsure {
		b.forget(op.key)
	}
	if base, err = b.base(ctx, s); err != nil {
		return nil, version{}, nil, err
	}
	if max(s.current.format, base.format) > currentFormat {
		return nil, version{}, nil, refuse(op.key, secret.KeyMismatch, "a newer release wrote this secret in a format that this one cannot write; upgrade the broker")
	}
	b.raiseEpoch(base.epoch)
	if op.asked {
		for _, d := range s.history(base) {
			if d.id == op.id {
				if d.letter != op.letter {
					return nil, version{}, nil, errRequestIDReused(op.key)
				}
				b.settled(op.key, op.id)
				return s, base, &d, nil
			}
		}
		if w, ok := b.pendingOf(op.key, op.id); ok {
			if w.letter != op.letter {
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
	if base.Version == s.current.Version || len(s.current.others) > 0 {
		return s.current.history(s.current.Version)
	}
	h := append(s.current.history(s.current.Version), base.history(base.Version)...)
	return h[:min(len(h), remembered+1)]
}

// store writes a new version on top of s: that of a put or a rotate. previous
// and its grace are set by a rotate that replaces something.
func (b *Broker) store(ctx context.Context, op *operation, s *snapshot, base version, value secret.Value, r record) (*snapshot, error) {
	over := s.state == Deleted
	// Deleted by somebody else: once recovered it is live, and nothing but the
	// broker's memory keeps it from being read.
	recovered := over && !s.current.marked()
	if over && !s.live {
		if recovered {
			b.hide(s)
		}
		if err := b.bringBack(ctx, op); err != nil {
			if !vault.IsUncertain(err) {
				b.unhide(op.key)
			}
			return nil, err
		}
		var err error
		if base, err = b.afterRecover(ctx, s); err != nil {
			return nil, b.deleteAgain(ctx, op, recovered, err)
		}
	}

	taken := max(base.generation, b.highestOf(op.key, op.id, s.state == Absent))
	r.generation, r.createdBy = taken+1, op.Caller
	r.epoch, r.auditID = b.epoch.Load(), op.AuditID
	if again := op.again; again != nil {
		if again.generation > taken && again.epoch == r.epoch {
			r.generation = again.generation // nothing came since: it is one write, sent twice
		} else {
			r.generation = max(taken, again.generation) + 1
			r.epoch = b.epoch.Add(1) // so that the one sent before is a late one
		}
	}
	r.made = done{letter: op.letter, id: op.id}
	r.others = s.history(base)
	r.others = r.others[:min(len(r.others), remembered)]
	r.first = base.first
	if over {
		r.first = r.generation
	}
	after, err := b.set(ctx, op, s, value, r)
	switch {
	case vault.IsUncertain(err):
		op.again = &pendingWrite{letter: op.letter, id: op.id, value: value, epoch: r.epoch, generation: r.generation}
		b.pend(op.key, *op.again)
		return nil, err
	case err != nil:
		return nil, b.deleteAgain(ctx, op, recovered, err)
	}
	if s.state == Absent {
		b.forget(op.key)
	}
	b.see(op.key, after)
	b.unhide(op.key)
	if s.late != nil {
		if err := b.disable(ctx, op, *s.late); err != nil {
			// It is covered by what was written, and from before the delete: not served.
			b.log.Warn("a late version is not disabled", "key", op.key.String(), "audit_id", op.AuditID, "version", s.late.Version, "error", err)
		}
	}
	return &snapshot{key: op.key, state: Active, live: true, current: after}, nil
}

// set makes one new version of what r says.
func (b *Broker) set(ctx context.Context, op *operation, s *snapshot, value secret.Value, r record) (version, error) {
	v := vault.NewVersion{First: s.state == Absent, Value: value, ContentType: s.current.ContentType, Tags: b.encode(r, s)}
	var props vault.Properties
	err := b.settle(ctx, op, func(ctx context.Context) (err error) {
		props, err = b.vault.Set(ctx, op.key, v)
		return err
	}, func(ctx context.Context) (there bool, err error) {
		props, there, err = b.landed(ctx, s, r)
		return there, err
	})
	return newVersion(props), err
}

// bringBack recovers a deleted name in the vault.
func (b *Broker) bringBack(ctx context.Context, op *operation) error {
	return b.settle(ctx, op, func(ctx context.Context) error {
		return b.vault.Recover(ctx, op.key)
	}, func(ctx context.Context) (bool, error) {
		_, _, err := b.vault.Get(ctx, op.key, "")
		if errors.Is(err, vault.ErrNotFound) {
			return false, nil
		}
		if errors.Is(err, vault.ErrDisabled) {
			return true, nil
		}
		return err == nil, err
	})
}

// afterRecover looks at what has come back with a name: what the vault showed of it
// while it was deleted was its newest version, which may be a late one. It gives
// the version that the next write counts on.
func (b *Broker) afterRecover(ctx context.Context, s *snapshot) (version, error) {
	s.live, s.listed = true, nil
	if err := b.listVersions(ctx, s); err != nil {
		return version{}, err
	}
	if greatest := s.greatest(); s.current.generation > 0 && greatest.later(s.current.record) {
		s.putBehind(greatest)
	}
	return b.base(ctx, s)
}

// deleteAgain undoes the recover of a secret that somebody else had deleted,
// when the put over it failed. Should that fail too, the version stays hidden
// until the next write of the secret.
func (b *Broker) deleteAgain(ctx context.Context, op *operation, recovered bool, cause error) error {
	if !recovered {
		return cause
	}
	_, err := b.vault.Delete(ctx, op.key)
	switch {
	case errors.Is(err, vault.ErrNotFound) && vault.IsUncertain(cause):
		return cause // the recover may yet arrive
	case err != nil && !errors.Is(err, vault.ErrNotFound):
		b.log.Error("a deleted secret is live in the vault after a failed put over it; the broker does not serve it, but who reads the vault directly can: put or delete it again",
			"key", op.key.String(), "audit_id", op.AuditID, "error", err)
		return cause
	}
	b.unhide(op.key)
	return cause
}

// landed looks whether the version that r was sent for is there. It is the newest,
// or there is none newer than the one that it was to replace, or the list tells.
func (b *Broker) landed(ctx context.Context, s *snapshot, r record) (vault.Properties, bool, error) {
	same := func(p vault.Properties) bool {
		found := newVersion(p).record
		return found.made == r.made && found.epoch == r.epoch
	}
	newest, _, err := b.vault.Get(ctx, s.key, "")
	switch {
	case err == nil && same(newest):
		return newest, true, nil
	case err == nil && newest.Version == s.current.Version, errors.Is(err, vault.ErrNotFound):
		return vault.Properties{}, false, nil
	case err != nil && !errors.Is(err, vault.ErrDisabled):
		return vault.Properties{}, false, err
	}
	all, err := b.vault.Versions(ctx, s.key)
	if errors.Is(err, vault.ErrNotFound) {
		return vault.Properties{}, false, nil
	}
	at := slices.IndexFunc(all, same)
	if err != nil || at < 0 {
		return vault.Properties{}, false, err
	}
	return all[at], true, nil
}

// encode writes r into tags, beside those that others put on the current version.
func (b *Broker) encode(r record, s *snapshot) vault.Tags {
	tags, dropped := r.tags(s.key, s.current.Tags)
	if len(dropped) > 0 {
		b.log.Warn("tags of others were not carried over: a version bears at most 15", "key", s.key.String(), "tags", dropped)
	}
	return tags
}

// redo gives the result of a put or rotate that was done already: the metadata
// of its version as it stands now.
func (b *Broker) redo(ctx context.Context, s *snapshot, d done, value secret.Value) (version, error) {
	v, ok, err := b.find(ctx, s, d.version)
	if err != nil {
		return version{}, withCommit(vaultError(ctx, s.key, err), secret.Applied)
	}
	if !ok {
		// Of a deleted secret the vault shows the newest version alone.
		v.Key, v.Version = s.key, d.version
	}
	if value.IsEmpty() || s.state == Deleted || !v.Enabled {
		return v, nil // there is nothing to compare, or the vault no longer gives it
	}
	stored := s.value
	if v.Version != s.current.Version {
		if _, stored, err = b.vault.Get(ctx, s.key, v.Version); err != nil {
			return version{}, withCommit(vaultError(ctx, s.key, err), secret.Applied)
		}
	}
	if !stored.Equal(value) {
		return version{}, errRequestIDReused(s.key)
	}
	return v, nil
}

// matches judges must_match_version against the current version. A write that was
// sent twice may have made two versions: they are one to a caller.
func (b *Broker) matches(ctx context.Context, s *snapshot, mustMatch string) error {
	there := s.state != Absent && s.state != Deleted
	if mustMatch == "" || there && mustMatch == s.current.Version {
		return nil
	}
	if there && s.current.made.id != "" {
		v, ok, err := b.find(ctx, s, mustMatch)
		if err != nil {
			return err
		}
		if ok && v.made == s.current.made && v.epoch == s.current.epoch {
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
