package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/exto/secrets-broker/server/audit"
)

func TestAuditVerify(t *testing.T) {
	t.Parallel()
	dir, ctx := t.TempDir(), context.Background()
	path := filepath.Join(dir, "audit.log")
	for range 2 {
		l := must2(audit.Open(audit.Config{Path: path, MaxBytes: 1000}))(t)
		for _, id := range []string{"one", "two", "three"} {
			if err := errors.Join(l.Intend(ctx, &audit.Record{ID: id, Action: "put"}), l.Write(ctx, &audit.Record{Type: audit.TypeOutcome, ID: id})); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(l.Intend(ctx, &audit.Record{ID: "open", Action: "put"}), l.Close(ctx)); err != nil {
			t.Fatal(err)
		}
	}
	files := must2(filepath.Glob(path + "*"))(t)
	if len(files) < 3 {
		t.Fatalf("got files %q, want at least 3", files)
	}
	verify := func(code int, args ...string) string {
		t.Helper()
		cmd := exec.Command(binary, append([]string{"audit", "verify"}, args...)...)
		out, err := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != code {
			t.Errorf("%q: got exit code %d (%v), want %d: %s", args, got, err, code, out)
		}
		return string(out)
	}
	holds := func(out string, parts ...string) {
		t.Helper()
		for _, part := range parts {
			if !strings.Contains(out, part) {
				t.Errorf("got %q, want %q in it", out, part)
			}
		}
	}
	report := must2(audit.Verify(files, ""))(t)
	head := report.Chains[0].Head
	holds(verify(0, files...), "chain "+report.Chains[0].ID+" holds: ", " lines, sequence 1 to ", "head "+head, "intents without outcome: 1, such as open")
	holds(verify(0, append(files, "--head", head)...), "head "+head+" stands at "+path+": line ")
	holds(verify(0, path), "it goes on from older files, which were not given")
	holds(verify(1, append(files, "--head="+strings.Repeat("ab", 32))...), "no line has this hash")
	holds(verify(1, append(files, "--head=abc")...), "want 64 hex digits")
	holds(verify(1, dir+"/none"), "no such file")
	holds(verify(1), "expected \"<file> ...\"")

	whole := must2(os.ReadFile(path))(t)
	torn := append(whole, []byte(`{"format":1,"se`)...)
	if err := os.WriteFile(path, torn, 0o600); err != nil {
		t.Fatal(err)
	}
	holds(verify(0, files...), "is torn, as a kill in the middle of a write leaves it; the next start cuts it off")
	if err := os.WriteFile(path, []byte(strings.Replace(string(whole), `"put"`, `"get"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := verify(1, files...), "broker: "+path+": line 2: was changed: its checksum does not fit\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
