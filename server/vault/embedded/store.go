// Package embedded keeps secrets in one encrypted file, with the semantics of
// Azure Key Vault: for developers' machines and for small installations.
//
// The file is a bbolt database. Values in it are sealed with a key that is in a
// file of its own; names, tags and times are readable. Every answer to a write is
// given after an fsync. One process at a time has the store.
package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/tink-crypto/tink-go/v2/tink"
	"go.etcd.io/bbolt"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// DefaultRetention is how long a deleted secret can be recovered, as in Key Vault.
const DefaultRetention = 90 * 24 * time.Hour

// Config is what Open needs.
type Config struct {
	// Dir is the folder of store.db, required. It is made, 0700, when missing.
	Dir string
	// KeyFile is the path of the key, a Tink keyset in JSON. Empty is store.key in
	// Dir. It is made, 0600, when neither it nor the store exists; its folder is
	// not.
	KeyFile string
	// Retention is the time from soft delete to purge. Zero is DefaultRetention.
	Retention time.Duration
	// Now is the clock of the secrets' times; nil is time.Now.
	Now func() time.Time
	// Logger is told what no caller sees; nil is slog.Default.
	Logger *slog.Logger
}

// Store implements vault.Vault.
type Store struct {
	path      string
	aead      tink.AEAD
	retention time.Duration
	now       func() time.Time
	log       *slog.Logger

	db         *bbolt.DB
	file       *os.File // that db uses
	info       os.FileInfo
	metas      []byte      // our own map of the file's first two pages; see alive
	dead       atomic.Bool // bbolt's locks are held for ever
	logDamage  sync.Once
	stopSweeps context.CancelFunc
	sweeper    sync.WaitGroup
	close      func() error

	committer
}

var _ vault.Vault = (*Store)(nil)

// Open opens the store in cfg.Dir, or makes one when there is none. It checks the
// whole file first: a store that is damaged, cut off, of a newer format, of
// another key or in use by another process is an error, and stays as it is.
func Open(cfg Config) (*Store, error) {
	s := &Store{
		path:      filepath.Join(cfg.Dir, storeName),
		retention: cfg.Retention,
		now:       cfg.Now,
		log:       cfg.Logger,
	}
	switch {
	case cfg.Dir == "":
		return nil, errors.New("embedded store: a folder is required")
	case cfg.Retention < 0:
		return nil, errors.New("embedded store: the retention is negative")
	case cfg.Retention == 0:
		s.retention = DefaultRetention
	}
	keyPath := cfg.KeyFile
	if keyPath == "" {
		keyPath = filepath.Join(cfg.Dir, keyName)
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.log == nil {
		s.log = slog.Default()
	}

	var err error
	if s.aead, err = prepare(cfg.Dir, s.path, keyPath, s.log); err != nil {
		return nil, fmt.Errorf("embedded store: %w", err)
	}
	if err := s.openFile(keyPath); err != nil {
		return nil, fmt.Errorf("embedded store: %w", err)
	}

	s.committer.init()
	ctx, cancel := context.WithCancel(context.Background())
	s.stopSweeps = cancel
	s.sweeper.Go(func() { s.sweepHourly(ctx) })
	s.close = sync.OnceValue(s.shutDown)
	return s, nil
}

// Close waits for the calls under way. It may be called again, and then gives the
// same result.
func (s *Store) Close() error { return s.close() }

func (s *Store) shutDown() error {
	s.stopSweeps()
	s.sweeper.Wait()
	s.committer.stop()
	if s.stuck || s.dead.Load() {
		// bbolt's own Close would wait for ever for the broken transaction. The
		// lock goes with the file, the memory map with the process.
		s.dead.Store(true)
		return s.file.Close()
	}
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("embedded store: closing %s: %w", s.path, err)
	}
	return nil
}

// Info names the store's file.
func (s *Store) Info() vault.Info {
	return vault.Info{Name: "embedded", Location: slog.String("path", s.path)}
}

// Check reports whether secrets can be read, and whether the file that is open is
// still the one that has the store's name. It does not say that there is space
// for writes.
func (s *Store) Check(ctx context.Context) error {
	return s.view(ctx, func(tx *bbolt.Tx) error {
		if _, err := unseal(tableMeta, metaCheck, tx.Bucket([]byte(tableMeta)).Get(metaCheck)); err != nil {
			return err
		}
		now, err := os.Stat(s.path)
		if err != nil || !os.SameFile(now, s.info) {
			return s.unavailable(errors.New("the file was moved away or replaced while in use"))
		}
		return nil
	})
}

// Set stores a new version. Many at once share one commit.
func (s *Store) Set(ctx context.Context, key secret.Key, v vault.NewVersion) (vault.Properties, error) {
	name, err := nameOf(ctx, key)
	if err != nil {
		return vault.Properties{}, err
	}
	if err := v.Tags.Check(); err != nil {
		return vault.Properties{}, err
	}
	r := record{version: uuid.New(), enabled: true, attrs: encodeAttrs(v.ContentType, v.Tags)}
	p, err := r.properties(key)
	if err != nil {
		return vault.Properties{}, err
	}
	plain := []byte(v.Value.Reveal())
	r.sealed, err = s.aead.Encrypt(plain, valueContext(key, p.Version))
	clear(plain)
	if err != nil {
		return vault.Properties{}, fmt.Errorf("embedded store: sealing: %w", err)
	}

	err = s.change(ctx, func(w *writer) error {
		deleted, wasDeleted, err := w.deleted.get(name)
		if err != nil {
			return err
		}
		old, replaces, err := w.live.get(name)
		if err != nil {
			return err
		}
		switch {
		case wasDeleted && !deleted.purged(w.now):
			return vault.ErrDeleted
		case wasDeleted:
			w.purge(name)
		case replaces:
			w.versions.put(olderKey(name, old.version), old)
		}
		r.created = w.now.Unix()
		w.live.put(name, r)
		w.changed = true
		return nil
	})
	p.Created = time.Unix(r.created, 0).UTC()
	return orZero(p, err)
}

// Get reads and opens one version.
func (s *Store) Get(ctx context.Context, key secret.Key, version string) (vault.Properties, secret.Value, error) {
	var p vault.Properties
	var v secret.Value
	name, err := nameOf(ctx, key)
	if err != nil {
		return p, v, err
	}
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		_, _, r, err := find(tx, name, version)
		if err != nil {
			return err
		}
		if !r.enabled {
			return vault.ErrDisabled
		}
		if p, err = r.properties(key); err != nil {
			return err
		}
		plain, err := s.aead.Decrypt(r.sealed, valueContext(key, p.Version))
		if err != nil {
			return errSealed
		}
		v = secret.NewValue(string(plain))
		clear(plain)
		return nil
	})
	if err != nil {
		return vault.Properties{}, secret.Value{}, err
	}
	return p, v, nil
}

// Update rewrites the attributes of one version; its value is not opened.
func (s *Store) Update(ctx context.Context, key secret.Key, version string, patch vault.Patch) (vault.Properties, error) {
	name, err := nameOf(ctx, key)
	if err != nil {
		return vault.Properties{}, err
	}
	if err := patch.Tags.Check(); err != nil {
		return vault.Properties{}, err
	}
	var p vault.Properties
	err = s.change(ctx, func(w *writer) error {
		t, at, r, err := find(w.tx, name, version)
		if err != nil {
			return err
		}
		contentType, _, err := decodeAttrs(r.attrs)
		if err != nil {
			return err
		}
		r.enabled = patch.Enabled
		r.attrs = encodeAttrs(contentType, patch.Tags)
		if p, err = r.properties(key); err != nil {
			return err
		}
		t.put(at, r)
		w.changed = true
		return nil
	})
	return orZero(p, err)
}

// Delete moves the name to the deleted ones. Its older versions stay where they
// are.
func (s *Store) Delete(ctx context.Context, key secret.Key) (vault.Deleted, error) {
	name, err := nameOf(ctx, key)
	if err != nil {
		return vault.Deleted{}, err
	}
	var d vault.Deleted
	err = s.change(ctx, func(w *writer) error {
		r, ok, err := w.live.get(name)
		if err != nil {
			return err
		}
		if !ok {
			return vault.ErrNotFound
		}
		r.deleted = w.now.Unix()
		purge := w.now.Add(s.retention)
		if r.purge = purge.Unix(); purge.Nanosecond() > 0 {
			r.purge++ // never sooner than promised
		}
		if d, err = r.deletedProperties(key); err != nil {
			return err
		}
		w.deleted.put(name, r)
		w.live.delete(name)
		w.changed = true
		return nil
	})
	return orZero(d, err)
}

// GetDeleted reads a deleted name.
func (s *Store) GetDeleted(ctx context.Context, key secret.Key) (vault.Deleted, error) {
	name, err := nameOf(ctx, key)
	if err != nil {
		return vault.Deleted{}, err
	}
	var d vault.Deleted
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		r, ok, err := openTable(tx, tableDeleted).get(name)
		if err != nil {
			return err
		}
		if !ok || r.purged(s.now()) {
			return vault.ErrNotFound
		}
		d, err = r.deletedProperties(key)
		return err
	})
	return orZero(d, err)
}

// Recover moves the name back.
func (s *Store) Recover(ctx context.Context, key secret.Key) error {
	name, err := nameOf(ctx, key)
	if err != nil {
		return err
	}
	return s.change(ctx, func(w *writer) error {
		r, ok, err := w.deleted.get(name)
		if err != nil {
			return err
		}
		if !ok || r.purged(w.now) {
			return vault.ErrNotFound
		}
		r.deleted, r.purge = 0, 0
		w.live.put(name, r)
		w.deleted.delete(name)
		w.changed = true
		return nil
	})
}

// Settle has nothing to wait for: there is no state between.
func (s *Store) Settle(ctx context.Context, key secret.Key) error {
	name, err := nameOf(ctx, key)
	if err != nil {
		return err
	}
	return s.view(ctx, func(tx *bbolt.Tx) error {
		if _, ok, err := openTable(tx, tableLive).get(name); err != nil || ok {
			return err
		}
		if r, ok, err := openTable(tx, tableDeleted).get(name); err != nil || ok && !r.purged(s.now()) {
			return err
		}
		return vault.ErrNotFound
	})
}

// change is write for the calls of others.
func (s *Store) change(ctx context.Context, fn func(w *writer) error) error {
	if err := vault.BeginEffect(ctx); err != nil {
		return err
	}
	return s.write(ctx, fn)
}

// find looks for a version of a live name, the newest when version is empty, and
// says where it stands.
func find(tx *bbolt.Tx, name []byte, version string) (table, []byte, record, error) {
	live := openTable(tx, tableLive)
	r, ok, err := live.get(name)
	if err != nil {
		return table{}, nil, record{}, err
	}
	if !ok {
		return table{}, nil, record{}, vault.ErrNotFound
	}
	if version == "" {
		return live, name, r, nil
	}
	id, ok := parseVersion(version)
	if !ok {
		return table{}, nil, record{}, vault.ErrNotFound
	}
	if id == r.version {
		return live, name, r, nil
	}
	older, at := openTable(tx, tableVersions), olderKey(name, id)
	if r, ok, err = older.get(at); err == nil && !ok {
		err = vault.ErrNotFound
	}
	return older, at, r, err
}

// errSealed: the checksum of a record holds and its value does not open, which no
// accident does.
var errSealed = errors.New("a sealed value does not open: it was tampered with")

// view runs fn in a read transaction. fn gives an error of package vault, or what
// is wrong with the store.
func (s *Store) view(ctx context.Context, fn func(tx *bbolt.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.unsettled.Load() {
		// What a read would see may not be on disk. Any commit puts it there.
		if err := s.write(ctx, func(*writer) error { return nil }); ctx.Err() != nil {
			return ctx.Err()
		} else if err != nil {
			return s.unavailable(errors.New("the last commit is not known to be on disk"))
		}
	}
	return s.classify(s.read(fn))
}

// read runs fn in a read transaction.
func (s *Store) read(fn func(tx *bbolt.Tx) error) error {
	if err := guard(s.alive); err != nil {
		return err
	}
	var begun bool
	err := guard(func() error {
		return s.db.View(func(tx *bbolt.Tx) error {
			begun = true
			return fn(tx)
		})
	})
	if !begun && errors.Is(err, errPanic) {
		s.dead.Store(true)
	}
	return err
}

// nameOf is the key's name in the tables, after the look at the context with
// which every method begins.
func nameOf(ctx context.Context, key secret.Key) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if key == (secret.Key{}) {
		return nil, errors.New("embedded store: the zero key names no secret")
	}
	return []byte(key.String()), nil
}

// orZero gives no result beside an error.
func orZero[T any](result T, err error) (T, error) {
	if err != nil {
		var zero T
		return zero, err
	}
	return result, nil
}
