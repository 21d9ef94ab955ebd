package audit_test

import (
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/exto/secrets-broker/internal/fsync"
	"github.com/exto/secrets-broker/server/audit"
)

func TestLine(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	at := time.Date(2026, 11, 25, 20, 30, 1, 123456789, time.FixedZone("", 3600))
	l := open(t, audit.Config{Path: path, Now: func() time.Time { return at }})
	full := audit.Record{Type: audit.TypeOutcome, System: &audit.System{Build: "b"}}
	v := reflect.ValueOf(&full).Elem()
	for i := range v.NumField() {
		switch f := v.Field(i); f.Interface().(type) {
		case string:
			f.SetString("text of " + v.Type().Field(i).Name)
		case []string:
			f.Set(reflect.ValueOf([]string{"one", "two"}))
		case bool:
			f.SetBool(true)
		case int64, time.Duration:
			f.SetInt(int64(100 + i))
		}
	}
	full.System = &audit.System{Build: "b", Policy: "p", Revoked: "r", ClientCA: "a", Certificate: "c"}
	ok(t, l.Write(ctx, &full))
	ok(t, l.Write(ctx, &audit.Record{}))
	shut(t, l)
	all := records(t, path)
	if got := all[1].Record; !reflect.DeepEqual(got, full) {
		t.Errorf("got  %+v\nwant %+v", got, full)
	}
	if r := all[1]; r.Format != 1 || r.Seq != 2 || r.Time != "2026-11-25T19:30:01.123456789Z" {
		t.Errorf("got format %d, seq %d, time %s", r.Format, r.Seq, r.Time)
	}
	text := strings.Split(read(t, path), "\n")
	if want := `{"format":1,"seq":3,"time":"2026-11-25T19:30:01.123456789Z","type":"call","prev":"` + all[2].Prev + `","crc":"` + all[2].CRC + `"}`; text[2] != want {
		t.Errorf("got %s\nwant %s", text[2], want)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("got mode %v, %v, want 0600", info.Mode(), err)
	}
}

func TestHostileStrings(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	l := open(t, audit.Config{Path: path})
	long := strings.Repeat("é\xff\x00\"", 5000)
	texts := []string{
		"\"}\n{\"format\":1,\"seq\":9", `\`, `\"`, "a\x00b\x1f\x7f", "\xff\xfe", "\xe2\x82", "\u2028\u2029 ü 漢 🔒", `","crc":"00000000"}`, "\r\n\t",
		`x","commit":"UNKNOWN","y":"`, strings.Repeat("漢", 400), strings.Repeat("x", 1024), strings.Repeat("x", 1025), long,
	}
	for i, text := range texts {
		ok(t, l.Write(ctx, &audit.Record{Peer: text, Detail: text, Keys: []string{text, "after"}, Generation: int64(i)}))
	}
	ok(t, l.Write(ctx, &audit.Record{Caller: long, Keys: slices.Repeat([]string{long}, 5000), ID: long, Reason: long}))
	shut(t, l)
	all := records(t, path)[1:]
	if len(all) != len(texts)+1 {
		t.Fatalf("got %d lines, want %d", len(all), len(texts)+1)
	}
	for i, text := range texts {
		want := string([]rune(text))
		got := all[i].Peer
		if len(text) <= 1024 && got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if len(text) > 1024 && (!strings.HasSuffix(got, "…") || len(got) > 3*1024 || len([]rune(got)) < 300) {
			t.Errorf("got %d bytes of %d, want them cut", len(got), len(text))
		}
		if all[i].Keys[1] != "after" {
			t.Errorf("got keys %q", all[i].Keys)
		}
	}
	if got := len(all[len(texts)].Keys); got != 256 {
		t.Errorf("got %d keys, want 256", got)
	}
	holds(t, path)
}

func TestIntents(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	metrics := prometheus.NewRegistry()
	l := open(t, audit.Config{Path: path, Metrics: metrics})
	deleted := intent("deleted")
	deleted.Deleted = true
	for _, r := range []*audit.Record{intent("done"), intent("unknown"), intent("settled"), deleted} {
		ok(t, l.Intend(ctx, r))
	}
	ok(t, l.Write(ctx, outcome("done", "APPLIED", "")))
	ok(t, l.Write(ctx, outcome("unknown", "UNKNOWN", "")))
	ok(t, l.Write(ctx, outcome("settled", "UNKNOWN", "")))
	ok(t, l.Write(ctx, outcome("settled", "UNKNOWN", "applied")))
	if got := metric(t, metrics, "open_intents"); got != 2 {
		t.Errorf("got %v open intents, want 2", got)
	}
	shut(t, l)
	if got := holds(t, path).Open; !slices.Equal(got, []string{"deleted", "unknown"}) {
		t.Errorf("verify: got %q open", got)
	}
	metrics = prometheus.NewRegistry()
	l = open(t, audit.Config{Path: path, Metrics: metrics})
	want := []audit.Record{*intent("unknown"), *deleted}
	want[0].Type, want[1].Type = audit.TypeIntent, audit.TypeIntent
	if got := l.Unclosed(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	ok(t, l.Write(ctx, outcome("unknown", "UNKNOWN", "not applied")))
	ok(t, l.Write(ctx, outcome("deleted", "NOT_APPLIED", "")))
	if got := metric(t, metrics, "open_intents"); got != 0 {
		t.Errorf("got %v open intents, want 0", got)
	}
	if err := l.Write(ctx, outcome("deleted", "NOT_APPLIED", "")); err != nil {
		t.Errorf("an outcome without intent: got %v", err)
	}
	shut(t, l)
	if got := open(t, audit.Config{Path: path}).Unclosed(); len(got) != 0 {
		t.Errorf("got %+v unclosed, want none", got)
	}
}

// TestFsyncIsShared holds the first fsync until all intents of 64 writers are
// written: so it holds up no write, and they share the next.
func TestFsyncIsShared(t *testing.T) {
	t.Parallel()
	const writers, each = 64, 20
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	metrics := prometheus.NewRegistry()
	all := make(chan struct{})
	cfg := audit.Config{Path: path, Metrics: metrics}
	l := open(t, cfg.Wrap(func(f *os.File) audit.File {
		first := true // that of the file's beginning
		return &faulty{File: f, sync: func() error {
			if !first {
				<-all
			}
			first = false
			return nil
		}}
	}))
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if err := l.Intend(ctx, intent(fmt.Sprintf("%d-%d", w, i))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for metric(t, metrics, "open_intents") < writers {
		if err := l.Write(ctx, call("meanwhile")); err != nil { // a read's record waits for no fsync
			t.Fatal(err)
		}
	}
	close(all)
	wg.Wait()
	fsyncs := metric(t, metrics, "fsyncs_total")
	if fsyncs >= writers*each {
		t.Errorf("got %v fsyncs of %d intents, want them shared", fsyncs, writers*each)
	}
	t.Logf("%d writers: %.1f intents an fsync", writers, writers*each/fsyncs)
}

func TestCounts(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	l := open(t, audit.Config{Path: path})
	alice := audit.Record{Caller: "alice", Serial: "1", Action: "verify", Decision: "allowed", Code: "OK", ID: "no two are the same", Peer: "p"}
	others := []audit.Record{alice, alice, alice, alice, alice, alice}
	others[0].Caller, others[1].Serial, others[2].Action, others[3].Decision, others[4].Code, others[5].Reason = "b", "2", "get", "refused", "X", "Y"
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 250 {
				if err := l.Count(&alice); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range others {
		ok(t, l.Count(&others[i]))
	}
	wg.Wait()
	ok(t, l.Write(ctx, call("after")))
	shut(t, l)
	sums := map[string]int64{}
	for _, r := range records(t, path) {
		if r.Type == audit.TypeCount {
			sums[strings.Join([]string{r.Caller, r.Serial, r.Action, r.Decision, r.Code, r.Reason, r.ID, r.Peer}, " ")] += r.Count
		}
	}
	want := map[string]int64{
		"alice 1 verify allowed OK   ": 1000,
		"b 1 verify allowed OK   ":     1, "alice 2 verify allowed OK   ": 1, "alice 1 get allowed OK   ": 1,
		"alice 1 verify refused OK   ": 1, "alice 1 verify allowed X   ": 1, "alice 1 verify allowed OK Y  ": 1,
	}
	if !maps.Equal(sums, want) {
		t.Errorf("got %v, want %v", sums, want)
	}
	holds(t, path)
}

// TestIntentThatChanged: of an intent that was written twice the last one counts.
func TestIntentThatChanged(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	l := open(t, audit.Config{Path: path})
	ok(t, l.Intend(ctx, intent("i")))
	again := intent("i")
	again.Deleted, again.Version = true, "of the deleted one"
	ok(t, l.Intend(ctx, again))
	shut(t, l)
	l = open(t, audit.Config{Path: path})
	if got := l.Unclosed(); len(got) != 1 || !got[0].Deleted || got[0].Version != again.Version {
		t.Errorf("got %+v, want the second", got)
	}
	shut(t, l)
}

func TestOneProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, audit.Config{Path: path})
	if _, err := audit.Open(audit.Config{Path: path}); err == nil || err.Error() != "audit log "+path+": is in use by another process" {
		t.Errorf("got %v, want that it is in use", err)
	}
	shut(t, l)
	shut(t, open(t, audit.Config{Path: path}))
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("got %v, want the file alone", entries)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	good := sample(t, 3)
	damaged := strings.Replace(good[2], "allowed", "refused", 1)
	unreadable := put(t, dir, "unreadable", join(good))
	ok(t, os.Chmod(unreadable, 0))
	tests := []struct{ name, path, want string }{
		{"a directory", dir, "is no regular file"},
		{"a device", "/dev/null", "is no regular file"},
		{"no directory", dir + "/none/audit.log", "no such file"},
		{"text", put(t, dir, "text", "hello\nworld\n"), "line 1 is no line of an audit log"},
		{"half a line", put(t, dir, "half", "hello"), "holds no audit log"},
		{"the last line damaged", put(t, dir, "damaged", join([]string{good[0], good[1], damaged})), "line 3, the last one, was changed"},
		{"the first line dropped", put(t, dir, "dropped", join(good[1:])), "line 1 is not what a file begins with"},
	}
	if os.Getuid() != 0 {
		tests = append(tests, struct{ name, path, want string }{"unreadable", unreadable, "permission denied"})
	}
	for _, test := range tests {
		before, _ := os.ReadFile(test.path)
		_, err := audit.Open(audit.Config{Path: test.path})
		if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), test.path) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v, want one line with the path and %q", test.name, err, test.want)
		}
		if after, _ := os.ReadFile(test.path); string(after) != string(before) {
			t.Errorf("%s: the file was changed", test.name)
		}
	}
}

// TestHeadIsLogged: at the opening and the end, so that a cut shows.
func TestHeadIsLogged(t *testing.T) {
	t.Parallel()
	path, ctx := filepath.Join(t.TempDir(), "audit.log"), callContext(t)
	var text lines
	l := open(t, audit.Config{Path: path, Logger: slog.New(slog.NewTextHandler(&text, nil))})
	if n := len(text.with(`msg="audit log"`, "head=", "seq=1")); n != 1 {
		t.Errorf("got %d heads at the opening, want 1", n)
	}
	ok(t, l.Write(ctx, call("c")))
	shut(t, l)
	if n := len(text.with(`msg="audit log"`, "head="+holds(t, path).Head, "seq=2")); n != 1 {
		t.Errorf("got %d heads at the end, want 1", n)
	}
	if err := l.Write(ctx, call("late")); err == nil {
		t.Error("after Close: got no error")
	}
}

func benchmark(b *testing.B, writers int) {
	l := open(b, audit.Config{Path: filepath.Join(b.TempDir(), "audit.log")})
	ctx, record := callContext(b), call("0192f0c1-2b3c-7d4e-8f90-123456789abc")
	b.ReportAllocs()
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for range b.N/writers + min(1, max(0, b.N%writers-w)) {
				if err := l.Write(ctx, record); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkWrite(b *testing.B) {
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) { benchmark(b, writers) })
	}
}

// TestSyncedByTheKernel: a log's file takes no thread while it is synced.
func TestSyncedByTheKernel(t *testing.T) {
	t.Parallel()
	l := open(t, audit.Config{Path: filepath.Join(t.TempDir(), "audit.log")})
	if _, is := l.InUse().(*fsync.File); !is {
		t.Errorf("the file in use is %T", l.InUse())
	}
	shut(t, l)
}
