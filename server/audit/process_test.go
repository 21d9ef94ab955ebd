package audit_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/exto/secrets-broker/internal/race"
	"github.com/exto/secrets-broker/server/audit"
)

// children are what a test runs in a process of its own.
var children = map[string]func() int{"load": load, "limit": limit, "pipe": pipe}

func child(t *testing.T, name, path string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "AUDIT_TEST_CHILD="+name, "AUDIT_TEST_PATH="+path)
	cmd.Stderr = os.Stderr
	return cmd
}

func fail(v ...any) int {
	fmt.Fprintln(os.Stderr, v...)
	return 1
}

// load says which intents are durable and which outcomes are written, until it is
// killed.
func load() int {
	l, err := audit.Open(audit.Config{Path: os.Getenv("AUDIT_TEST_PATH"), MaxBytes: 100_000})
	if err != nil {
		return fail(err)
	}
	ctx := context.Background()
	for _, r := range l.Unclosed() { // as the heart does it
		if err := l.Write(ctx, outcome(r.ID, "UNKNOWN", "not applied")); err != nil {
			return fail(err)
		}
	}
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("%d-%d-%d", os.Getpid(), w, i)
				if w%2 == 0 {
					if l.Write(ctx, call(id)) == nil {
						fmt.Printf("call %s\n", id)
					}
					continue
				}
				if l.Intend(ctx, intent(id)) == nil {
					fmt.Printf("intent %s\n", id)
				}
				if l.Write(ctx, outcome(id, "APPLIED", "")) == nil {
					fmt.Printf("outcome %s\n", id)
				}
			}
		})
	}
	wg.Wait()
	return 0
}

// TestKills: 20 kills under load, or 6 with the race detector, leave a chain that holds,
// with all that was acknowledged, and each start finds the intents without outcome.
func TestKills(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "audit.log")
	acknowledged := map[string]bool{}
	torn := 0
	kills := 20
	if race.Enabled {
		kills = 6
	}
	for kill := range kills {
		cmd := child(t, "load", path)
		out, err := cmd.StdoutPipe()
		ok(t, err)
		ok(t, cmd.Start())
		s := bufio.NewScanner(out)
		for n := 0; s.Scan(); n++ {
			if strings.Count(s.Text(), " ") == 1 {
				acknowledged[s.Text()] = true
			}
			if n == 200+50*kill {
				ok(t, cmd.Process.Kill())
			}
		}
		_ = cmd.Wait()
		if holds(t, files(t, path)...).Torn != "" {
			torn++
		}
	}
	l := open(t, audit.Config{Path: path})
	for _, r := range l.Unclosed() {
		ok(t, l.Write(callContext(t), outcome(r.ID, "UNKNOWN", "not applied")))
	}
	shut(t, l)
	all := files(t, path)
	c := holds(t, all...)
	if len(c.Open) != 0 || c.Torn != "" {
		t.Errorf("got %+v, want all closed", c)
	}
	there := map[string]bool{}
	for _, r := range records(t, all...) {
		there[string(r.Type)+" "+r.ID] = true
	}
	for line := range acknowledged {
		if !there[line] {
			t.Errorf("%s was acknowledged and is not in the log", line)
		}
	}
	t.Logf("%d lines in %d files, %d acknowledged, %d torn lines", c.Lines, len(all), len(acknowledged), torn)
}

// limit meets a limit on the size of files, as a full disk is met, and lifts it.
func limit() int {
	signal.Ignore(syscall.SIGXFSZ)
	l, err := audit.Open(audit.Config{Path: os.Getenv("AUDIT_TEST_PATH")})
	if err != nil {
		return fail(err)
	}
	var before, small unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &before); err != nil {
		return fail(err)
	}
	small.Cur, small.Max = 20_000, before.Max
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &small); err != nil {
		return fail(err)
	}
	ctx := context.Background()
	if err := l.Intend(ctx, intent("i")); err != nil {
		return fail(err)
	}
	written := 0
	for err = nil; err == nil; written++ {
		err = l.Write(ctx, call(fmt.Sprint(written)))
	}
	if !errors.Is(err, audit.ErrUnavailable) || !errors.Is(err, syscall.EFBIG) || written < 20 {
		return fail("at the limit: got", err, "after", written)
	}
	if err := l.Write(ctx, outcome("i", "APPLIED", "")); !errors.Is(err, audit.ErrUnavailable) {
		return fail("beyond the limit: got", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &before); err != nil {
		return fail(err)
	}
	if err := l.Write(ctx, call("after")); err != nil {
		return fail("with room again:", err)
	}
	if err := l.Close(ctx); err != nil {
		return fail(err)
	}
	return 0
}

func TestFileSizeLimit(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "audit.log")
	ok(t, child(t, "limit", path).Run())
	if c := holds(t, path); len(c.Open) != 0 {
		t.Errorf("got %+v, want the outcome kept and written", c)
	}
}

// pipe writes to a standard output that nobody reads.
func pipe() int {
	signal.Ignore(syscall.SIGPIPE)
	l, err := audit.Open(audit.Config{Path: "-"})
	if err != nil {
		return fail(err)
	}
	for range 2 {
		if err := l.Write(context.Background(), call("c")); !errors.Is(err, audit.ErrUnavailable) || !errors.Is(err, syscall.EPIPE) {
			return fail("got", err)
		}
	}
	return 0
}

func TestClosedPipe(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	ok(t, err)
	cmd := child(t, "pipe", "")
	cmd.Stdout = w
	ok(t, r.Close())
	ok(t, cmd.Start())
	ok(t, w.Close())
	ok(t, cmd.Wait())
}
