package embedded_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"go.etcd.io/bbolt"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/embedded"
)

// wantNotApplied: the write did not happen, and the error says so without the
// value.
func wantNotApplied(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, vault.ErrUnavailable) || vault.IsUncertain(err) {
		t.Fatalf("got %v, want a certain ErrUnavailable", err)
	}
	if !strings.Contains(err.Error(), "store.db") || strings.Contains(err.Error(), "canary") {
		t.Fatalf("got %q, want the store's path and no value", err)
	}
}

// wantSound closes the store and has its file checked by Open and by bbolt.
func wantSound(t *testing.T, s *embedded.Store, dir string) {
	t.Helper()
	closeStore(t, s)
	closeStore(t, open(t, embedded.Config{Dir: dir}))
	db, err := bbolt.Open(filepath.Join(dir, "store.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	err = db.View(func(tx *bbolt.Tx) error {
		for err := range tx.Check() {
			t.Errorf("bbolt: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// fillUp sets until the store takes no more, and gives what it took.
func fillUp(t *testing.T, s *embedded.Store, prefix string) []secret.Key {
	t.Helper()
	var stored []secret.Key
	for n := range 100_000 {
		key := newKey(t, fmt.Sprintf("%s%d", prefix, n))
		_, err := s.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("canary" + strings.Repeat("x", 20_000))})
		if err != nil {
			wantNotApplied(t, err)
			_, _, err = s.Get(t.Context(), key, "")
			wantError(t, err, vault.ErrNotFound)
			return stored
		}
		stored = append(stored, key)
	}
	t.Fatal("the disk never fills")
	return nil
}

func wantAll(t *testing.T, s *embedded.Store, keys []secret.Key) {
	t.Helper()
	for _, key := range keys {
		if _, _, err := s.Get(t.Context(), key, ""); err != nil {
			t.Fatalf("%s was stored: %v", key, err)
		}
	}
}

// fullDisk: writes fail for certain, reads go on, and with space again all is as
// it should be.
func fullDisk(t *testing.T, s *embedded.Store, dir string, freeSpace func()) {
	t.Helper()
	stored := fillUp(t, s, "first")
	for round := range 20 {
		stored = append(stored, fillUp(t, s, fmt.Sprintf("again%d-", round))...)
		wantAll(t, s, stored)
	}
	freeSpace()
	for n := range 20 {
		key := newKey(t, fmt.Sprint("later", n))
		set(t, s, key, strings.Repeat("y", 20_000))
		stored = append(stored, key)
		if n%2 == 0 { // pages that are freed and used again
			if _, err := s.Delete(t.Context(), stored[0]); err != nil {
				t.Fatal(err)
			}
			stored = stored[1:]
		}
	}
	wantAll(t, s, stored)
	wantSound(t, s, dir)
	wantAll(t, open(t, embedded.Config{Dir: dir}), stored)
}

func TestStoreCannotGrow(t *testing.T) {
	t.Parallel()
	cfg := embedded.Config{Dir: t.TempDir()}
	s := open(t, cfg)
	fill(t, s, 50)
	if err := s.LimitSize(1); err != nil {
		t.Fatal(err)
	}
	fullDisk(t, s, cfg.Dir, func() {
		if err := s.LimitSize(0); err != nil {
			t.Fatal(err)
		}
	})
}

// TestDiskFull is the same with a file system that is really full.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t)
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, embedded.Config{Dir: dir})
	fullDisk(t, s, dir, func() {
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
	})
}

func TestDiskFullFromTheStart(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t)
	ballast := filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	_ = f.Close()
	wantOpenError(t, embedded.Config{Dir: dir})
	wantOpenError(t, embedded.Config{Dir: dir})
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	s := open(t, embedded.Config{Dir: dir})
	set(t, s, newKey(t, "abc"), "x")
}

// smallDisk is a folder on a file system of a few megabytes.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := mountSmall(dir); err != nil {
		t.Skipf("no small file system to be had (TestStoreCannotGrow runs everywhere): %v", err)
	}
	t.Cleanup(func() {
		if err := unmount(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestCommitFails: a commit that fails before its meta page is written did not
// happen.
func TestCommitFails(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	cfg := embedded.Config{Dir: t.TempDir(), Logger: slog.New(slog.NewTextHandler(&log, nil))}
	s := open(t, cfg)
	key := newKey(t, "abc")
	p := set(t, s, key, "one")
	fails := true
	s.OnCommit(func(commit func() error) error {
		if fails {
			return fmt.Errorf("writing: %w", syscall.EIO)
		}
		return commit()
	})
	for range 3 {
		_, err := s.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("canary")})
		wantNotApplied(t, err)
		wantError(t, err, syscall.EIO)
		_, err = s.Delete(t.Context(), key)
		wantNotApplied(t, err)
	}
	if got, value, err := s.Get(t.Context(), key, ""); err != nil || got.Version != p.Version || value.Reveal() != "one" {
		t.Errorf("got %v, %v, want what was there before", got, err)
	}
	fails = false
	set(t, s, key, "two")
	set(t, s, key, "three")
	if got := strings.Count(log.String(), "cannot commit"); got != 1 {
		t.Errorf("the log tells %d times of the failure, want once", got)
	}
	if got := strings.Count(log.String(), "commits again"); got != 1 {
		t.Errorf("the log tells %d times of its end, want once", got)
	}
	if strings.Contains(log.String(), "canary") {
		t.Error("the log holds the value")
	}
	wantSound(t, s, cfg.Dir)
}

// TestCommitFailsLate: the last sync failed, so that the commit may or may not be
// on disk. Another commit puts it there for certain.
func TestCommitFailsLate(t *testing.T) {
	t.Parallel()
	cfg := embedded.Config{Dir: t.TempDir()}
	s := open(t, cfg)
	key := newKey(t, "abc")
	var fails int // so many commits
	s.OnCommit(func(commit func() error) error {
		err := commit()
		if fails > 0 {
			fails--
			return syscall.EIO
		}
		return err
	})
	fails = 1
	p := set(t, s, key, "one")
	wantGet := func(want string) {
		t.Helper()
		got, value, err := s.Get(t.Context(), key, "")
		if err != nil || value.Reveal() != want {
			t.Errorf("got %v, %v, want value %s", got, err, want)
		}
	}
	wantGet("one")

	// When that fails too, the outcome is open, and nobody is shown what may
	// vanish.
	fails = 3
	_, err := s.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("canary")})
	if !errors.Is(err, vault.ErrUnavailable) || !vault.IsUncertain(err) || strings.Contains(err.Error(), "canary") {
		t.Errorf("got %v, want an uncertain ErrUnavailable", err)
	}
	fails = 2
	_, _, err = s.Get(t.Context(), key, "")
	wantNotApplied(t, err)
	_, _, err = s.Get(t.Context(), key, p.Version)
	if err != nil {
		t.Errorf("once a commit succeeds: %v", err)
	}
	wantGet("canary")
	wantSound(t, s, cfg.Dir)
}

// TestRefusalNeedsACommit: a refusal that is due to a change in the same commit
// falls with it.
func TestRefusalNeedsACommit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, err := embedded.Open(embedded.Config{Dir: t.TempDir(), Logger: quiet})
		if err != nil {
			t.Fatal(err)
		}
		defer closeStore(t, s)
		key := newKey(t, "abc")
		set(t, s, key, "one")
		release := make(chan struct{})
		var commits int
		s.OnCommit(func(commit func() error) error {
			switch commits++; commits {
			case 1:
				<-release
				return commit()
			case 2:
				return syscall.ENOSPC
			default:
				return commit()
			}
		})
		errs := make(chan error, 3)
		go func() {
			_, err := s.Set(t.Context(), newKey(t, "other"), vault.NewVersion{})
			errs <- err
		}()
		synctest.Wait() // in the first commit
		for range 2 {
			go func() {
				_, err := s.Delete(t.Context(), key)
				errs <- err
			}()
		}
		synctest.Wait() // in the queue
		close(release)
		if err := <-errs; err != nil {
			t.Errorf("the first commit: %v", err)
		}
		for range 2 {
			wantNotApplied(t, <-errs)
		}
		if _, _, err := s.Get(t.Context(), key, ""); err != nil {
			t.Errorf("the secret is live: %v", err)
		}
	})
}

// TestPanicInAChange: it is that change's error alone.
func TestPanicInAChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		var log bytes.Buffer
		s, err := embedded.Open(embedded.Config{Dir: dir, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		release := make(chan struct{})
		var commits int
		s.OnCommit(func(commit func() error) error {
			if commits++; commits == 1 {
				<-release
			}
			return commit()
		})
		errs, broken := make(chan error, 10), make(chan error, 2)
		for n := range 10 {
			go func() {
				_, err := s.Set(t.Context(), newKey(t, fmt.Sprint("i", n)), vault.NewVersion{Value: secret.NewValue("x")})
				errs <- err
			}()
			if synctest.Wait(); n%5 == 2 {
				go func() { broken <- s.Break() }()
				synctest.Wait()
			}
		}
		close(release)
		for range 10 {
			if err := <-errs; err != nil {
				t.Errorf("a sound change: %v", err)
			}
		}
		for range 2 {
			wantNotApplied(t, <-broken)
		}
		for n := range 10 {
			if _, _, err := s.Get(t.Context(), newKey(t, fmt.Sprint("i", n)), ""); err != nil {
				t.Error(err)
			}
		}
		if got := strings.Count(log.String(), "damaged"); got != 1 {
			t.Errorf("the log tells %d times of the damage, want once", got)
		}
		closeStore(t, s)
		s, err = embedded.Open(embedded.Config{Dir: dir, Logger: quiet})
		if err != nil {
			t.Fatal(err)
		}
		closeStore(t, s)
	})
}

// TestPanicInACommit: no more writes after it, but reads, and a Close that ends.
func TestPanicInACommit(t *testing.T) {
	t.Parallel()
	for _, late := range []bool{false, true} {
		dir := t.TempDir()
		s := open(t, embedded.Config{Dir: dir})
		key, other := newKey(t, "abc"), newKey(t, "other")
		set(t, s, key, "one")
		s.OnCommit(func(commit func() error) error {
			if late {
				if err := commit(); err != nil {
					return err
				}
			}
			panic("page 7 already freed")
		})
		_, err := s.Set(t.Context(), other, vault.NewVersion{Value: secret.NewValue("x")})
		if !errors.Is(err, vault.ErrUnavailable) || vault.IsUncertain(err) != late {
			t.Errorf("got %v, want ErrUnavailable, uncertain %v", err, late)
		}
		_, err = s.Set(t.Context(), other, vault.NewVersion{Value: secret.NewValue("x")})
		wantNotApplied(t, err)
		_, value, err := s.Get(t.Context(), key, "")
		if late {
			wantNotApplied(t, err) // what is visible may not be on disk
		} else if err != nil || value.Reveal() != "one" {
			t.Errorf("a read afterwards: %v", err)
		}
		wantSound(t, s, dir)
	}
}

// TestFileCutWhileOpen: memory that is mapped and has no file below it is a fault
// when touched. It is an error of the call, not the end of the process, nor a call
// that never ends.
func TestFileCutWhileOpen(t *testing.T) {
	notRacing(t)
	t.Parallel()
	for _, pages := range []int{0, 1, 2, 3} {
		dir := t.TempDir()
		s := open(t, embedded.Config{Dir: dir})
		fill(t, s, 300)
		key := newKey(t, "i0100")
		if err := os.Truncate(filepath.Join(dir, "store.db"), int64(pages*os.Getpagesize())); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			_, _, err := s.Get(t.Context(), key, "")
			wantNotApplied(t, err)
			_, err = s.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("canary")})
			wantNotApplied(t, err)
			_, err = s.List(t.Context(), "", 10)
			wantNotApplied(t, err)
			wantNotApplied(t, s.Check(t.Context()))
		}
		closeStore(t, s)
	}
}

// TestFileWrittenOver: somebody copies a backup over the store that is in use.
// Nothing is written to it then, so that the backup is still one.
func TestFileWrittenOver(t *testing.T) {
	t.Parallel()
	cfg := embedded.Config{Dir: t.TempDir()}
	path := filepath.Join(cfg.Dir, "store.db")
	s := open(t, cfg)
	fill(t, s, 20)
	closeStore(t, s)
	backup, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s = open(t, cfg)
	key := newKey(t, "later")
	set(t, s, key, "one")
	set(t, s, key, "two")
	if err := os.WriteFile(path, backup, 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_, err = s.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("canary")})
		wantNotApplied(t, err)
	}
	closeStore(t, s)
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, backup) {
		t.Errorf("the backup was written to, error %v", err)
	}
	s = open(t, cfg)
	_, _, err = s.Get(t.Context(), key, "")
	wantError(t, err, vault.ErrNotFound)
}
