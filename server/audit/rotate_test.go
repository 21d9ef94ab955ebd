package audit_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/exto/secrets-broker/server/audit"
)

// files gives the files of a log, the oldest first.
func files(t testing.TB, path string) (all []string) {
	t.Helper()
	for n := 1; n < 10_000; n++ {
		if name := fmt.Sprintf("%s.%d", path, n); exists(name) {
			all = append(all, name)
		}
	}
	return append(all, path)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// TestRotation: by size; the chain goes on, also over a restart, and each file
// begins with what it needs to be judged without the older ones.
func TestRotation(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, ctx := filepath.Join(dir, "audit.log"), callContext(t)
	const calls = 60
	var l *audit.Log
	for i := range calls {
		if i%20 == 0 {
			if l != nil {
				shut(t, l)
			}
			l = open(t, audit.Config{Path: path, MaxBytes: 3000, System: audit.System{Build: "at open"}})
			if i == 0 {
				ok(t, l.Intend(ctx, intent("open")))
				ok(t, l.Intend(ctx, intent("closed")))
				ok(t, l.Write(ctx, outcome("closed", "APPLIED", "")))
			}
		}
		if i == 10 {
			ok(t, l.System(ctx, "reload", audit.System{Build: "b", Policy: "p2"}))
		}
		ok(t, l.Write(ctx, call(fmt.Sprint(i))))
	}
	shut(t, l)
	all := files(t, path)
	if len(all) < 5 {
		t.Fatalf("got %q, want at least 5 files", all)
	}
	shuffled := slices.Clone(all)
	slices.Reverse(shuffled)
	if c := holds(t, shuffled...); !slices.Equal(c.Files, all) || c.First != 1 || !slices.Equal(c.Open, []string{"open"}) {
		t.Errorf("got %+v, want all files in order and one open intent", c)
	}
	if got := len(actions(records(t, all...), audit.TypeCall)); got != calls {
		t.Errorf("got %d calls, want %d", got, calls)
	}
	for i, file := range all {
		info, err := os.Stat(file)
		ok(t, err)
		if info.Size() > 3000 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has %d bytes and mode %v, want up to 3000 and 0600", file, info.Size(), info.Mode())
		}
		got := records(t, file)
		if got[0].Action != "begin" || got[0].Chain == "" || got[0].System == nil {
			t.Errorf("%s begins with %+v", file, got[0].Record)
		}
		if i > 0 && (got[1].Type != audit.TypeIntent || got[1].ID != "open") {
			t.Errorf("%s goes on with %+v, want the open intent", file, got[1].Record)
		}
		if c := holds(t, all[i:]...); c.Last != int64(len(records(t, all...))) {
			t.Errorf("without the older files: got %+v", c)
		}
	}
	if begins := func(r logged) bool {
		return r.Action == "begin" && *r.System == audit.System{Build: "b", Policy: "p2"}
	}; !slices.ContainsFunc(records(t, all...), begins) {
		t.Error("no file begins with the policy that came in force")
	}
	if got := open(t, audit.Config{Path: path}).Unclosed(); len(got) != 1 || got[0].ID != "open" {
		t.Errorf("got %+v unclosed, want the one of the first file", got)
	}

	// Tampering at the edges of files.
	for _, test := range []struct {
		name, want string
		tamper     func()
	}{
		{"first line dropped", ".2: line 1: is not what", func() { edit(t, all[1], func(s string) string { return s[strings.Index(s, "\n")+1:] }) }},
		{"first line changed", ".2: line 1: was changed", func() { edit(t, all[1], func(s string) string { return strings.Replace(s, "begin", "BEGIN", 1) }) }},
		{"end cut off", ".2: line %d: sequence", func() { edit(t, all[1], func(s string) string { return s[:strings.LastIndex(s[:len(s)-1], "\n")+1] }) }},
		{"end torn", ".2: line %d: is no line", func() { edit(t, all[1], func(s string) string { return s[:len(s)-9] }) }},
		{"newline lost", ".2: line %d: has lost its end", func() { edit(t, all[1], func(s string) string { return s[:len(s)-1] }) }},
		{"last line changed", ".2: line %d: was changed, with its checksum", func() {
			edit(t, all[1], func(s string) string {
				at := strings.LastIndex(s[:len(s)-1], "\n") + 1
				return s[:at] + resum(strings.Replace(s[at:len(s)-1], "allowed", "refused", 1)) + "\n"
			})
		}},
		{"emptied", ".2: line 1: is missing", func() { edit(t, all[1], func(string) string { return "" }) }},
		{"file removed", ".1: line %d: sequences", func() { ok(t, os.Remove(all[1])) }},
	} {
		whole := read(t, all[1])
		test.tamper()
		given := slices.DeleteFunc(slices.Clone(all), func(f string) bool { return !exists(f) })
		_, err := audit.Verify(given, "")
		n := strings.Count(whole, "\n")
		if strings.HasPrefix(test.want, ".1") {
			n = strings.Count(read(t, all[0]), "\n") + 1
		}
		want := path + strings.Replace(test.want, "%d", fmt.Sprint(n), 1)
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", test.name, err, want)
		}
		ok(t, os.WriteFile(all[1], []byte(whole), 0o600))
	}
}

func edit(t *testing.T, path string, change func(string) string) {
	t.Helper()
	ok(t, os.WriteFile(path, []byte(change(read(t, path))), 0o600))
}

func TestKeep(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	l := open(t, audit.Config{Path: path, MaxBytes: 1, Keep: 2})
	for i := range 7 {
		ok(t, l.Write(ctx, call(fmt.Sprint(i))))
	}
	shut(t, l)
	if got, want := files(t, path), []string{path + ".5", path + ".6", path}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if c := holds(t, files(t, path)...); c.First < 2 {
		t.Errorf("got %+v", c)
	}
}

// TestMovedFile: by rename, as logrotate does it, with and without a signal, and
// with an empty file in its place.
func TestMovedFile(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"reopen", "found out", "replaced"} {
		path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
		l := open(t, audit.Config{Path: path})
		ok(t, l.Intend(ctx, intent("i")))
		l.Reopen() // while nothing was moved: nothing happens
		ok(t, l.Write(ctx, call("before")))
		moved := path + "-20261125"
		ok(t, os.Rename(path, moved))
		if way == "replaced" {
			put(t, filepath.Dir(path), "audit.log", "")
		}
		if way == "reopen" {
			l.Reopen()
		}
		for !exists(path) || read(t, path) == "" {
			ok(t, l.Write(ctx, call("meanwhile")))
		}
		ok(t, l.Write(ctx, outcome("i", "APPLIED", "")))
		shut(t, l)
		if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 2 {
			t.Errorf("%s: got %v, want two files", way, entries)
		}
		if c := holds(t, path, moved); c.Files[0] != moved || len(c.Open) != 0 {
			t.Errorf("%s: got %+v, want one chain", way, c)
		}
	}
}

// TestLink: a path that is a link leads to where files are moved and begun.
func TestLink(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "volume.log"), callContext(t)
	link := filepath.Join(t.TempDir(), "audit.log")
	ok(t, os.Symlink(path, link))
	if _, err := audit.Open(audit.Config{Path: link}); err == nil || !strings.Contains(err.Error(), "leads nowhere") {
		t.Errorf("a link to nothing: got %v, want that it leads nowhere", err)
	}
	ok(t, os.WriteFile(path, nil, 0o600))
	l := open(t, audit.Config{Path: link, MaxBytes: 1})
	ok(t, l.Write(ctx, call("a")))
	ok(t, l.Write(ctx, call("b")))
	shut(t, l)
	if target, err := os.Readlink(link); err != nil || target != path {
		t.Errorf("got a link to %q, %v, want it as it was", target, err)
	}
	holds(t, path+".1", path)
}

// TestNumbersOfOthers: the file that was written last is found, whatever its number.
func TestNumbersOfOthers(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	l := open(t, audit.Config{Path: path})
	ok(t, l.Write(ctx, call("a")))
	ok(t, os.Rename(path, path+".2")) // as logrotate counts, the oldest last
	l.Reopen()
	for again := time.Tick(time.Millisecond); !exists(path); {
		<-again
	}
	ok(t, l.Intend(ctx, intent("i")))
	shut(t, l)
	ok(t, os.Rename(path, path+".1"))
	l = open(t, audit.Config{Path: path})
	if got := l.Unclosed(); len(got) != 1 || got[0].ID != "i" {
		t.Errorf("got the open intents %+v, want that of the newest file", got)
	}
	shut(t, l)
	holds(t, path, path+".1", path+".2")
}

// TestAnothersFile at the path is not moved away: nothing is written until it is gone.
func TestAnothersFile(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	l := open(t, audit.Config{Path: path})
	ok(t, l.Write(ctx, call("a")))
	ok(t, os.Rename(path, path+"-shipped"))
	other := open(t, audit.Config{Path: path})
	l.Reopen()
	var err error
	for again := time.Tick(time.Millisecond); err == nil; <-again {
		err = l.Write(ctx, call("b"))
	}
	if !errors.Is(err, audit.ErrUnavailable) || !strings.Contains(err.Error(), "another process") {
		t.Errorf("got %v, want that another process has the file", err)
	}
	ok(t, other.Write(ctx, call("of the other")))
	shut(t, other)
	ok(t, os.Remove(path))
	ok(t, l.Write(ctx, call("c")))
	shut(t, l)
	holds(t, path, path+"-shipped")
}

// TestEmptiedFile: by copy and truncate.
func TestEmptiedFile(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	l := open(t, audit.Config{Path: path})
	ok(t, l.Write(ctx, call("before")))
	copied := put(t, filepath.Dir(path), "copy", read(t, path))
	ok(t, os.Truncate(path, 0))
	l.Reopen()
	for again := time.Tick(time.Millisecond); !strings.Contains(read(t, path), "begin"); {
		<-again
	}
	ok(t, l.Write(ctx, call("after")))
	shut(t, l)
	holds(t, path, copied)
}

// TestStoppedRotation: whatever a kill in the middle of a rotation leaves, the
// chain and the open intents are found.
func TestStoppedRotation(t *testing.T) {
	t.Parallel()
	for _, empty := range []bool{false, true} {
		dir := t.TempDir()
		path, ctx := filepath.Join(dir, "audit.log"), callContext(t)
		l := open(t, audit.Config{Path: path})
		ok(t, l.Intend(ctx, intent("i")))
		shut(t, l)
		ok(t, os.Rename(path, path+".1"))
		put(t, dir, "audit.log.new", "half a l")
		if empty {
			put(t, dir, "audit.log", "")
		}
		l = open(t, audit.Config{Path: path})
		if got := l.Unclosed(); len(got) != 1 || got[0].ID != "i" {
			t.Errorf("got %+v unclosed, want the intent", got)
		}
		shut(t, l)
		if c := holds(t, path, path+".1"); c.Lines != 4 || exists(path+".new") {
			t.Errorf("got %+v, want one chain of 4 lines", c)
		}
	}
}

// TestRotationFails: the present file goes on.
func TestRotationFails(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	var full atomic.Bool
	cfg := audit.Config{Path: path, MaxBytes: 1500}
	l := open(t, cfg.Wrap(func(f *os.File) audit.File {
		refuse := full.Load()
		return &faulty{File: f, write: func(b []byte) (int, error) {
			if refuse {
				return 0, syscall.ENOSPC
			}
			return all(b)
		}}
	}))
	full.Store(true)
	for i := range 10 {
		ok(t, l.Write(ctx, call(fmt.Sprint(i))))
	}
	if got := files(t, path); len(got) != 1 || exists(path+".new") {
		t.Errorf("got %q, want one file", got)
	}
	full.Store(false)
	ok(t, l.Write(ctx, call("rotates")))
	shut(t, l)
	if c := holds(t, files(t, path)...); len(c.Files) != 2 {
		t.Errorf("got %+v, want two files", c)
	}
}

// TestSeveralChains: those of several brokers together.
func TestSeveralChains(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	one, two, three := put(t, dir, "1", join(sample(t, 3))), put(t, dir, "2", join(sample(t, 4))), put(t, dir, "3", join(sample(t, 5)))
	report, err := audit.Verify([]string{three, one, two}, holds(t, two).Head)
	if err != nil || len(report.Chains) != 3 || report.HeadAt != two+": line 4 (sequence 4)" {
		t.Errorf("got %+v, %v", report, err)
	}
	for _, file := range []string{one, three} {
		edit(t, file, func(s string) string { return strings.Replace(s, "allowed", "refused", 1) })
	}
	report, err = audit.Verify([]string{one, two, three}, "")
	if len(report.Chains) != 1 || err == nil || !strings.Contains(err.Error(), one+": line 2: ") || !strings.Contains(err.Error(), three+": line 2: ") {
		t.Errorf("got %+v, %v, want one chain and both others named", report, err)
	}
	var first *audit.Tampered
	if !errors.As(err, &first) || first.File != one {
		t.Errorf("got %v first", first)
	}
}
