package embedded

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"

	"github.com/exto/secrets-broker/server/vault"
)

// committer lets one caller at a time write: it takes whatever waits, its own
// change among it, applies all in one transaction and answers each. There is no
// timer and no goroutine between a caller and its commit: a lone one waits for
// nobody, and all who come during a commit share the next.
type committer struct {
	mu      sync.Mutex
	queue   []*write // bounded by its callers: each waits for its own
	busy    bool     // somebody writes, or was told to
	idle    sync.Cond
	closing bool

	// unsettled: a commit failed so late that readers see it although it may not
	// be on disk. The next commit that succeeds puts it there.
	unsettled atomic.Bool

	// Of the one that writes, and of shutDown when nobody does:

	commitTx func(*bbolt.Tx) error
	broken   error // set for good when bbolt's state in memory can't be trusted
	stuck    bool  // a transaction could not be ended
	failing  bool  // the last commit failed, and the log knows
	lastID   int   // of the last commit; 0 after one of unknown outcome
}

func (c *committer) init() {
	c.idle.L = &c.mu
	c.commitTx = (*bbolt.Tx).Commit
}

// stop refuses new changes and waits for those under way.
func (c *committer) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closing = true
	for c.busy {
		c.idle.Wait()
	}
}

// passOn makes the first in the queue the one that writes. The caller holds mu
// and writes no more.
func (c *committer) passOn() {
	c.busy = len(c.queue) > 0
	if !c.busy {
		c.idle.Broadcast()
		return
	}
	c.queue[0].leads = true
	close(c.queue[0].lead)
}

// write is one caller's change.
type write struct {
	// apply makes the change, or gives an error of package vault and leaves all as
	// it is. It reads before it writes. It may run again in another transaction.
	apply func(*writer) error
	err   error
	done  chan error
	lead  chan struct{} // closed when it is this caller's turn to write
	leads bool          // the same, under the committer's mu
}

// writer is the transaction of a commit.
type writer struct {
	tx       *bbolt.Tx
	live     table
	deleted  table
	versions table
	now      time.Time
	changed  bool
}

// write has apply committed and waits for it. A caller whose context ends while
// its change is still in the queue takes it out again; afterwards it waits, since
// only the outcome is an answer.
func (s *Store) write(ctx context.Context, apply func(*writer) error) error {
	w := &write{apply: apply, done: make(chan error, 1), lead: make(chan struct{})}
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return s.unavailable(errClosed)
	}
	s.queue = append(s.queue, w)
	if !s.busy {
		s.passOn()
	}
	s.mu.Unlock()
	select {
	case err := <-w.done:
		return err
	case <-w.lead:
	case <-ctx.Done():
		s.mu.Lock()
		at := slices.Index(s.queue, w)
		if at >= 0 {
			s.queue = slices.Delete(s.queue, at, at+1)
			if w.leads {
				s.passOn()
			}
		}
		s.mu.Unlock()
		if at >= 0 {
			return ctx.Err()
		}
		return <-w.done
	}
	// Those whom the last commit has just answered may come at once with their
	// next: let them run first if they can, the disk is what costs. With nobody
	// else about this takes no time.
	for range 4 {
		runtime.Gosched()
	}
	s.mu.Lock()
	batch := s.queue
	s.queue = nil
	s.mu.Unlock()
	s.commit(batch)
	s.mu.Lock()
	s.passOn()
	s.mu.Unlock()
	return <-w.done
}

// commit applies and answers a batch.
func (s *Store) commit(batch []*write) {
	err := s.broken
	for err == nil && len(batch) > 0 {
		culprit := -1
		culprit, err = s.attempt(batch)
		if culprit < 0 {
			break
		}
		// Nothing of the attempt remains. The others try again without it.
		batch[culprit].done <- err
		batch = slices.Delete(batch, culprit, culprit+1)
		err = s.broken
	}
	for _, w := range batch {
		switch {
		case err == nil:
			w.done <- w.err
		case w.err == nil:
			w.done <- err
		default:
			// Its refusal may be due to a change that was not committed, and is
			// no answer then. But it itself has changed nothing.
			w.done <- s.unavailable(errors.New("could not be decided: the commit of another change failed"))
		}
	}
}

// attempt applies the batch in one transaction and commits it. When one of the
// changes breaks, that one is the culprit, and nothing is committed.
func (s *Store) attempt(batch []*write) (culprit int, err error) {
	tx, err := s.begin()
	if err != nil {
		return -1, s.classify(err)
	}
	w := &writer{tx: tx, now: s.now()}
	for i, change := range batch {
		err := guard(func() error {
			if i == 0 {
				w.live, w.deleted, w.versions = openTable(tx, tableLive), openTable(tx, tableDeleted), openTable(tx, tableVersions)
			}
			change.err = change.apply(w)
			return nil
		})
		if err != nil {
			s.rollback(tx)
			return i, s.classify(err)
		}
		change.err = s.classify(change.err)
	}
	if !w.changed && !s.unsettled.Load() {
		s.rollback(tx)
		return -1, nil
	}
	return -1, s.finish(tx)
}

// begin starts a transaction. When the file is not as the last commit left it, or
// bbolt breaks, it is the last.
func (s *Store) begin() (tx *bbolt.Tx, err error) {
	if err := guard(s.alive); err != nil {
		s.breakDown(err, false)
		return nil, err
	}
	err = guard(func() (err error) {
		tx, err = s.db.Begin(true)
		return err
	})
	switch {
	case errors.Is(err, errPanic):
		s.dead.Store(true)
		s.breakDown(err, true)
	case err == nil && s.lastID != 0 && tx.ID() != s.lastID+1:
		// bbolt's list of free pages is of another file, so to speak.
		s.rollback(tx)
		err = fmt.Errorf("%w: the file was written over", errPanic)
		s.breakDown(err, false)
	}
	return tx, err
}

// rollback ends a transaction, whatever has become of it.
func (s *Store) rollback(tx *bbolt.Tx) {
	if err := guard(tx.Rollback); errors.Is(err, errPanic) {
		s.breakDown(err, true)
	}
}

// finish commits. Its error says whether the changes were made: bbolt writes the
// pages, syncs, writes the meta page that refers to them, and syncs again. Until
// the meta page is written nothing has happened.
func (s *Store) finish(tx *bbolt.Tx) error {
	id := tx.ID()
	err := guard(func() error { return s.commitTx(tx) })
	if err == nil {
		s.settled(id)
		return nil
	}
	if errors.Is(err, errPanic) {
		s.breakDown(err, false)
		s.rollback(tx)
	}
	err = s.classify(err)
	s.failed(err)
	var seen int
	verr := s.read(func(tx *bbolt.Tx) error {
		seen = tx.ID()
		return nil
	})
	if verr == nil && seen < id {
		return err
	}
	if verr == nil && s.broken == nil {
		// It is in the file and perhaps not on disk. Its pages were synced before
		// its meta page was written; a commit of nothing has a meta page that
		// refers to them too, and puts both on disk.
		s.lastID = id
		if tx, berr := s.begin(); berr == nil {
			if berr = guard(func() error { return s.commitTx(tx) }); berr == nil {
				s.settled(id + 1)
				return nil
			} else if errors.Is(berr, errPanic) {
				s.breakDown(berr, false)
				s.rollback(tx)
			}
		}
	}
	s.lastID = 0
	s.unsettled.Store(true)
	return vault.Uncertain(err)
}

// breakDown ends all writing for the life of the process: after a panic bbolt has
// not cleaned up, and its free list in memory may be wrong. Reads go on if they
// can; the next start checks the file.
func (s *Store) breakDown(cause error, stuck bool) {
	s.stuck = s.stuck || stuck
	if s.broken == nil {
		s.broken = s.unavailable(fmt.Errorf("no more writes until a restart: %w", cause))
	}
}

func (s *Store) failed(err error) {
	if !s.failing {
		s.failing = true
		s.log.Error("the secret store cannot commit", "path", s.path, "error", err)
	}
}

func (s *Store) settled(id int) {
	s.lastID = id
	s.unsettled.Store(false)
	if s.failing {
		s.failing = false
		s.log.Info("the secret store commits again", "path", s.path)
	}
}
