package audit_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/exto/secrets-broker/server/audit"
)

func TestMain(m *testing.M) {
	if child := os.Getenv("AUDIT_TEST_CHILD"); child != "" {
		os.Exit(children[child]())
	}
	goleak.VerifyTestMain(m)
}

func callContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// open opens a log that is closed with the test, if it wasn't before.
func open(t testing.TB, cfg audit.Config) *audit.Log {
	t.Helper()
	l, err := audit.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close(callContext(t)) })
	return l
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func shut(t testing.TB, l *audit.Log) {
	t.Helper()
	ok(t, l.Close(callContext(t)))
}

func call(id string) *audit.Record {
	return &audit.Record{
		Type: audit.TypeCall, ID: id, Caller: "spiffe://console.exto/console-api", Serial: "7b0c5f9f3ad1e2", Peer: "10.0.0.7:51234",
		Action: "get", Key: "instance-demo-dburi", Decision: "allowed", Code: "OK", Version: "0192f0c12b3c7d4e8f90123456789abc", Generation: 3,
		Duration: 12345 * time.Nanosecond,
	}
}

func intent(id string) *audit.Record {
	return &audit.Record{ID: id, Caller: "spiffe://console.exto/worker", Action: "put", Key: "instance-demo-dburi", Decision: "allowed", RequestID: "r-" + id, OperationID: "o-" + id}
}

func outcome(id, commit, settled string) *audit.Record {
	return &audit.Record{Type: audit.TypeOutcome, ID: id, Action: "put", Code: "OK", Commit: commit, Settled: settled}
}

// logged is a line as any program with a JSON parser sees it.
type logged struct {
	Format int    `json:"format"`
	Seq    int64  `json:"seq"`
	Time   string `json:"time"`
	Prev   string `json:"prev"`
	CRC    string `json:"crc"`
	audit.Record
}

func read(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	ok(t, err)
	return string(b)
}

// records reads the files one after the other.
func records(t testing.TB, paths ...string) (all []logged) {
	t.Helper()
	for _, path := range paths {
		for line := range strings.Lines(read(t, path)) {
			var r logged
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				t.Fatalf("%s: %v in %q", path, err, line)
			}
			all = append(all, r)
		}
	}
	return all
}

func actions(all []logged, kind audit.Type) (some []string) {
	for _, r := range all {
		if r.Type == kind {
			some = append(some, strings.TrimSpace(r.Action+" "+r.ID))
		}
	}
	return some
}

// holds verifies files that are one chain.
func holds(t testing.TB, paths ...string) audit.Chain {
	t.Helper()
	report, err := audit.Verify(paths, "")
	if err != nil || len(report.Chains) != 1 {
		t.Fatalf("got %d chains and %v, want one that holds", len(report.Chains), err)
	}
	return report.Chains[0]
}

// resum gives a line the checksum that it should have.
func resum(line string) string {
	at := strings.LastIndex(line, `,"crc":"`)
	return fmt.Sprintf(`%s,"crc":"%08x"}`, line[:at], crc32.Checksum([]byte(line[:at]), crc32.MakeTable(crc32.Castagnoli)))
}

func join(lines []string) string { return strings.Join(lines, "\n") + "\n" }

// sample is a log of n lines.
func sample(t testing.TB, n int) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, audit.Config{Path: path})
	for i := range n - 1 {
		ok(t, l.Write(callContext(t), call(fmt.Sprintf("c%d", i))))
	}
	shut(t, l)
	return strings.Split(strings.TrimSuffix(read(t, path), "\n"), "\n")
}

func put(t testing.TB, dir, name, content string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	ok(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// lines collects the text of a slog handler.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) with(parts ...string) (some []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for s := bufio.NewScanner(bytes.NewReader(l.b.Bytes())); s.Scan(); {
		if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(s.Text(), p) }) {
			some = append(some, s.Text())
		}
	}
	return some
}

// metric is the sum of a metric over its labels.
func metric(t testing.TB, r *prometheus.Registry, name string) (sum float64) {
	t.Helper()
	families, err := r.Gather()
	ok(t, err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "secrets_broker_audit_"+name {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func isHash(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 32
}
