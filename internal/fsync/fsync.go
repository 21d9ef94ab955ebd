// Package fsync syncs files without keeping the rest of the process from running.
//
// A thread in fsync(2) keeps one of the GOMAXPROCS shares until the runtime takes it
// away; with two cores and two files being synced nothing else runs until then. Where the kernel can
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
	// sync gives what fsync(2) would have. When it did not begin, the error says why.
	sync(fd uintptr) (began bool, err error)
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
		began, err := f.queue.sync(f.Fd())
		if began && err == nil {
			return nil
		}
		f.drop()
		if began {
			// Not once more: the kernel tells of a lost write once, and is done.
			return &fs.PathError{Op: "sync", Path: f.Name(), Err: err}
		}
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

// drop does not wait for the kernel, which takes its time to take a queue down.
func (f *File) drop() {
	if f.queue != nil {
		go f.queue.close()
		f.queue = nil
	}
}
