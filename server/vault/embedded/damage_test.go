package embedded_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/exto/secrets-broker/internal/race"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/embedded"
)

// stored is a store of everything, its file, and what it gives.
type stored struct {
	cfg  embedded.Config
	path string
	data []byte // as far as it is in use
	want map[string]string
}

// notRacing leaves a test out under the race detector in which one damage comes after the
// other.
func notRacing(t *testing.T) {
	t.Helper()
	if race.Enabled {
		t.Skip("one after the other: there is nothing to race")
	}
}

func newStored(t *testing.T, names int) stored {
	t.Helper()
	st := stored{cfg: embedded.Config{Dir: t.TempDir(), Now: newClock().now, Logger: quiet}}
	st.path = filepath.Join(st.cfg.Dir, "store.db")
	s := open(t, st.cfg)
	fill(t, s, names)
	var err error
	if st.want, err = snapshot(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)
	if st.data, err = os.ReadFile(st.path); err != nil {
		t.Fatal(err)
	}
	// bbolt makes the file larger than it need be; the second meta or the first
	// is the newer.
	pages := max(binary.LittleEndian.Uint64(st.data[16+40:]), binary.LittleEndian.Uint64(st.data[os.Getpagesize()+16+40:]))
	st.data = st.data[:pages*uint64(os.Getpagesize())]
	return st
}

// try opens a damaged copy and reads all of it. Whatever it gives must be right.
// It reports whether the store opened.
func (st stored) try(t *testing.T, what string, data []byte) bool {
	t.Helper()
	cfg := st.cfg
	cfg.Dir = t.TempDir()
	cfg.KeyFile = filepath.Join(st.cfg.Dir, "store.key")
	path := filepath.Join(cfg.Dir, "store.db")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := embedded.Open(cfg)
	if err != nil {
		if !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got error %q, want the file named", what, err)
		}
		after, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(after, data) {
			t.Errorf("%s: the file was changed, error %v", what, err)
		}
		return false
	}
	defer closeStore(t, s)
	got, err := snapshot(t.Context(), s)
	if err != nil {
		wantError(t, err, vault.ErrUnavailable)
	} else if !maps.Equal(got, st.want) {
		t.Errorf("%s: the store opens and gives something else", what)
	}
	return true
}

func TestTruncated(t *testing.T) {
	t.Parallel()
	st := newStored(t, 60)
	page := os.Getpagesize()
	sizes := []int{0, 1, 15, 16, 79, 80, 1024, page - 1, page, page + 1, page + 79, 2*page - 1, 2 * page, 3 * page}
	for size := 4 * page; size < len(st.data); size += page * 7 / 2 {
		sizes = append(sizes, size)
	}
	sizes = append(sizes, len(st.data)-page, len(st.data)-1)
	for _, size := range sizes {
		if st.try(t, fmt.Sprint("cut to ", size), st.data[:size]) {
			t.Errorf("cut to %d of %d bytes, it opens", size, len(st.data))
		}
	}
	if !st.try(t, "whole", st.data) {
		t.Error("the whole file does not open")
	}
}

// TestZeroed clears each page, and each half of one.
func TestZeroed(t *testing.T) {
	notRacing(t)
	t.Parallel()
	st := newStored(t, 60)
	half := os.Getpagesize() / 2
	for at := 0; at < len(st.data); at += half {
		for _, n := range []int{half, 2 * half} {
			if n > half && at%n != 0 {
				continue
			}
			data := bytes.Clone(st.data)
			clear(data[at : at+n])
			st.try(t, fmt.Sprintf("zeros in %d to %d", at, at+n), data)
		}
	}
}

// TestSwappedPages gives each page the content of another.
func TestSwappedPages(t *testing.T) {
	t.Parallel()
	st := newStored(t, 60)
	page := os.Getpagesize()
	for from := 0; from < len(st.data); from += page {
		to := (from + page) % len(st.data)
		data := bytes.Clone(st.data)
		copy(data[to:to+page], st.data[from:])
		st.try(t, fmt.Sprintf("page %d over %d", from/page, to/page), data)
	}
}

// TestFlippedBits flips one bit of every byte, and every bit of the pages' and
// elements' headers. What the check lets pass must be bits that mean nothing: a
// store with all of those flipped together still gives all that was stored.
func TestFlippedBits(t *testing.T) {
	notRacing(t)
	t.Parallel()
	st := newStored(t, 60)
	rng := rand.New(rand.NewPCG(1, 2))
	harmless := bytes.Clone(st.data)
	var tried, passed int
	for at := range st.data {
		if at%5 > 0 && at%os.Getpagesize() >= 256 {
			continue // a part of the bodies stands for all: this takes a while
		}
		bits := []int{rng.IntN(8)}
		if at%os.Getpagesize() < 256 {
			bits = []int{0, 1, 2, 3, 4, 5, 6, 7}
		}
		for _, bit := range bits {
			tried++
			st.data[at] ^= 1 << bit
			if embedded.VerifyBytes(st.data) == nil {
				harmless[at] ^= 1 << bit
				passed++
			}
			st.data[at] ^= 1 << bit
		}
	}
	if passed == 0 || passed > tried*3/4 { // most of what passes is in free pages
		t.Errorf("%d of %d flips passed: this test is broken", passed, tried)
	}
	if !st.try(t, "all harmless flips", harmless) {
		t.Errorf("flips that are harmless one by one are not so together: %v", embedded.VerifyBytes(harmless))
	}
	// And some through the front door.
	for range 200 {
		at, bit := rng.IntN(len(st.data)), rng.IntN(8)
		data := bytes.Clone(st.data)
		data[at] ^= 1 << bit
		st.try(t, fmt.Sprintf("bit %d of byte %d", bit, at), data)
	}
}

// TestDamagedWhileOpen writes over pages that bbolt has mapped. No read may say
// that a secret is not there, or give another value.
func TestDamagedWhileOpen(t *testing.T) {
	t.Parallel()
	st := newStored(t, 60)
	page := os.Getpagesize()
	for at := 2 * page; at < len(st.data); at += page {
		var log bytes.Buffer
		cfg := st.cfg
		cfg.Dir = t.TempDir()
		cfg.KeyFile = filepath.Join(st.cfg.Dir, "store.key")
		cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
		path := filepath.Join(cfg.Dir, "store.db")
		if err := os.WriteFile(path, st.data, 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, cfg)
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(make([]byte, page), int64(at)); err != nil {
			t.Fatal(err)
		}
		_ = file.Close()
		for n := range 60 {
			if n%7 == 2 { // deleted
				continue
			}
			key := newKey(t, fmt.Sprintf("i%04d", n))
			p, _, err := s.Get(t.Context(), key, "")
			switch {
			case err == nil:
				if p.Version != st.want["current "+key.String()] {
					t.Errorf("page %d: got another version of %s", at/page, key)
				}
			case errors.Is(err, vault.ErrDisabled) && n%5 == 1:
			default:
				wantError(t, err, vault.ErrUnavailable)
			}
			if _, err := s.Set(t.Context(), key, vault.NewVersion{}); err != nil {
				wantError(t, err, vault.ErrUnavailable)
				break // a store that may refuse all writes from here on
			}
		}
		closeStore(t, s)
		if got := strings.Count(log.String(), "damaged"); got > 1 {
			t.Errorf("the log tells %d times of the damage, want once", got)
		}
	}
}

func TestNotAStore(t *testing.T) {
	t.Parallel()
	st := newStored(t, 1)
	for name, content := range map[string][]byte{
		"empty":   {},
		"text":    []byte("hello"),
		"zeros":   make([]byte, 1<<16),
		"garbage": bytes.Repeat([]byte("garbage "), 1<<13),
	} {
		if st.try(t, name, content) {
			t.Errorf("%s: opened as a store", name)
		}
	}
	cfg := embedded.Config{Dir: t.TempDir(), KeyFile: filepath.Join(st.cfg.Dir, "store.key")}
	if err := os.Mkdir(filepath.Join(cfg.Dir, "store.db"), 0o700); err != nil {
		t.Fatal(err)
	}
	wantOpenError(t, cfg, "store.db")
}

func TestNewerFormat(t *testing.T) {
	t.Parallel()
	st := newStored(t, 1)
	if err := embedded.Rewrite(st.path, "meta", "format", func([]byte) []byte { return []byte{2} }); err != nil {
		t.Fatal(err)
	}
	wantOpenError(t, st.cfg, st.path, "format 2", "newer broker")
}

func TestKeyFile(t *testing.T) {
	t.Parallel()
	elsewhere := t.TempDir()
	for name, keyFile := range map[string]string{"in the folder": "", "elsewhere": filepath.Join(elsewhere, "broker.json")} {
		var log bytes.Buffer
		cfg := embedded.Config{Dir: t.TempDir(), KeyFile: keyFile, Logger: slog.New(slog.NewTextHandler(&log, nil))}
		s := open(t, cfg)
		set(t, s, newKey(t, "abc"), "x")
		closeStore(t, s)
		path := keyFile
		if path == "" {
			path = filepath.Join(cfg.Dir, "store.key")
		}
		for _, file := range []string{path, filepath.Join(cfg.Dir, "store.db")} {
			if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s: %s: got %v, %v, want 0600", name, file, info, err)
			}
		}
		entries, err := os.ReadDir(cfg.Dir)
		if want := map[bool]int{true: 2, false: 1}[keyFile == ""]; err != nil || len(entries) != want {
			t.Errorf("%s: got %v, %v, want %d files", name, entries, err, want)
		}
		if strings.Contains(log.String(), "other users") {
			t.Errorf("%s: a warning of our own key file", name)
		}

		// Readable by others: a warning, no more.
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		closeStore(t, open(t, cfg))
		if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "other users") {
			t.Errorf("%s: no warning of a key file that others can read", name)
		}

		key, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		// Missing: an error, and no new key.
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		wantOpenError(t, cfg, "store.db", path, "missing")
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s: a new key was made", name)
		}
		// Damaged: an error that quotes nothing of it.
		for _, damaged := range [][]byte{nil, []byte("canary"), key[:len(key)/2], bytes.Replace(key, []byte(`"value":"`), []byte(`"value":"!`), 1)} {
			if err := os.WriteFile(path, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			cfg := cfg
			cfg.Logger = quiet
			_, err := embedded.Open(cfg)
			if err == nil || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), "value") {
				t.Errorf("%s: got %v, want an error that names the file and quotes nothing", name, err)
			}
		}
		// Another one: an error that names both.
		other := embedded.Config{Dir: t.TempDir()}
		closeStore(t, open(t, other))
		another, err := os.ReadFile(filepath.Join(other.Dir, "store.key"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, another, 0o600); err != nil {
			t.Fatal(err)
		}
		wantOpenError(t, cfg, "store.db", path, "another store")
		if err := os.WriteFile(path, key, 0o600); err != nil {
			t.Fatal(err)
		}
		s = open(t, cfg)
		if _, _, err := s.Get(t.Context(), newKey(t, "abc"), ""); err != nil {
			t.Error(err)
		}
	}
	wantOpenError(t, embedded.Config{Dir: t.TempDir(), KeyFile: filepath.Join(elsewhere, "no", "such", "folder", "key")}, "no such file")
}

// TestKeyComesFirst: a crash between the key and the store leaves a key, which is
// then the store's.
func TestKeyComesFirst(t *testing.T) {
	t.Parallel()
	st := newStored(t, 1)
	key, err := os.ReadFile(filepath.Join(st.cfg.Dir, "store.key"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := embedded.Config{Dir: t.TempDir()}
	path := filepath.Join(cfg.Dir, "store.key")
	if err := os.WriteFile(path, key, 0o600); err != nil {
		t.Fatal(err)
	}
	// Leftovers of the crash, among them a store that has its name already.
	for _, name := range []string{"store.db.tmp-1", "store.key.tmp-2"} {
		if err := os.WriteFile(filepath.Join(cfg.Dir, name), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"store.db.backup", "notes"} {
		if err := os.WriteFile(filepath.Join(cfg.Dir, name), []byte("kept"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, cfg)
	set(t, s, newKey(t, "abc"), "x")
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, key) {
		t.Errorf("the key was replaced, error %v", err)
	}
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil || len(entries) != 4 {
		t.Errorf("got %v, %v, want the key, the store and the two files of somebody else", entries, err)
	}
}

func TestOneProcess(t *testing.T) {
	t.Parallel()
	cfg := embedded.Config{Dir: t.TempDir()}
	s := open(t, cfg)
	wantOpenError(t, cfg, filepath.Join(cfg.Dir, "store.db"), "another process")
	set(t, s, newKey(t, "abc"), "x")
	closeStore(t, s)
	closeStore(t, open(t, cfg))
}

// TestFirstStartTwice: several first starts at once make one key and one store,
// and one of them has it.
func TestFirstStartTwice(t *testing.T) {
	t.Parallel()
	cfg := embedded.Config{Dir: t.TempDir(), Logger: quiet}
	var mu sync.Mutex
	var opened []*embedded.Store
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			s, err := embedded.Open(cfg)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				opened = append(opened, s)
			} else if !strings.Contains(err.Error(), "another process") {
				t.Errorf("got %v", err)
			}
		})
	}
	wg.Wait()
	if len(opened) != 1 {
		t.Fatalf("%d opened it, want one", len(opened))
	}
	set(t, opened[0], newKey(t, "abc"), "x")
	closeStore(t, opened[0])
	s := open(t, cfg)
	if _, _, err := s.Get(t.Context(), newKey(t, "abc"), ""); err != nil {
		t.Error(err)
	}
}

// writerDir has the test binary write to a store until it is killed.
const writerDir = "EMBEDDED_TEST_WRITER_DIR"

// writeForEver prints the name and version of all that was stored.
func writeForEver(dir string) {
	s, err := embedded.Open(embedded.Config{Dir: dir, Logger: quiet})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	start := time.Now().UnixNano()
	for caller := range 8 {
		go func() {
			for n := 0; ; n++ {
				id, err := secret.ParseInstanceID(fmt.Sprintf("k%x-%d-%d", start, caller, n/3))
				if err != nil {
					panic(err)
				}
				key, err := secret.NewKey(id, secret.OIDCClientSecret)
				if err != nil {
					panic(err)
				}
				v := vault.NewVersion{Value: secret.NewValue(strings.Repeat(key.String(), n%50+1))}
				p, err := s.Set(context.Background(), key, v)
				if err != nil {
					panic(err)
				}
				fmt.Println(key, p.Version)
			}
		}()
	}
	select {}
}

// TestKilled kills a process that writes, again and again. What it was told is
// stored, is there.
func TestKilled(t *testing.T) {
	t.Parallel()
	cfg := embedded.Config{Dir: t.TempDir()}
	told := map[string]string{} // version to name
	for round := range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), writerDir+"="+cfg.Dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			name, version, ok := strings.Cut(lines.Text(), " ")
			if !ok || len(version) != 32 {
				break // cut off by the kill, or an error
			}
			told[version] = name
			if n == 40*round {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait()
		s := open(t, cfg)
		for version, name := range told {
			key, err := secret.ParseKey(name)
			if err != nil {
				t.Fatal(err)
			}
			if _, value, err := s.Get(t.Context(), key, version); err != nil || !strings.HasPrefix(value.Reveal(), name) {
				t.Fatalf("round %d: %s was stored: %v", round, name, err)
			}
		}
		wantSound(t, s, cfg.Dir)
	}
	if len(told) < 100 {
		t.Errorf("%d writes in all: this test is broken", len(told))
	}
}

// TestCopiedWhileWritten: a copy that was made in the midst of commits is no
// state that the store was ever in. It opens as one that holds together, or not.
func TestCopiedWhileWritten(t *testing.T) {
	t.Parallel()
	st := newStored(t, 60)
	s := open(t, st.cfg)
	done := make(chan struct{})
	var writers sync.WaitGroup
	for caller := range 4 {
		writers.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				set(t, s, newKey(t, fmt.Sprintf("w%d-%d", caller, n%40)), strings.Repeat("x", n%500+1))
			}
		})
	}
	copies := 20
	if race.Enabled {
		copies = 4
	}
	for range copies {
		cfg := embedded.Config{Dir: t.TempDir(), KeyFile: filepath.Join(st.cfg.Dir, "store.key"), Now: st.cfg.Now, Logger: quiet}
		data, err := os.ReadFile(st.path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(cfg.Dir, "store.db"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		copied, err := embedded.Open(cfg)
		if err != nil {
			continue
		}
		got, err := snapshot(t.Context(), copied)
		if err != nil {
			t.Errorf("the copy opens and does not read: %v", err)
		}
		for what, want := range st.want {
			if !strings.HasPrefix(what, "deleted ") && got[what] != want {
				t.Errorf("the copy opens and has lost %s", what)
			}
		}
		closeStore(t, copied)
	}
	close(done)
	writers.Wait()
}
