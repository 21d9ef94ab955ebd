package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

func TestDevFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := devIn(t, dir)
	private := map[string]bool{"audit.log": true, "store.db": true, "store.key": true}
	want := []string{".gitignore", "audit.log", "ca-key.pem", "ca.pem", "console-api-key.pem", "console-api.pem", "instance-demo-key.pem", "instance-demo.pem",
		"operator-key.pem", "operator.pem", "policy.yaml", "server-key.pem", "server.pem", "store.db", "store.key", "worker-key.pem", "worker.pem"}
	entries := must2(os.ReadDir(filepath.Join(dir, devDir)))(t)
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
		info := must2(e.Info())(t)
		if (private[e.Name()] || strings.HasSuffix(e.Name(), "-key.pem")) && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", e.Name(), info.Mode())
		}
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("got files %v, want %v", got, want)
	}
	if ignore := must2(os.ReadFile(filepath.Join(dir, devDir, ".gitignore")))(t); strings.TrimSpace(string(ignore)) != "*" {
		t.Errorf("got .gitignore %q, want *", ignore)
	}
	ctx := callContext(t)
	made := must2(p.as("console-api").PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", uriKind), Value: "postgres://h/db"}))(t)

	// Again on the same folder: the same CA, store and key, and what a person
	// changed in the policy.
	policy := filepath.Join(dir, devDir, "policy.yaml")
	edited := append(must2(os.ReadFile(policy))(t), "# mine\n"...)
	if err := os.WriteFile(policy, edited, 0o644); err != nil {
		t.Fatal(err)
	}
	ca := must2(os.ReadFile(filepath.Join(dir, devDir, "ca.pem")))(t)
	p.kill()
	p = devIn(t, dir)
	out := must2(p.as("worker").GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", uriKind)}))(t)
	if out.GetMetadata().GetVersion() != made.GetMetadata().GetVersion() {
		t.Errorf("got %v, want what was put before", out.GetMetadata())
	}
	if string(must2(os.ReadFile(filepath.Join(dir, devDir, "ca.pem")))(t)) != string(ca) || string(must2(os.ReadFile(policy))(t)) != string(edited) {
		t.Error("the CA or the policy was replaced")
	}
}

// must2 is must for calls with two results.
func must2[T any](result T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		return must(t, result, err)
	}
}

// TestDevNamesWhatCanBeDone: what is wrong in its folder is nothing that a setting mends.
func TestDevNamesWhatCanBeDone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	devIn(t, dir)
	refused := func(dir string) {
		t.Helper()
		code, _, stderr := runBroker(t, dir, nil, "dev", "--listen-address=127.0.0.1:0", "--metrics-address=127.0.0.1:0")
		if code != 1 || strings.Count(stderr, "\n") != 1 || strings.Contains(stderr, "BROKER_") || !strings.Contains(stderr, "run broker dev in another folder") {
			t.Errorf("got exit code %d and standard error %q, want 1 and one line that says what to do", code, stderr)
		}
	}
	refused(dir)
	other := t.TempDir()
	if err := os.WriteFile(filepath.Join(other, devDir), nil, 0o600); err != nil { // where the folder is to be
		t.Fatal(err)
	}
	refused(other)
}

// TestPrintedCalls pastes what dev prints into a shell, as the README shows it. The go
// command takes its time to see that it need not build grpcurl: it is asked for the first
// line only, and where that program is.
func TestPrintedCalls(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	root := must2(filepath.Abs("../.."))(t)
	for _, name := range []string{"proto", "tools", "go.mod", "go.sum"} { // a clone, as far as grpcurl needs it
		if err := os.Symlink(filepath.Join(root, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	p := devIn(t, dir)
	p.out.await(regexp.MustCompile(`/RecoverSecret\n`))
	const goTool = "go tool -modfile=tools/go.mod "
	built := exec.Command("sh", "-c", goTool+"-n grpcurl")
	built.Dir = dir
	grpcurl := strings.TrimSpace(string(must2(built.Output())(t)))
	var answers []map[string]any
	for line := range strings.Lines(p.out.String()) {
		if !strings.HasPrefix(line, "go ") {
			continue
		}
		if !strings.HasPrefix(line, goTool+"grpcurl ") || !strings.Contains(line, "-import-path proto") {
			t.Errorf("got line %q", line)
		}
		if len(answers) > 0 {
			line = strings.Replace(line, goTool+"grpcurl", grpcurl, 1)
		}
		cmd := exec.Command("sh", "-c", line)
		cmd.Dir = dir
		var failure strings.Builder // where go also says what it downloads
		cmd.Stderr = &failure
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v\n%s%s", line, err, out, failure.String())
		}
		var answer map[string]any
		if err := json.Unmarshal(out, &answer); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
		answers = append(answers, answer)
	}
	if len(answers) != 8 {
		t.Fatalf("got %d calls, want 8", len(answers))
	}
	at := func(answer int, path ...string) any {
		var v any = answers[answer]
		for _, p := range path {
			m, _ := v.(map[string]any)
			v = m[p]
		}
		return v
	}
	for _, want := range []struct {
		answer int
		path   string
		value  any
	}{
		{0, "metadata.key", "instance-demo-dburi"}, {0, "metadata.generation", "1"}, {0, "metadata.state", "SECRET_STATE_ACTIVE"},
		{0, "metadata.createdBy", "spiffe://console.exto/console-api"},
		{1, "value", "mongodb://app:correct-horse@db-7:27017/orders"}, {1, "freshness.source", "FRESHNESS_SOURCE_CACHE"},
		{2, "metadata.key", "instance-demo"},
		{3, "result", "VERIFY_RESULT_NO_MATCH"},
		{4, "redactedValue", "mongodb://app:***@db-7:27017/orders"},
		{5, "metadata.state", "SECRET_STATE_DELETED"},
		{7, "metadata.state", "SECRET_STATE_ACTIVE"},
	} {
		if got := at(want.answer, strings.Split(want.path, ".")...); got != want.value {
			t.Errorf("call %d: got %s %v, want %v", want.answer+1, want.path, got, want.value)
		}
	}
	if token, _ := at(2, "value").(string); !regexp.MustCompile(`^exto_rt_[A-Za-z0-9_-]{43}_[0-9A-Za-z]{6}$`).MatchString(token) {
		t.Error("got no token of the broker's form")
	}
	if listed, _ := at(6, "secrets").([]any); len(listed) != 2 {
		t.Errorf("got %v, want both secrets", listed)
	}
}
