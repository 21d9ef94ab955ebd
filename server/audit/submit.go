package audit

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lately is how long ago the last write may be for the next to be expected to go well,
	// and the last look at how much room there is.
	lately = 5 * time.Millisecond
	// ample is how much room there is to be: more than disks take until the next look.
	ample = 64 << 20
)

// Holder is who can hold back what a record is of.
type Holder interface {
	// Unrecorded says that a record which was submitted for the holder could not be
	// written. It must not block.
	Unrecorded()
}

// Submit is Write that does not wait for a line which is as good as written: when lines
// are written one soon after the other to a file with ample room. A mark other than 0 says
// so. Nothing that the record is of may leave then before Await has returned true for that
// mark, nor after h was told Unrecorded.
func (l *Log) Submit(ctx context.Context, r *Record, h Holder) (mark int64, err error) {
	if at := l.smooth.Load(); at == 0 || time.Since(l.started)-time.Duration(at) > lately {
		return 0, l.Write(ctx, r)
	}
	e := l.entry(TypeCall, r)
	e.holder = h
	b, err := l.enqueue(e)
	if err != nil {
		return 0, err
	}
	return b.number, nil
}

// Await returns true when it is known what became of all that was submitted up to a mark,
// and whoever has to be told was told so. It returns false when that is still unknown as
// long after as a write may hang, or once gone is closed.
func (l *Log) Await(mark int64, gone <-chan struct{}) bool {
	if l.settled.Load() >= mark {
		return true
	}
	b := l.unsettled(mark)
	if b == nil {
		return true
	}
	<-b.done
	if b.long == nil {
		return true
	}
	hanging := time.NewTimer(l.cfg.hangs)
	defer hanging.Stop()
	select {
	case <-b.long:
		return true
	case <-hanging.C:
	case <-gone:
	}
	return false
}

// unsettled is the batch of that number; nil when all is known of it.
func (l *Log) unsettled(number int64) *batch {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range []*batch{l.now, l.next} {
		if b != nil && b.number == number {
			return b
		}
	}
	return nil
}

// foresee is for the end of every write: whether the next is to be expected to go well too.
func (l *Log) foresee(err error) {
	if err != nil || !l.onFile() {
		l.smooth.Store(0)
		return
	}
	now := time.Since(l.started)
	if !l.roomy || now-l.looked > lately {
		free, err := l.cfg.free()
		l.looked, l.roomy = now, err == nil && free >= ample && mayGrowTo(l.size+ample)
	}
	if !l.roomy {
		now = 0
	}
	l.smooth.Store(int64(now))
}

// free is how many bytes are left on the file system of the log.
func (l *Log) free() (uint64, error) {
	var fs unix.Statfs_t
	err := unix.Statfs(l.cfg.Path, &fs) // of the file, which may be a mount of its own
	return fs.Bavail * uint64(fs.Bsize), err
}

// mayGrowTo reports whether this process may write a file of that size.
func mayGrowTo(size int64) bool {
	var limit unix.Rlimit
	return unix.Getrlimit(unix.RLIMIT_FSIZE, &limit) == nil && uint64(size) <= limit.Cur
}
