// Package fsync syncs files without keeping the rest of the process from running.
//
// A thread in fsync(2) keeps one of the GOMAXPROCS shares until the runtime takes it
// away, which on a busy machine is long after most calls would have been answered; with
// two cores and two files being synced nothing else runs meanwhile. Where the kernel can
// sync by itself, this package has it do so, and a goroutine waits for that as it
// does for a connection.
package fsync

import (
	"io/fs"
	"os"
	"sync"
)

// File is an *os.File with a Sync of its own. It is safe for concurrent use.
type File struct {
	*os.File
	mu    sync.Mutex
	queue queue // nil where the kernel, or a sandbox, offers none
}

// queue has the kernel sync.
type queue interface {
	// sync gives what fsync(2) would have. When it is not ok, nothing is known, and the
	// queue is of no more use for the file.
	sync(fd uintptr) (err error, ok bool)
	// close waits for what is under way.
	close()
}

// Wrap takes over f, which is closed with the File.
func Wrap(f *os.File) *File { return &File{File: f, queue: newQueue()} }

// Sync is that of *os.File: it returns when the file is on disk. Two at once come one
// after the other.
func (f *File) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.queue != nil {
		err, ok := f.queue.sync(f.Fd())
		if ok && err == nil {
			return nil
		}
		if ok {
			return &fs.PathError{Op: "sync", Path: f.Name(), Err: err}
		}
		f.drop()
	}
	return f.File.Sync()
}

// Close closes the file after a Sync that is under way.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.drop()
	return f.File.Close()
}

func (f *File) drop() {
	if f.queue != nil {
		f.queue.close()
		f.queue = nil
	}
}
