package fsync

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSync: what was written is on disk after a Sync, whether the kernel has
// asynchronous I/O or loses it, and many may sync at once.
func TestSync(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(*File){
		"asynchronous": func(*File) {},
		"refused from the first": func(d *File) {
			d.queue.close()
			d.queue = nil
		},
		"refused later": func(d *File) { d.queue.close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, err := os.CreateTemp("/var/tmp", "fsync-*") // where tests have their folders may be memory
			if err != nil {
				t.Fatal(err)
			}
			defer os.Remove(f.Name())
			d := Wrap(f)
			if d.queue != nil {
				prepare(d)
			}
			for round := range 3 {
				if _, err := d.Write(make([]byte, 64<<10)); err != nil {
					t.Fatal(err)
				}
				if n, known := dirty(t, f); known && n == 0 {
					t.Fatal("pages are clean before they are synced: this shows nothing")
				}
				var group sync.WaitGroup
				for range 4 {
					group.Go(func() {
						if err := d.Sync(); err != nil {
							t.Errorf("round %d: %v", round, err)
						}
					})
				}
				group.Wait()
				if n, _ := dirty(t, f); n > 0 {
					t.Errorf("round %d: %d pages are not on disk", round, n)
				}
			}
			if asynchronous := d.queue != nil; asynchronous != (offered() && name == "asynchronous") {
				t.Errorf("asynchronous is %v at the end", asynchronous)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			if err := d.Sync(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("synced after Close: %v", err)
			}
		})
	}
}

// faulty is a queue with an answer of its own.
type faulty struct {
	began  bool
	err    error
	closed chan struct{}
}

func (q *faulty) sync(uintptr) (began bool, err error) { return q.began, q.err }
func (q *faulty) close()                               { close(q.closed) }

// TestSyncThatFails is an error, and not tried again: the kernel would say that all is
// well the second time. Only what has not begun is done in another way.
func TestSyncThatFails(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		began     bool
		err, want error
	}{
		{true, unix.EIO, unix.EIO},
		{false, unix.EPERM, nil},
	} {
		f := mustCreate(t)
		q := &faulty{began: c.began, err: c.err, closed: make(chan struct{})}
		d := &File{File: f, queue: q}
		err := d.Sync()
		told := (*fs.PathError)(nil)
		if !errors.Is(err, c.want) || err != nil && (!errors.As(err, &told) || told.Path != f.Name()) {
			t.Errorf("got %v, want %v and the file's name", err, c.want)
		}
		<-q.closed
		if err := errors.Join(d.Sync(), d.Close()); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	}
	for result, want := range map[int64]error{0: nil, -int64(unix.ENOSPC): unix.ENOSPC} {
		if err := (&reply{result: result}).err(); err != want {
			t.Errorf("%d is %v, want %v", result, err, want)
		}
	}
}

// TestCloseGivesBack what the kernel keeps for a file. It runs before the parallel ones.
func TestCloseGivesBack(t *testing.T) {
	kept := func() (n int) {
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(maps), "[aio]") + len(all)
	}
	const files = 20
	each := 1 // its descriptor
	if offered() {
		each = 3 // the ring's memory and its eventfd too
	}
	r, w, err := os.Pipe() // for which the runtime opens what it keeps
	if err := errors.Join(err, r.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	before := kept()
	var opened []*File
	for range files {
		opened = append(opened, Wrap(mustCreate(t)))
	}
	if n := kept(); n < before+each*files {
		t.Fatalf("%d more are kept for %d files: this shows nothing", n-before, files)
	}
	for _, f := range opened {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(10 * time.Second); kept() > before; runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("%d more are kept after all files were closed", kept()-before)
		}
	}
	runtime.KeepAlive(opened)
}

func mustCreate(t *testing.T) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// offered reports whether the kernel has asynchronous I/O.
func offered() bool {
	_, err := os.Stat("/proc/sys/fs/aio-max-nr")
	return err == nil
}

// dirty is how many pages of a file are not on disk yet. Linux before 6.5 does not tell.
func dirty(t *testing.T, f *os.File) (pages uint64, known bool) {
	t.Helper()
	var s unix.Cachestat_t
	err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &s, 0)
	if errors.Is(err, unix.ENOSYS) {
		return 0, false
	}
	if err != nil {
		t.Fatal(err)
	}
	return s.Dirty + s.Writeback, true
}
