package embedded

import (
	"context"
	"os"

	"go.etcd.io/bbolt"
)

// OnCommit puts hook around every commit from now on; commit is the real one. A
// hook that fails without it leaves nothing behind, as bbolt's does.
func (s *Store) OnCommit(hook func(commit func() error) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commitTx = func(tx *bbolt.Tx) error {
		err := hook(tx.Commit)
		if err != nil && tx.DB() != nil {
			_ = tx.Rollback()
		}
		return err
	}
}

// LimitSize lets the file grow no more, as a full disk does; 0 ends it.
func (s *Store) LimitSize(bytes int) error {
	return s.write(context.Background(), func(w *writer) error {
		w.tx.DB().MaxSize = bytes
		return nil
	})
}

// Break has bbolt panic in a change.
func (s *Store) Break() error {
	return s.write(context.Background(), func(w *writer) error {
		w.changed = true
		panic("page 7 already freed")
	})
}

// VerifyBytes is the check of Open.
func VerifyBytes(data []byte) error {
	return guard(func() error { return (&image{data: data}).verify(&contents{}) })
}

// Rewrite changes the content of a record in a store that is closed, as somebody
// would who knows its format but not its key.
func Rewrite(path, tableName, key string, change func(content []byte) []byte) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	db, err := bbolt.Open(path, 0o600, boltOptions(file))
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	return db.Update(func(tx *bbolt.Tx) error {
		t := openTable(tx, tableName)
		old := t.bucket.Get([]byte(key))
		content, err := unseal(tableName, []byte(key), old)
		if err != nil {
			return err
		}
		data := seal(tableName, []byte(key), change(append([]byte(nil), content...)))
		sum := t.bucket.Sequence() - tally(old) + tally(data)
		if err := t.bucket.Put([]byte(key), data); err != nil {
			return err
		}
		return t.bucket.SetSequence(sum)
	})
}

// Sealed is the encrypted value within a record's content.
func Sealed(content []byte) []byte {
	_, sealed, _ := cutBytes(content[recordHeader:])
	return sealed
}
