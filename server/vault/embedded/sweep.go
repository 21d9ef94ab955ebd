package embedded

import (
	"bytes"
	"context"
	"time"

	"go.etcd.io/bbolt"
)

const (
	sweepEvery = time.Hour
	// sweepBatch bounds how long other writes wait for a sweep.
	sweepBatch = 256
)

// sweepHourly removes what is past its purge time, at once and then every hour.
// No caller depends on it: such names are absent already.
func (s *Store) sweepHourly(ctx context.Context) {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		if err := s.sweep(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("purged secrets could not be removed from the store; tried again in an hour", "path", s.path, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (s *Store) sweep(ctx context.Context) error {
	for {
		names, err := s.expired(ctx)
		if err != nil || len(names) == 0 {
			return err
		}
		err = s.write(ctx, func(w *writer) error {
			for _, name := range names {
				r, ok, err := w.deleted.get(name)
				if err != nil {
					return err
				}
				if ok && r.purged(w.now) { // not, when it was set anew meanwhile
					w.purge(name)
					w.changed = true
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
}

// expired gives the first names that are to be removed.
func (s *Store) expired(ctx context.Context) (names [][]byte, err error) {
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		now := s.now()
		t := openTable(tx, tableDeleted)
		c := t.bucket.Cursor()
		for name, data := c.First(); name != nil && len(names) < sweepBatch; name, data = c.Next() {
			r, err := decodeRecord(t.name, name, data)
			if err != nil {
				return err
			}
			if r.purged(now) {
				names = append(names, bytes.Clone(name))
			}
		}
		return nil
	})
	return names, err
}

// purge removes a deleted name and all of its versions.
func (w *writer) purge(name []byte) {
	prefix := olderPrefix(name)
	var keys [][]byte // gathered first: a cursor does not survive deletes
	c := w.versions.bucket.Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		keys = append(keys, bytes.Clone(k))
	}
	for _, k := range keys {
		w.versions.delete(k)
	}
	w.deleted.delete(name)
}
