package broker

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// Journal keeps beyond the process what one call is about to change and what became
// of it. Its methods are called one at a time.
type Journal interface {
	// Intend is called before the first request is sent that changes the vault, and
	// again where the secret turns out to be in another state than the intent says.
	// It returns when a crash cannot lose the intent; after an error nothing is sent.
	// It blocks until ctx ends at most.
	Intend(ctx context.Context, i Intent) error
	// Ended is called once after an Intend, when the write is over. An error, when
	// that could not be kept, refuses the caller the answer.
	Ended(ctx context.Context, o Outcome) error
	// Settled is called once after an Ended with Unknown, unless the process ends
	// before: now it is known whether the write was applied.
	Settled(ctx context.Context, applied bool)
	// Replayed is called when the answer is that of an earlier call with this id.
	Replayed()
}

// Action is what a write does, as the journal names it.
type Action string

// The actions. Repair is the broker's own: it puts down a version that came late.
const (
	ActionPut     Action = "put"
	ActionRotate  Action = "rotate"
	ActionDelete  Action = "delete"
	ActionRecover Action = "recover"
	ActionRepair  Action = "repair"
)

var (
	letterOf = map[Action]byte{
		ActionPut: versions.LetterPut, ActionRotate: versions.LetterRotate, ActionDelete: versions.LetterDelete, ActionRecover: versions.LetterRecover, ActionRepair: versions.LetterPut,
	}
	actionOf = map[byte]Action{
		versions.LetterPut: ActionPut, versions.LetterRotate: ActionRotate, versions.LetterDelete: ActionDelete, versions.LetterRecover: ActionRecover,
	}
)

// Intent is a write that is about to change the vault.
type Intent struct {
	Action      Action
	Key         secret.Key
	OperationID string
	// Version is the current one that the write found, and Deleted that somebody else
	// than the broker had deleted the secret then: the vault alone does not tell a
	// write that was cut off from somebody's recover.
	Version string
	Deleted bool
}

// Outcome is what became of a write.
type Outcome struct {
	// Err is an *Error, nil when the write was applied.
	Err error
	// Version and Generation are of what the write made; empty where it made nothing.
	Version    string
	Generation int64
}

// errUnrecorded refuses what cannot be recorded.
func errUnrecorded(key secret.Key, cause error) *Error {
	e := refuse(key, secret.AuditUnavailable, "the broker cannot write its audit log, and does nothing unrecorded; try again, and see its operator")
	e.cause = cause
	return e
}

// noJournal is that of calls without.
type noJournal struct{}

func (noJournal) Intend(context.Context, Intent) error { return nil }
func (noJournal) Ended(context.Context, Outcome) error { return nil }
func (noJournal) Settled(context.Context, bool)        {}
func (noJournal) Replayed()                            {}

// recordTimeout bounds what a write waits for its outcome to be recorded when its
// caller is gone.
const recordTimeout = 5 * time.Second

// effect is called before each request that changes the vault. ctx is the caller's:
// as long as nothing was sent, its end ends the write.
func (op *operation) effect(ctx context.Context) error {
	if op.phase.Load() == started {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
		defer cancel()
	}
	if i := op.found; !op.settles && (op.intended == nil || *op.intended != i) {
		if err := op.Journal.Intend(ctx, i); err != nil {
			if ctx.Err() != nil {
				return ctx.Err() // it was not waited for
			}
			return errUnrecorded(op.key, err)
		}
		op.intended = &i
		if op.phase.Load() != started && ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return op.begin()
}

// recordEnd tells the journal what became of the write, and gives what the caller is told.
func (b *Broker) recordEnd(ctx context.Context, op *operation, err error) error {
	if op.intended == nil {
		return err
	}
	if told := (*Error)(nil); errors.As(err, &told) && told.Commit == secret.Unknown {
		defer b.settleLater(op)
	}
	o := Outcome{Err: err, Version: op.wrote.Version, Generation: op.wrote.Generation}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	if unrecorded := op.Journal.Ended(ctx, o); unrecorded != nil && err == nil {
		e := errUnrecorded(op.key, unrecorded)
		e.Message = "it was done, but the broker cannot write so into its audit log, and gives no answer unrecorded; the same request id tells the outcome later"
		return withCommit(e, secret.Applied)
	}
	return err
}

// Unfinished is a write that was intended, and of which is not known what became of it.
type Unfinished struct {
	Call   Call
	Intent Intent
}

// mostSettling is how many unfinished writes are looked at together: they share the
// vault's budget with the calls.
const mostSettling = 8

// mayArriveEvery is how often it is looked again for a write that the vault may still
// commit. One that does not within pendingFor was not applied.
const mayArriveEvery = time.Minute

// Settle finds out what became of writes, and ends by the rules of Delete, Put and
// Recover what was left half done. It calls done for each when that is known, perhaps
// for several at a time, and returns when all are or ctx ends. A vault that keeps nothing
// knows of none, nor does this release of an action that it does not have.
func (b *Broker) Settle(ctx context.Context, writes []Unfinished, done func(n int, applied bool)) {
	var left []int
	for n, w := range writes {
		if letterOf[w.Intent.Action] != 0 && !b.discards {
			left = append(left, n)
		}
	}
	// Those that cannot be settled now wait for the next round, and hold up no others.
	for pauses := vault.NewPauses(firstPause, longestPause); len(left) > 0; {
		var again []int
		var arriving int // of them
		var mu sync.Mutex
		var group errgroup.Group
		group.SetLimit(mostSettling)
		for _, n := range left {
			group.Go(func() error {
				if applied, err := b.settleOne(ctx, writes[n]); err == nil {
					done(n, applied)
				} else {
					mu.Lock()
					defer mu.Unlock()
					again = append(again, n)
					if errors.Is(err, errMayArrive) {
						arriving++
					}
				}
				return nil
			})
		}
		_ = group.Wait()
		left = again
		switch {
		case len(left) == 0 || b.stopped.Err() != nil:
			return
		case arriving == len(left):
			// Nothing tells but time.
			select {
			case <-time.After(mayArriveEvery):
			case <-ctx.Done():
				return
			case <-b.stopped.Done():
				return
			}
		case !vault.Pause(ctx, b.wait, pauses.NextBackOff()):
			return
		}
	}
}

func (b *Broker) settleOne(ctx context.Context, w Unfinished) (applied bool, err error) {
	op := newOperation(w.Call, w.Intent.Key, letterOf[w.Intent.Action], w.Intent.OperationID)
	op.depth, op.settles = whole, true
	applied, err = do(b, ctx, op, func(ctx context.Context) (bool, error) { return b.finish(ctx, op, w.Intent) })
	if told := (*Error)(nil); errors.As(err, &told) && told.Reason == secret.RequestIDReused {
		return false, nil // another write has the id
	}
	return applied, err
}

// errMayArrive keeps a write unfinished that the vault may still commit.
var errMayArrive = errors.New("the write may still arrive")

// finish ends a write that was cut off.
func (b *Broker) finish(ctx context.Context, op *operation, i Intent) (applied bool, err error) {
	s, base, replay, err := b.prepare(ctx, op)
	if err != nil {
		return false, err
	}
	if s.state == Deleted && s.live {
		if err := b.finishDelete(ctx, op, s); err != nil {
			return false, err
		}
	}
	switch {
	case replay != nil, i.Action == ActionRepair:
		return true, nil
	case i.Action == ActionRecover && i.Deleted && (s.state == Active || s.state == Disabled) && s.current.Version == i.Version:
		// The vault's own recover came through, which nothing else undoes.
		_, err := b.unmark(ctx, op, s, base)
		return err == nil, err
	case b.mayStillApply(op.key, op.id):
		return false, errMayArrive
	}
	return false, nil
}

// Hide keeps what an open intent of another process may have brought back to life from
// being served until it is settled. It is called before the first read.
func (b *Broker) Hide(i Intent, at time.Time) {
	if i.Deleted && i.Version != "" && (i.Action == ActionPut || i.Action == ActionRotate) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.hidden[i.Key] = hiddenVersion{version: i.Version, deletedAt: at}
		b.hidings++
	}
}

// settleLater finds out in the background what became of a write of unknown outcome.
func (b *Broker) settleLater(op *operation) {
	if !b.background() {
		return // the next start does
	}
	go func() {
		defer b.loads.Done()
		b.Settle(b.stopped, []Unfinished{{op.Call, *op.intended}}, func(_ int, applied bool) { op.Journal.Settled(b.stopped, applied) })
	}()
}
