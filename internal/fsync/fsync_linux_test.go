package fsync

import (
	"errors"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSync: what was written is on disk after a Sync, whether the kernel has
// asynchronous I/O or loses it; many may sync at once; and errors are those of *os.File.
func TestSync(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(*File){
		"asynchronous": func(*File) {},
		"refused from the first": func(d *File) {
			d.queue.close()
			d.queue = nil
		},
		"refused later": func(d *File) {
			_, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, d.queue.(*ring).context, 0, 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, err := os.CreateTemp("/var/tmp", "fsync-*") // where tests have their folders may be memory
			if err != nil {
				t.Fatal(err)
			}
			defer os.Remove(f.Name())
			d := Wrap(f)
			if _, err := os.Stat("/proc/sys/fs/aio-max-nr"); err != nil {
				t.Skip("the kernel has no asynchronous I/O")
			}
			if d.queue == nil {
				t.Fatal("the kernel has asynchronous I/O, and it is not used")
			}
			prepare(d)
			for round := range 3 {
				if _, err := d.Write(make([]byte, 64<<10)); err != nil {
					t.Fatal(err)
				}
				if dirty(t, f) == 0 {
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
				if n := dirty(t, f); n > 0 {
					t.Errorf("round %d: %d pages are not on disk", round, n)
				}
			}
			if asynchronous := d.queue != nil; asynchronous != (name == "asynchronous") {
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

// dirty is how many pages of a file are not on disk yet.
func dirty(t *testing.T, f *os.File) uint64 {
	t.Helper()
	var s unix.Cachestat_t
	err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &s, 0)
	if errors.Is(err, unix.ENOSYS) {
		t.Skip("cachestat(2) is in Linux from 6.5 on")
	}
	if err != nil {
		t.Fatal(err)
	}
	return s.Dirty + s.Writeback
}
