package audit_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/exto/secrets-broker/server/audit"
)

// ample is how much room there is to be for lines that are not waited for.
const ample = 64 << 20

// holder counts what it was told.
type holder struct{ unrecorded atomic.Int32 }

func (h *holder) Unrecorded() { h.unrecorded.Add(1) }

// submit writes one record after the other until one need not be waited for.
func submit(t *testing.T, l *audit.Log, h audit.Holder) (mark int64) {
	t.Helper()
	for mark == 0 {
		ok(t, l.Write(callContext(t), call("before")))
		var err error
		mark, err = l.Submit(callContext(t), call("submitted"), h)
		ok(t, err)
	}
	return mark
}

// stopping is a log whose writes stop at a gate while that is closed.
type stopping struct {
	*audit.Log
	path   string
	closed atomic.Bool
	at     chan struct{} // one has come to the gate
	gate   chan struct{} // lets it through
}

func openStopping(t *testing.T, hangs time.Duration) *stopping {
	s := &stopping{path: filepath.Join(t.TempDir(), "audit.log"), at: make(chan struct{}), gate: make(chan struct{})}
	s.Log = open(t, audit.Config{Path: s.path}.Hangs(hangs).Wrap(func(f *os.File) audit.File {
		return &faulty{File: f, write: func(b []byte) (int, error) {
			if s.closed.Load() {
				s.at <- struct{}{}
				<-s.gate
			}
			return all(b)
		}}
	}))
	return s
}

// submit has a record stop at the gate that was submitted and is not waited for.
func (s *stopping) submit(t *testing.T, h audit.Holder) (mark int64) {
	t.Helper()
	for mark == 0 {
		s.closed.Store(false)
		ok(t, s.Write(callContext(t), call("before")))
		s.closed.Store(true)
		done := make(chan error, 1)
		go func() {
			var err error
			mark, err = s.Submit(callContext(t), call("submitted"), h)
			done <- err
		}()
		<-s.at
		select {
		case err := <-done:
			ok(t, err)
		case s.gate <- struct{}{}: // it waits, or has just not returned yet
			ok(t, <-done)
			mark = 0
		}
	}
	return mark
}

// TestSubmit: it returns before the line is written, and Await when it is.
func TestSubmit(t *testing.T) {
	t.Parallel()
	l, h := openStopping(t, time.Minute), &holder{}
	mark := l.submit(t, h)
	before := strings.Count(read(t, l.path), `"submitted"`)
	awaited := make(chan bool)
	go func() { awaited <- l.Await(mark, nil) }()
	l.closed.Store(false)
	l.gate <- struct{}{} // it was waiting there, so that the line is not in the file yet
	if !<-awaited || h.unrecorded.Load() != 0 {
		t.Errorf("told %d times that it is unrecorded, want it written", h.unrecorded.Load())
	}
	if n := strings.Count(read(t, l.path), `"submitted"`); n != before+1 {
		t.Errorf("got %d lines once Await has returned, want the one more", n-before)
	}
	if !l.Await(mark, nil) {
		t.Error("what was written has to be waited for again")
	}
	shut(t, l.Log)
	holds(t, l.path)
}

// TestSubmitThatFails is told to who holds back, and before Await returns.
func TestSubmitThatFails(t *testing.T) {
	t.Parallel()
	var full atomic.Bool
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, audit.Config{Path: path}.Wrap(func(f *os.File) audit.File {
		return &faulty{File: f, write: func(b []byte) (int, error) {
			if full.Load() && strings.Contains(string(b), `"submitted"`) {
				return 0, syscall.EIO
			}
			return all(b)
		}}
	}))
	full.Store(true)
	h := &holder{}
	if !l.Await(submit(t, l, h), nil) || h.unrecorded.Load() != 1 {
		t.Errorf("told %d times that it is unrecorded, want once", h.unrecorded.Load())
	}
	if mark, err := l.Submit(callContext(t), call("submitted"), h); mark != 0 || !errors.Is(err, audit.ErrUnavailable) || h.unrecorded.Load() != 1 {
		t.Errorf("the next one: got %d, %v, want that it was waited for and could not be written", mark, err)
	}
	full.Store(false)
	ok(t, l.Write(callContext(t), call("after")))
	shut(t, l)
	holds(t, path)
}

// TestSubmitWaits where it is in doubt whether the line can be written.
func TestSubmitWaits(t *testing.T) {
	t.Parallel()
	h, dir := &holder{}, t.TempDir()
	for name, cfg := range map[string]audit.Config{
		"a stream":           {Path: "-", Out: &lines{}},
		"little room":        audit.Config{Path: filepath.Join(dir, "little")}.Free(func() (uint64, error) { return ample - 1, nil }),
		"who knows how much": audit.Config{Path: filepath.Join(dir, "unknown")}.Free(func() (uint64, error) { return ample, syscall.EIO }),
	} {
		l := open(t, cfg)
		for range 20 {
			ok(t, l.Write(callContext(t), call("before")))
			if mark, err := l.Submit(callContext(t), call("submitted"), h); mark != 0 || err != nil {
				t.Errorf("%s: got %d, %v, want that it was written", name, mark, err)
			}
		}
		shut(t, l)
		if cfg.Path != "-" && strings.Count(read(t, cfg.Path), `"submitted"`) != 20 {
			t.Errorf("%s: not all is there", name)
		}
	}
}

// TestSubmitUntilRoomIsLittle: that there was ample room is not believed for ever.
func TestSubmitUntilRoomIsLittle(t *testing.T) {
	t.Parallel()
	var used atomic.Int64
	l := open(t, audit.Config{Path: filepath.Join(t.TempDir(), "audit.log")}.Free(func() (uint64, error) { return uint64(ample - used.Load()), nil }))
	h, ctx := &holder{}, callContext(t)
	for _, c := range []struct {
		used    int64
		submits bool
	}{{0, true}, {1, false}, {0, true}} {
		used.Store(c.used)
		for submits := !c.submits; submits != c.submits; {
			mark, err := l.Submit(ctx, call("submitted"), h)
			ok(t, errors.Join(err, ctx.Err()))
			if submits = mark != 0; submits {
				l.Await(mark, nil)
			}
		}
	}
	shut(t, l)
}

// TestAwaitOfAHangingWrite ends without knowing, and at once when nobody is there any more.
func TestAwaitOfAHangingWrite(t *testing.T) {
	t.Parallel()
	l := openStopping(t, 50*time.Millisecond)
	if l.Await(l.submit(t, &holder{}), nil) {
		t.Error("got that all is known, want that the write hangs")
	}
	l.closed.Store(false)
	l.gate <- struct{}{}
	patient := openStopping(t, time.Hour)
	gone := make(chan struct{})
	close(gone)
	if patient.Await(patient.submit(t, &holder{}), gone) {
		t.Error("got that all is known, want that nobody waits")
	}
	patient.closed.Store(false)
	patient.gate <- struct{}{}
}

// TestSubmitBesideAHangingWrite is a Write, as soon as that write takes long.
func TestSubmitBesideAHangingWrite(t *testing.T) {
	t.Parallel()
	l := openStopping(t, time.Hour)
	l.submit(t, &holder{})
	for {
		ctx, cancel := context.WithTimeout(callContext(t), 20*time.Millisecond)
		_, err := l.Submit(ctx, call("beside"), &holder{})
		cancel()
		if errors.Is(err, context.DeadlineExceeded) {
			break
		}
		ok(t, err) // also when too many wait
	}
	l.closed.Store(false)
	l.gate <- struct{}{}
}

// TestHangingFileSystem: a write that went well, beside a question for what is free that
// does not, is a log that hangs.
func TestHangingFileSystem(t *testing.T) {
	t.Parallel()
	at, gate := make(chan struct{}), make(chan struct{})
	var hang atomic.Bool
	l := open(t, audit.Config{Path: filepath.Join(t.TempDir(), "audit.log")}.Hangs(10*time.Millisecond).Free(func() (uint64, error) {
		if hang.CompareAndSwap(true, false) {
			at <- struct{}{}
			<-gate
		}
		return ample, nil
	}))
	hang.Store(true)
	written := make(chan error, 1)
	go func() {
		var err error
		for err == nil && hang.Load() { // it is not asked each time
			err = l.Write(callContext(t), call("before"))
		}
		written <- err
	}()
	<-at
	ctx := callContext(t)
	for again := time.Tick(time.Millisecond); l.Check() == nil; <-again {
		if ctx.Err() != nil {
			close(gate)
			t.Fatal("the log has no trouble")
		}
	}
	close(gate)
	ok(t, <-written)
}
