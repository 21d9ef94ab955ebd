package embedded

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"

	"github.com/exto/secrets-broker/server/vault"
)

// committer is the one that writes: a goroutine that takes whatever waits,
// applies it in one transaction and answers each. Nobody waits for company, and
// all who came during a commit share the next one.
type committer struct {
	mu      sync.Mutex
	arrived sync.Cond
	queue   []*write // bounded by its callers: each waits for its own
	closing bool

	// unsettled: a commit failed so late that readers see it although it may not
	// be on disk. The next commit that succeeds puts it there.
	unsettled atomic.Bool

	// Of the committer's goroutine, and of shutDown after it has ended:

	commitTx func(*bbolt.Tx) error
	broken   error // set for good when bbolt's state in memory can't be trusted
	stuck    bool  // a transaction could not be ended
	failing  bool  // the last commit failed, and the log knows
}

func (c *committer) init() {
	c.arrived.L = &c.mu
	c.commitTx = (*bbolt.Tx).Commit
}

// stop makes the goroutine end once the queue is empty.
func (c *committer) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closing = true
	c.arrived.Signal()
}

// write is one caller's change.
type write struct {
	// apply makes the change, or gives an error of package vault and leaves all as
	// it is. It reads before it writes. It may run again in another transaction.
	apply func(*writer) error
	err   error
	done  chan error
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
	w := &write{apply: apply, done: make(chan error, 1)}
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return s.unavailable(errClosed)
	}
	s.queue = append(s.queue, w)
	s.arrived.Signal()
	s.mu.Unlock()
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
	}
	s.mu.Lock()
	at := slices.Index(s.queue, w)
	if at >= 0 {
		s.queue = slices.Delete(s.queue, at, at+1)
	}
	s.mu.Unlock()
	if at >= 0 {
		return ctx.Err()
	}
	return <-w.done
}

func (s *Store) commitQueue() {
	for {
		s.mu.Lock()
		for len(s.queue) == 0 && !s.closing {
			s.arrived.Wait()
		}
		batch := s.queue
		s.queue = nil
		s.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		s.commit(batch)
	}
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
	var tx *bbolt.Tx
	err = guard(func() (err error) {
		tx, err = s.db.Begin(true)
		return err
	})
	if err != nil {
		if errors.Is(err, errPanic) {
			s.breakDown(err, tx)
		}
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

// rollback ends a transaction of which nothing was written.
func (s *Store) rollback(tx *bbolt.Tx) {
	if err := guard(tx.Rollback); errors.Is(err, errPanic) {
		s.breakDown(err, nil)
	}
}

// finish commits. Its error says whether the changes were made: bbolt writes the
// pages, syncs, writes the meta page that refers to them, and syncs again. Until
// the meta page is written nothing has happened.
func (s *Store) finish(tx *bbolt.Tx) error {
	id := tx.ID()
	err := guard(func() error { return s.commitTx(tx) })
	if err == nil {
		s.settled()
		return nil
	}
	if errors.Is(err, errPanic) {
		s.breakDown(err, tx)
	}
	err = s.classify(err)
	s.failed(err)
	switch seen, verr := s.lastCommit(); {
	case verr == nil && seen < id:
		return err
	case verr == nil && s.broken == nil && s.barrier() == nil:
		s.settled()
		return nil
	}
	s.unsettled.Store(true)
	return vault.Uncertain(err)
}

// lastCommit is the id of the last transaction that readers see.
func (s *Store) lastCommit() (id int, err error) {
	if s.stuck {
		return 0, s.broken
	}
	err = guard(func() error {
		return s.db.View(func(tx *bbolt.Tx) error {
			id = tx.ID()
			return nil
		})
	})
	return id, err
}

// barrier commits nothing new. The pages of the commit before were synced before
// its meta page was written, and this one's meta page refers to them too: after
// it both are on disk.
func (s *Store) barrier() error {
	var tx *bbolt.Tx
	err := guard(func() (err error) {
		if tx, err = s.db.Begin(true); err != nil {
			return err
		}
		return s.commitTx(tx)
	})
	if errors.Is(err, errPanic) {
		s.breakDown(err, tx)
	}
	return err
}

// breakDown ends all writing for the life of the process: after a panic bbolt has
// not cleaned up, and its free list in memory may be wrong. Reads go on if they
// can; the next start checks the file. tx is ended if it can be; nil is one of
// which only its lock remains.
func (s *Store) breakDown(cause error, tx *bbolt.Tx) {
	if tx == nil || errors.Is(guard(tx.Rollback), errPanic) {
		s.stuck = true
	}
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

func (s *Store) settled() {
	s.unsettled.Store(false)
	if s.failing {
		s.failing = false
		s.log.Info("the secret store commits again", "path", s.path)
	}
}
