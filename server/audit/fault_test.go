package audit_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/exto/secrets-broker/server/audit"
)

// faulty is a file with faults.
type faulty struct {
	*os.File
	write    func(b []byte) (n int, err error) // how much to write before err
	sync     func() error
	truncate func() error
}

func (f *faulty) Write(b []byte) (int, error) {
	if f.write == nil {
		return f.File.Write(b)
	}
	n, fault := f.write(b)
	n, err := f.File.Write(b[:n])
	return n, errors.Join(err, fault)
}

func (f *faulty) Sync() error {
	if f.sync != nil {
		if err := f.sync(); err != nil {
			return err
		}
	}
	return f.File.Sync()
}

func (f *faulty) Truncate(size int64) error {
	if f.truncate != nil {
		if err := f.truncate(); err != nil {
			return err
		}
	}
	return f.File.Truncate(size)
}

func all(b []byte) (int, error) { return len(b), nil }

// TestFullDisk: what was written of a batch is cut off again, records are refused
// at once, outcomes are kept, and service is back with the first that can be written.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	for _, growsOnly := range []bool{false, true} {
		for _, part := range []int{0, 1, 250, 400, 700} {
			path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
			var (
				text lines
				full atomic.Bool
			)
			metrics := prometheus.NewRegistry()
			cfg := audit.Config{Path: path, Metrics: metrics, Logger: slog.New(slog.NewTextHandler(&text, nil))}
			l := open(t, cfg.Wrap(func(f *os.File) audit.File {
				file := &faulty{File: f}
				file.write = func(b []byte) (int, error) {
					if full.Load() {
						return min(part, len(b)-1), syscall.ENOSPC
					}
					return all(b)
				}
				file.truncate = func() error {
					if growsOnly && full.Load() {
						return syscall.EPERM // chattr +a
					}
					return nil
				}
				return file
			}))
			ok(t, l.Intend(ctx, intent("i")))
			ok(t, l.Intend(ctx, intent("j")))
			full.Store(true)
			for _, r := range []*audit.Record{call("a"), outcome("i", "APPLIED", ""), outcome("no intent", "APPLIED", ""), outcome("j", "UNKNOWN", ""), outcome("j", "UNKNOWN", "applied")} {
				err := l.Write(ctx, r)
				if growsOnly && part > 250 {
					continue // the lines that are whole stay
				}
				if !errors.Is(err, audit.ErrUnavailable) || !errors.Is(err, syscall.ENOSPC) {
					t.Errorf("got %v, want ErrUnavailable because of ENOSPC", err)
				}
			}
			if err := l.System(ctx, "reload", audit.System{Policy: "new"}); !errors.Is(err, audit.ErrUnavailable) && !growsOnly {
				t.Errorf("what is in force: got %v, want ErrUnavailable", err)
			}
			if err := l.Count(call("")); !errors.Is(err, audit.ErrUnavailable) {
				t.Errorf("a count: got %v, want ErrUnavailable", err)
			}
			if err := l.Intend(ctx, intent("k")); !errors.Is(err, audit.ErrUnavailable) && !growsOnly {
				t.Errorf("an intent: got %v, want ErrUnavailable", err)
			}
			if got := metric(t, metrics, "available"); got != 0 {
				t.Errorf("got available %v, want 0", got)
			}
			full.Store(false)
			ok(t, l.Write(ctx, call("b")))
			ok(t, l.Count(call("")))
			if got := metric(t, metrics, "available"); got != 1 {
				t.Errorf("got available %v, want 1", got)
			}
			shut(t, l)
			if n := len(text.with("level=ERROR", "cannot be written")); n != 1 {
				t.Errorf("got %d errors logged, want one", n)
			}
			if n := len(text.with("level=INFO", "is written again", "refused=")); n != 1 {
				t.Errorf("got %d lines of the return logged, want one", n)
			}
			report, err := audit.Verify([]string{path}, "")
			if err != nil || len(report.Chains[0].Open) > 0 && !growsOnly {
				t.Errorf("growing only %v, %d bytes: got %+v, %v, want all closed", growsOnly, part, report.Chains, err)
			}
			if growsOnly {
				continue
			}
			got := records(t, path)
			if some, want := actions(got, audit.TypeOutcome), []string{"put i", "put j", "put j"}; !slices.Equal(some, want) {
				t.Errorf("got outcomes %q, want %q", some, want)
			}
			at := slices.IndexFunc(got, func(r logged) bool { return r.Action == "resumed" })
			told := int64(0)
			for _, r := range got {
				if r.Action == "resumed" {
					told += r.Count
				}
			}
			if lines := text.with("is written again", fmt.Sprintf("refused=%d", told)); len(lines) != 1 {
				t.Errorf("got %d refused in lines of the audit log, and not that in the log: %s", told, text.with("is written again"))
			}
			if at < 0 || got[at].Count < 7 || got[at+1].ID != "i" {
				t.Errorf("got %+v, want the outage recorded, then the outcomes", got)
			}
			if n := slices.IndexFunc(got, func(r logged) bool { return r.Action == "reload" && r.System.Policy == "new" }); n < 0 {
				t.Error("what is in force since the outage is not recorded")
			}
			if some, want := actions(got, audit.TypeCall), []string{"get b"}; !slices.Equal(some, want) {
				t.Errorf("got calls %q, want %q", some, want)
			}
		}
	}
}

// TestOutageEndsAlone: nobody comes, and yet what was kept and counted is written.
func TestOutageEndsAlone(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	var full atomic.Bool
	tried, back := make(chan struct{}, 100), make(chan struct{}, 100)
	cfg := audit.Config{Path: path}
	l := open(t, cfg.Wrap(func(f *os.File) audit.File {
		return &faulty{File: f, write: func(b []byte) (int, error) {
			if full.Load() {
				if strings.Contains(string(b), `"type":"count"`) {
					tried <- struct{}{}
				}
				return 0, syscall.EIO
			}
			if strings.Contains(string(b), "resumed") {
				back <- struct{}{}
			}
			return all(b)
		}}
	}))
	ok(t, l.Intend(ctx, intent("i")))
	full.Store(true)
	ok(t, l.Count(call("")))
	if err := l.Write(ctx, outcome("i", "APPLIED", "")); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v, want EIO", err)
	}
	<-tried
	full.Store(false)
	<-back
	shut(t, l)
	if c := holds(t, path); len(c.Open) != 0 {
		t.Errorf("got %q open", c.Open)
	}
	if got := actions(records(t, path), audit.TypeCount); len(got) != 1 {
		t.Errorf("got counts %q, want one", got)
	}
}

// TestFsyncFails: the intent may be in the file, so the log itself closes it.
func TestFsyncFails(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	var broken atomic.Bool
	cfg := audit.Config{Path: path}
	l := open(t, cfg.Wrap(func(f *os.File) audit.File {
		return &faulty{File: f, sync: func() error {
			if broken.Load() {
				return syscall.EIO
			}
			return nil
		}}
	}))
	broken.Store(true)
	if err := l.Intend(ctx, intent("i")); !errors.Is(err, audit.ErrUnavailable) || !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v, want ErrUnavailable because of EIO", err)
	}
	ok(t, l.Write(ctx, call("a read goes on")))
	broken.Store(false)
	ok(t, l.Intend(ctx, intent("j")))
	ok(t, l.Write(ctx, outcome("j", "APPLIED", "")))
	shut(t, l)
	wantClosed(t, path, "i")
}

func wantClosed(t *testing.T, path, id string) {
	t.Helper()
	if c := holds(t, path); len(c.Open) != 0 {
		t.Errorf("got %q open", c.Open)
	}
	for _, r := range records(t, path) {
		if r.Type == audit.TypeOutcome && r.ID == id && (r.Commit != "NOT_APPLIED" || r.Reason != "AUDIT_UNAVAILABLE" || r.Caller != intent(id).Caller || r.OperationID != "o-"+id) {
			t.Errorf("got %+v, want it closed as not applied", r.Record)
		}
	}
}

// TestLeavingCaller: a caller leaves while its intent is being made durable.
func TestLeavingCaller(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "audit.log")
	began, goOn := make(chan struct{}, 10), make(chan struct{})
	cfg := audit.Config{Path: path}
	first := true
	l := open(t, cfg.Wrap(func(f *os.File) audit.File {
		return &faulty{File: f, sync: func() error {
			if !first {
				began <- struct{}{}
				<-goOn
			}
			first = false
			return nil
		}}
	}))
	ctx, cancel := context.WithCancel(callContext(t))
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := l.Intend(ctx, intent("i")); !errors.Is(err, audit.ErrUnavailable) || !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want ErrUnavailable because it was cancelled", err)
		}
	})
	<-began
	cancel()
	wg.Wait()
	close(goOn)
	shut(t, l)
	wantClosed(t, path, "i")
}

// TestLeavingTheQueue: who leaves before its record is being written leaves no trace.
func TestLeavingTheQueue(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	began, goOn := make(chan struct{}), make(chan struct{})
	cfg := audit.Config{Path: path}
	l := open(t, cfg.Wrap(func(f *os.File) audit.File {
		return &faulty{File: f, write: func(b []byte) (int, error) {
			if strings.Contains(string(b), "slow") {
				began <- struct{}{}
				<-goOn
			}
			return all(b)
		}}
	}))
	ok(t, l.Intend(ctx, intent("i")))
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := l.Write(ctx, call("slow")); err != nil {
			t.Error(err)
		}
	})
	<-began
	ended, cancel := context.WithCancel(ctx)
	cancel()
	for _, err := range []error{l.Intend(ended, intent("left")), l.Write(ended, call("left")), l.Write(ended, outcome("i", "APPLIED", ""))} {
		if !errors.Is(err, audit.ErrUnavailable) || !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want ErrUnavailable because it was cancelled", err)
		}
	}
	close(goOn)
	wg.Wait()
	shut(t, l)
	if c := holds(t, path); c.Lines != 4 || len(c.Open) != 0 {
		t.Errorf("got %+v, want begin, intent, call and outcome: that is never lost", c)
	}
}

// TestHangingSink: callers wait until their deadline; when it has been hanging for
// long, new ones don't wait.
func TestHangingSink(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	ok(t, err)
	defer func() { _ = r.Close() }()
	metrics := prometheus.NewRegistry()
	var text lines
	l := open(t, audit.Config{Path: "-", Out: w, Metrics: metrics, Logger: slog.New(slog.NewTextHandler(&text, nil))}.Hangs(time.Second))
	ctx := callContext(t)
	ok(t, l.Intend(ctx, intent("before")))
	big := call(strings.Repeat("x", 1024))
	var hung error
	for hung == nil { // until the pipe is full
		short, cancel := context.WithTimeout(ctx, 1500*time.Millisecond)
		hung = l.Write(short, big)
		cancel()
	}
	if !errors.Is(hung, audit.ErrUnavailable) || !errors.Is(hung, context.DeadlineExceeded) {
		t.Errorf("got %v, want ErrUnavailable at the deadline", hung)
	}
	// These have no deadline that would end them in the time of the test.
	if err := l.Write(ctx, big); !errors.Is(err, audit.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable at once", err)
	}
	if err := l.Intend(ctx, intent("meanwhile")); !errors.Is(err, audit.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable at once", err)
	}
	if err := l.Count(big); !errors.Is(err, audit.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable at once", err)
	}
	if err := l.Write(ctx, outcome("before", "APPLIED", "")); !errors.Is(err, audit.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable at once", err)
	}
	if got := metric(t, metrics, "available"); got != 0 || len(text.with("level=ERROR")) != 1 {
		t.Errorf("got available %v and log %v, want 0 and one error", got, text.with("level=ERROR"))
	}
	path := filepath.Join(t.TempDir(), "out")
	var wg sync.WaitGroup
	wg.Go(func() {
		f, err := os.Create(path)
		ok(t, err)
		_, err = f.ReadFrom(r)
		ok(t, errors.Join(err, f.Close()))
	})
	for l.Write(ctx, call("after")) != nil { // it is read again
		if ctx.Err() != nil {
			t.Fatal("service does not come back")
		}
	}
	shut(t, l)
	ok(t, w.Close())
	wg.Wait()
	if c := holds(t, path); len(c.Open) != 0 {
		t.Errorf("got %q open, want the outcome kept and written", c.Open)
	}
	if all := records(t, path); !slices.ContainsFunc(all, func(r logged) bool { return r.Action == "resumed" && r.Count >= 3 }) {
		t.Error("the outage is not recorded")
	}
}

// tearing is a stream that takes only a part of what it is given, when told to.
type tearing struct {
	mu   sync.Mutex
	b    []byte
	take int // -1: all
}

func (s *tearing) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.take >= 0 && s.take < len(b) {
		s.b = append(s.b, b[:s.take]...)
		return s.take, syscall.EPIPE
	}
	s.b = append(s.b, b...)
	return len(b), nil
}

func (s *tearing) set(take int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.take = take
}

// TestTornStream: a stream can't be cut. The piece is recorded, and the chain holds.
func TestTornStream(t *testing.T) {
	t.Parallel()
	for _, take := range []int{0, 1, 2, 100, 300, 700} {
		s, ctx := &tearing{take: -1}, callContext(t)
		l := open(t, audit.Config{Path: "-", Out: s})
		ok(t, l.Intend(ctx, intent("i")))
		s.set(take)
		for range 3 {
			_ = l.Write(ctx, call("torn"))
		}
		if err := l.Write(ctx, outcome("i", "APPLIED", "")); take < 300 && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("%d bytes: got %v, want EPIPE", take, err)
		}
		s.set(-1)
		ok(t, l.Write(ctx, call("whole")))
		shut(t, l)
		path := put(t, t.TempDir(), "out", string(s.b))
		if c := holds(t, path); len(c.Open) != 0 || c.Torn != "" {
			t.Errorf("%d bytes: got %+v", take, c)
		}
		// The chain begins anew with each process, also in one stream.
		l = open(t, audit.Config{Path: "-", Out: s})
		ok(t, l.Write(ctx, call("another process")))
		shut(t, l)
		report, err := audit.Verify([]string{put(t, t.TempDir(), "out", string(s.b))}, "")
		if err != nil || len(report.Chains) != 2 || report.Chains[1].Lines != 2 {
			t.Errorf("%d bytes: got %+v, %v, want two chains", take, report.Chains, err)
		}
	}
}
