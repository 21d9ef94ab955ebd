package embedded_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"
	"go.uber.org/goleak"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/embedded"
	"github.com/exto/secrets-broker/server/vault/vaulttest"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerDir); dir != "" {
		writeForEver(dir)
	}
	goleak.VerifyTestMain(m)
}

var quiet = slog.New(slog.DiscardHandler)

func open(t *testing.T, cfg embedded.Config) *embedded.Store {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = quiet
	}
	s, err := embedded.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

func closeStore(t *testing.T, s *embedded.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// wantOpenError opens what can't be opened, and wants each of the words in the
// error.
func wantOpenError(t *testing.T, cfg embedded.Config, words ...string) {
	t.Helper()
	cfg.Logger = quiet
	s, err := embedded.Open(cfg)
	if err == nil {
		closeStore(t, s)
		t.Fatalf("opened, want an error with %q", words)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("got error %q, want %q in it", err, word)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("got error %q, want one line", err)
	}
}

func newKey(t testing.TB, id string) secret.Key {
	t.Helper()
	instance, err := secret.ParseInstanceID(id)
	if err != nil {
		t.Fatal(err)
	}
	key, err := secret.NewKey(instance, secret.DatabaseURI)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func set(t testing.TB, s *embedded.Store, key secret.Key, value string) vault.Properties {
	t.Helper()
	p, err := s.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue(value), ContentType: "text/plain", Tags: vault.Tags{"tag": value[:1]}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

// fill stores something of everything: older versions, disabled ones, deleted
// names.
func fill(t *testing.T, s *embedded.Store, names int) {
	t.Helper()
	for n := range names {
		key := newKey(t, fmt.Sprintf("i%04d", n))
		for v := range n%3 + 1 {
			p := set(t, s, key, fmt.Sprintf("%d of %s %s", v, key, strings.Repeat("x", n*7%300)))
			if n%5 == 1 {
				if _, err := s.Update(t.Context(), key, p.Version, vault.Patch{Tags: vault.Tags{"disabled": "yes"}}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if n%7 == 2 {
			if _, err := s.Delete(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// snapshot reads all that a store gives, the deleted names by recovering them.
func snapshot(ctx context.Context, s *embedded.Store) (map[string]string, error) {
	all := map[string]string{}
	for skip := ""; ; {
		page, err := s.ListDeleted(ctx, skip, 100)
		if err != nil {
			return nil, err
		}
		for _, d := range page.Deleted {
			all["deleted "+d.Key.String()] = fmt.Sprint(d.DeletedAt, d.PurgeAt)
			got, err := s.GetDeleted(ctx, d.Key)
			if err != nil {
				return nil, err
			}
			if err := s.Recover(ctx, d.Key); err != nil {
				return nil, err
			}
			all["newest "+d.Key.String()] = fmt.Sprint(got)
		}
		if skip = page.Next; skip == "" {
			break
		}
	}
	for skip := ""; ; {
		page, err := s.List(ctx, skip, 100)
		if err != nil {
			return nil, err
		}
		for _, p := range page.Live {
			versions, err := s.Versions(ctx, p.Key)
			if err != nil {
				return nil, err
			}
			for _, p := range versions {
				_, value, err := s.Get(ctx, p.Key, p.Version)
				if err != nil && !errors.Is(err, vault.ErrDisabled) {
					return nil, err
				}
				all[p.Key.String()+" "+p.Version] = fmt.Sprint(p, value.Reveal())
			}
			newest, _, err := s.Get(ctx, p.Key, "")
			if err != nil && !errors.Is(err, vault.ErrDisabled) {
				return nil, err
			}
			all["current "+p.Key.String()] = newest.Version
		}
		if skip = page.Next; skip == "" {
			break
		}
	}
	for key := range all {
		if name, ok := strings.CutPrefix(key, "deleted "); ok {
			k, err := secret.ParseKey(name)
			if err != nil {
				return nil, err
			}
			if _, err := s.Delete(ctx, k); err != nil {
				return nil, err
			}
		}
	}
	return all, nil
}

// clock stands still until it is moved.
type clock struct{ at atomic.Pointer[time.Time] }

func newClock() *clock {
	var c clock
	c.set(time.Date(2026, 1, 2, 3, 4, 5, 600_000_000, time.UTC))
	return &c
}

func (c *clock) now() time.Time   { return *c.at.Load() }
func (c *clock) set(at time.Time) { c.at.Store(&at) }

func TestConformance(t *testing.T) {
	t.Parallel()
	vaulttest.Run(t, func(t *testing.T) vault.Vault { return open(t, embedded.Config{Dir: t.TempDir()}) })
}

func TestReopenKeepsEverything(t *testing.T) {
	t.Parallel()
	cfg := embedded.Config{Dir: filepath.Join(t.TempDir(), "made", "too"), Now: newClock().now}
	s := open(t, cfg)
	fill(t, s, 100)
	before, err := snapshot(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)
	closeStore(t, s) // again is nothing
	s = open(t, cfg)
	after, err := snapshot(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(before, after) {
		t.Errorf("got %d entries after, %d before, or others", len(after), len(before))
	}
	if want := slog.String("path", filepath.Join(cfg.Dir, "store.db")); !s.Info().Location.Equal(want) || s.Info().Name != "embedded" {
		t.Errorf("got %v, want %v", s.Info(), want)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	wantOpenError(t, embedded.Config{}, "folder")
	wantOpenError(t, embedded.Config{Dir: t.TempDir(), Retention: -1}, "retention")
	s := open(t, embedded.Config{Dir: t.TempDir()})
	_, err := s.Set(t.Context(), secret.Key{}, vault.NewVersion{})
	if err == nil {
		t.Error("the zero key can be set")
	}
	if _, err := s.List(t.Context(), "", 0); err == nil {
		t.Error("pages of nothing can be listed")
	}
}

// TestValuesAreNotOnDisk looks for a value in every form that it could leak in.
func TestValuesAreNotOnDisk(t *testing.T) {
	t.Parallel()
	const canary = "canary-7d1f0a-do-not-store-me"
	cfg := embedded.Config{Dir: t.TempDir()}
	s := open(t, cfg)
	key := newKey(t, "abc")
	set(t, s, key, canary)
	set(t, s, key, "postgres://u:"+canary+"@h/")
	if _, err := s.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)
	forms := [][]byte{[]byte(canary), []byte(hex.EncodeToString([]byte(canary)))}
	for offset := range 3 { // of the value within base64's groups of three
		encoded := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", offset) + canary))
		forms = append(forms, []byte(encoded[4:len(encoded)-4]))
	}
	err := filepath.WalkDir(cfg.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		for _, form := range forms {
			if bytes.Contains(data, form) {
				t.Errorf("%s holds the value as %s", path, form)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSwappedValuesDoNotOpen moves sealed values to other records, with sound
// checksums.
func TestSwappedValuesDoNotOpen(t *testing.T) {
	t.Parallel()
	cfg := embedded.Config{Dir: t.TempDir()}
	s := open(t, cfg)
	a, b := newKey(t, "a"), newKey(t, "b")
	set(t, s, a, "of a")
	set(t, s, b, "of b, which shall not be read as a's")
	closeStore(t, s)
	path := filepath.Join(cfg.Dir, "store.db")
	var ofB []byte
	err := embedded.Rewrite(path, "live", b.String(), func(content []byte) []byte {
		ofB = bytes.Clone(embedded.Sealed(content))
		return content
	})
	if err != nil {
		t.Fatal(err)
	}
	err = embedded.Rewrite(path, "live", a.String(), func(content []byte) []byte {
		return append(content[:len(content)-len(embedded.Sealed(content))], ofB...)
	})
	if err != nil {
		t.Fatal(err)
	}
	s = open(t, cfg)
	_, value, err := s.Get(t.Context(), a, "")
	wantError(t, err, vault.ErrUnavailable)
	if !value.IsEmpty() {
		t.Error("a value was given")
	}
	if _, value, err := s.Get(t.Context(), b, ""); err != nil || !strings.HasPrefix(value.Reveal(), "of b") {
		t.Errorf("the untouched value: got %v", err)
	}
}

func TestPurge(t *testing.T) {
	t.Parallel()
	c := newClock()
	start := c.now()
	s := open(t, embedded.Config{Dir: t.TempDir(), Retention: 24 * time.Hour, Now: c.now})
	key, ctx := newKey(t, "abc"), t.Context()
	first := set(t, s, key, "one")
	if want := start.Truncate(time.Second); !first.Created.Equal(want) {
		t.Errorf("got created %v, want %v", first.Created, want)
	}
	set(t, s, key, "two")
	d, err := s.Delete(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	if !d.DeletedAt.Equal(start.Truncate(time.Second)) {
		t.Errorf("got deleted at %v, want %v", d.DeletedAt, start)
	}
	if left := d.PurgeAt.Sub(start); left < 24*time.Hour || left >= 24*time.Hour+time.Second {
		t.Errorf("got purge at %v, want a day after %v", d.PurgeAt, start)
	}

	c.set(d.PurgeAt.Add(-time.Nanosecond))
	if _, err := s.GetDeleted(ctx, key); err != nil {
		t.Errorf("just before the purge: %v", err)
	}
	_, err = s.Set(ctx, key, vault.NewVersion{})
	wantError(t, err, vault.ErrDeleted)

	c.set(d.PurgeAt)
	_, err = s.GetDeleted(ctx, key)
	wantError(t, err, vault.ErrNotFound)
	wantError(t, s.Recover(ctx, key), vault.ErrNotFound)
	_, err = s.Delete(ctx, key)
	wantError(t, err, vault.ErrNotFound)
	_, _, err = s.Get(ctx, key, first.Version)
	wantError(t, err, vault.ErrNotFound)
	if page, err := s.ListDeleted(ctx, "", 10); err != nil || len(page.Deleted) != 0 || page.Next != "" {
		t.Errorf("got %v, %v, want an empty list", page, err)
	}

	// The name is a new secret, without the versions of the old one.
	p := set(t, s, key, "three")
	versions, err := s.Versions(ctx, key)
	if err != nil || len(versions) != 1 || versions[0].Version != p.Version {
		t.Errorf("got %v, %v, want the new version alone", versions, err)
	}
	_, _, err = s.Get(ctx, key, first.Version)
	wantError(t, err, vault.ErrNotFound)
	if _, err := s.Delete(ctx, key); err != nil {
		t.Fatal(err)
	}
	if err := s.Recover(ctx, key); err != nil {
		t.Fatal(err)
	}
}

// records counts what is in the tables of a store that is closed.
func records(t *testing.T, dir string) map[string]int {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(dir, "store.db"), 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	n := map[string]int{}
	err = db.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(_, _ []byte) error {
				n[string(name)]++
				return nil
			})
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestSweep: what is past its purge leaves the file, hourly and at open.
func TestSweep(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cfg := embedded.Config{Dir: t.TempDir(), Retention: 90 * time.Minute, Logger: quiet}
		openInBubble := func() *embedded.Store {
			s, err := embedded.Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // for the sweep at open
			return s
		}
		remove := func(s *embedded.Store, names int, prefix string) {
			for n := range names {
				key := newKey(t, fmt.Sprint(prefix, n))
				set(t, s, key, "one")
				set(t, s, key, "two")
				if _, err := s.Delete(t.Context(), key); err != nil {
					t.Fatal(err)
				}
			}
		}
		want := func(when string, live, deleted, versions int) {
			t.Helper()
			got := records(t, cfg.Dir)
			if got["live"] != live || got["deleted"] != deleted || got["versions"] != versions {
				t.Errorf("%s: got %v, want %d live, %d deleted, %d versions", when, got, live, deleted, versions)
			}
		}
		s := openInBubble()
		remove(s, 600, "old")
		set(t, s, newKey(t, "kept"), "one")
		set(t, s, newKey(t, "kept"), "two")
		time.Sleep(time.Hour)
		synctest.Wait()
		closeStore(t, s)
		want("an hour later", 1, 600, 601)

		s = openInBubble()
		time.Sleep(time.Hour)
		synctest.Wait()
		remove(s, 3, "new")
		closeStore(t, s)
		want("two hours later", 1, 3, 4)

		time.Sleep(2 * time.Hour)
		s = openInBubble()
		closeStore(t, s)
		want("at open", 1, 0, 1)
	})
}

// TestWithdrawn: a caller that gives up while it waits is told that nothing
// happened, and nothing has.
func TestWithdrawn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, err := embedded.Open(embedded.Config{Dir: t.TempDir(), Logger: quiet})
		if err != nil {
			t.Fatal(err)
		}
		defer closeStore(t, s)
		entered, release := make(chan struct{}), make(chan struct{})
		var first atomic.Bool
		s.OnCommit(func(commit func() error) error {
			if first.CompareAndSwap(false, true) {
				close(entered)
				<-release
			}
			return commit()
		})
		ctx, cancel := context.WithCancel(t.Context())
		results := map[string]chan error{"taken": make(chan error, 1), "waits": make(chan error, 1), "gives up": make(chan error, 1)}
		start := func(name, id string, ctx context.Context) {
			key := newKey(t, id)
			go func() {
				_, err := s.Set(ctx, key, vault.NewVersion{Value: secret.NewValue("x")})
				results[name] <- err
			}()
			synctest.Wait()
		}
		start("taken", "a", ctx)
		<-entered
		start("gives up", "b", ctx)
		start("waits", "c", t.Context())
		cancel()
		synctest.Wait()
		select {
		case err := <-results["gives up"]:
			wantError(t, err, context.Canceled)
			if vault.IsUncertain(err) {
				t.Error("the withdrawn write is uncertain")
			}
		default:
			t.Error("the withdrawn write still waits")
		}
		close(release)
		// The one that was taken has its outcome, though its context is over.
		for _, name := range []string{"taken", "waits"} {
			if err := <-results[name]; err != nil {
				t.Errorf("the write that is %s: %v", name, err)
			}
		}
		for id, want := range map[string]error{"a": nil, "b": vault.ErrNotFound, "c": nil} {
			_, _, err := s.Get(t.Context(), newKey(t, id), "")
			wantError(t, err, want)
		}
	})
}

// TestGivingUp has many callers that give up at any moment, also when it would
// have been their turn to write.
func TestGivingUp(t *testing.T) {
	t.Parallel()
	cfg := embedded.Config{Dir: t.TempDir()}
	s := open(t, cfg)
	var wg sync.WaitGroup
	for caller := range 16 {
		wg.Go(func() {
			for n := range 30 {
				key := newKey(t, fmt.Sprintf("c%d-%d", caller, n))
				ctx, cancel := context.WithCancel(t.Context())
				go cancel()
				_, err := s.Set(ctx, key, vault.NewVersion{Value: secret.NewValue("x")})
				if err != nil && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				if _, _, got := s.Get(t.Context(), key, ""); (err == nil) != (got == nil) {
					t.Errorf("Set gave %v and Get gives %v", err, got)
				}
			}
		})
	}
	wg.Wait()
}

// TestCloseWaits: the calls under way end well, those after are refused, and
// nothing is lost.
func TestCloseWaits(t *testing.T) {
	t.Parallel()
	cfg := embedded.Config{Dir: t.TempDir()}
	s := open(t, cfg)
	var stored sync.Map
	var wg sync.WaitGroup
	begun := make(chan struct{}, 32)
	for caller := range 8 {
		wg.Go(func() {
			for n := 0; ; n++ {
				key := newKey(t, fmt.Sprintf("c%d-%d", caller, n))
				if _, err := s.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("x")}); err != nil {
					wantError(t, err, vault.ErrUnavailable)
					if vault.IsUncertain(err) {
						t.Error("a refused write is uncertain")
					}
					return
				}
				stored.Store(key, true)
				if n == 3 {
					begun <- struct{}{}
				}
				_, _, _ = s.Get(t.Context(), key, "")
			}
		})
	}
	for range 8 {
		<-begun
	}
	var closers sync.WaitGroup
	for range 3 {
		closers.Go(func() { closeStore(t, s) })
	}
	closers.Wait()
	wg.Wait()
	s = open(t, cfg)
	stored.Range(func(key, _ any) bool {
		if _, _, err := s.Get(t.Context(), key.(secret.Key), ""); err != nil {
			t.Errorf("%s was stored: %v", key, err)
		}
		return true
	})
}

func TestCheckSeesThatTheFileIsGone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, embedded.Config{Dir: dir})
	path := filepath.Join(dir, "store.db")
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	wantError(t, s.Check(t.Context()), vault.ErrUnavailable)
	if err := os.WriteFile(path, []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(t, s.Check(t.Context()), vault.ErrUnavailable)
	if err := os.Rename(path+".moved", path); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestSkipOfTheOtherList(t *testing.T) {
	t.Parallel()
	s := open(t, embedded.Config{Dir: t.TempDir()})
	set(t, s, newKey(t, "a"), "x")
	set(t, s, newKey(t, "b"), "x")
	page, err := s.List(t.Context(), "", 1)
	if err != nil || page.Next == "" {
		t.Fatalf("got %v, %v, want a page with a next one", page, err)
	}
	_, err = s.ListDeleted(t.Context(), page.Next, 1)
	wantError(t, err, vault.ErrSkip)
	if got := page.Live[0].Key; got != newKey(t, "a") {
		t.Errorf("got %s first, want the order of names", got)
	}
}
