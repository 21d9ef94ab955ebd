package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// settings are the environment of a broker that serves from a folder that dev
// made.
func settings(dir string) map[string]string {
	in := func(name string) string { return filepath.Join(dir, devDir, name) }
	return map[string]string{
		"SECRET_STORE_PROVIDER":     "embedded",
		"BROKER_LISTEN_ADDRESS":     "127.0.0.1:0",
		"BROKER_METRICS_ADDRESS":    "127.0.0.1:0",
		"BROKER_TLS_CERT_FILE":      in("server.pem"),
		"BROKER_TLS_KEY_FILE":       in("server-key.pem"),
		"BROKER_TLS_CLIENT_CA_FILE": in("ca.pem"),
		"BROKER_POLICY_FILE":        in("policy.yaml"),
		"BROKER_DATA_DIR":           in("."),
	}
}

// environ is the environment with changes; an empty value takes a variable away.
func environ(base map[string]string, changes ...string) []string {
	all := map[string]string{}
	for k, v := range base {
		all[k] = v
	}
	for i := 0; i < len(changes); i += 2 {
		all[changes[i]] = changes[i+1]
	}
	var env []string
	for k, v := range all {
		if v != "" {
			env = append(env, k+"="+v)
		}
	}
	return env
}

func TestStartEndsWithOneLine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	running := devIn(t, dir) // has the store and two ports
	base := settings(dir)
	bad := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("trust_domain: console.exto\nrules:\n  - identity: spiffe://console.exto/x\n    alow: [get]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Copies of the store, one thing wrong with each.
	damaged := func(name string, change func(store, key string)) string {
		folder := filepath.Join(dir, name)
		if err := os.Mkdir(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, file := range []string{"store.db", "store.key"} {
			if err := os.WriteFile(filepath.Join(folder, file), must2(os.ReadFile(filepath.Join(dir, devDir, file)))(t), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		change(filepath.Join(folder, "store.db"), filepath.Join(folder, "store.key"))
		return folder
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	other := t.TempDir()
	devIn(t, other).kill()
	in := func(name string) string { return filepath.Join(dir, devDir, name) }
	otherKey := must2(os.ReadFile(filepath.Join(other, devDir, "store.key")))(t)

	for name, test := range map[string]struct {
		args    []string
		changes []string
		want    string
	}{
		"unknown flag":          {args: []string{"--no-such"}, want: "--no-such"},
		"bad duration":          {changes: []string{"BROKER_SHUTDOWN_TIMEOUT", "soon"}, want: "BROKER_SHUTDOWN_TIMEOUT"},
		"negative duration":     {changes: []string{"BROKER_EMBEDDED_RETENTION", "-1h"}, want: "BROKER_EMBEDDED_RETENTION"},
		"bad level":             {args: []string{"--log-level=loud"}, want: "--log-level"},
		"bad format":            {changes: []string{"BROKER_LOG_FORMAT", "xml"}, want: "--log-format"},
		"unknown store":         {changes: []string{"SECRET_STORE_PROVIDER", "etcd"}, want: "SECRET_STORE_PROVIDER"},
		"no certificate":        {changes: []string{"BROKER_TLS_CERT_FILE", ""}, want: "BROKER_TLS_CERT_FILE"},
		"no key":                {changes: []string{"BROKER_TLS_KEY_FILE", ""}, want: "BROKER_TLS_KEY_FILE"},
		"no client CA":          {changes: []string{"BROKER_TLS_CLIENT_CA_FILE", ""}, want: "BROKER_TLS_CLIENT_CA_FILE"},
		"no policy":             {changes: []string{"BROKER_POLICY_FILE", ""}, want: "BROKER_POLICY_FILE"},
		"no data folder":        {changes: []string{"BROKER_DATA_DIR", ""}, want: "BROKER_DATA_DIR"},
		"absent certificate":    {changes: []string{"BROKER_TLS_CERT_FILE", "/absent.pem"}, want: "BROKER_TLS_CERT_FILE (--tls-cert-file): stat /absent.pem"},
		"absent key":            {changes: []string{"BROKER_TLS_KEY_FILE", "/absent.pem"}, want: "BROKER_TLS_KEY_FILE (--tls-key-file): stat /absent.pem"},
		"a cert that is none":   {changes: []string{"BROKER_TLS_CERT_FILE", bad}, want: "BROKER_TLS_CERT_FILE (--tls-cert-file): " + bad},
		"another's key":         {changes: []string{"BROKER_TLS_KEY_FILE", in("worker-key.pem")}, want: "BROKER_TLS_KEY_FILE (--tls-key-file): " + in("worker-key.pem")},
		"a CA that is no PEM":   {changes: []string{"BROKER_TLS_CLIENT_CA_FILE", bad}, want: "BROKER_TLS_CLIENT_CA_FILE (--tls-client-ca-file): " + bad},
		"bad policy":            {changes: []string{"BROKER_POLICY_FILE", bad}, want: "BROKER_POLICY_FILE (--policy-file): " + bad + ": line 4"},
		"absent revoked file":   {changes: []string{"BROKER_TLS_REVOKED_FILE", "/absent"}, want: "BROKER_TLS_REVOKED_FILE (--tls-revoked-file): stat /absent"},
		"bad revoked file":      {changes: []string{"BROKER_TLS_REVOKED_FILE", bad}, want: "BROKER_TLS_REVOKED_FILE (--tls-revoked-file): " + bad + ": line 1"},
		"reads, no vault":       {changes: []string{"BROKER_VAULT_READS_PER_SECOND", "-1"}, want: "BROKER_VAULT_READS_PER_SECOND"},
		"writes, no vault":      {changes: []string{"BROKER_VAULT_WRITES_PER_SECOND", "NaN", "SECRET_STORE_PROVIDER", "noop"}, want: "BROKER_VAULT_WRITES_PER_SECOND"},
		"port taken":            {changes: []string{"BROKER_LISTEN_ADDRESS", running.addr, "SECRET_STORE_PROVIDER", "noop"}, want: "BROKER_LISTEN_ADDRESS"},
		"metrics port taken":    {changes: []string{"BROKER_METRICS_ADDRESS", running.metrics, "SECRET_STORE_PROVIDER", "noop"}, want: "BROKER_METRICS_ADDRESS"},
		"no folder of the log":  {changes: []string{"BROKER_AUDIT_FILE", "/absent/audit.log", "SECRET_STORE_PROVIDER", "noop"}, want: "BROKER_AUDIT_FILE (--audit-file): audit log /absent/audit.log"},
		"folder of no files":    {changes: []string{"BROKER_AUDIT_FILE", "/proc/audit.log", "SECRET_STORE_PROVIDER", "noop"}, want: "BROKER_AUDIT_FILE (--audit-file): audit log "},
		"log is a folder":       {changes: []string{"BROKER_AUDIT_FILE", dir, "SECRET_STORE_PROVIDER", "noop"}, want: "BROKER_AUDIT_FILE (--audit-file): audit log " + dir + ": is no regular file"},
		"log is another file":   {changes: []string{"BROKER_AUDIT_FILE", bad, "SECRET_STORE_PROVIDER", "noop"}, want: "BROKER_AUDIT_FILE (--audit-file): audit log " + bad + ": line 1 is no line of an audit log"},
		"log in use":            {changes: []string{"BROKER_AUDIT_FILE", in("audit.log"), "SECRET_STORE_PROVIDER", "noop"}, want: "BROKER_AUDIT_FILE (--audit-file): audit log " + in("audit.log") + ": is in use"},
		"folder is a file":      {changes: []string{"BROKER_DATA_DIR", bad}, want: "BROKER_DATA_DIR (--data-dir)"},
		"store in use":          {want: "in use by another process"},
		"key of another store":  {changes: []string{"BROKER_DATA_DIR", damaged("wrong-key", func(_, key string) { check(os.WriteFile(key, otherKey, 0o600)) })}, want: "store.key"},
		"key missing":           {changes: []string{"BROKER_DATA_DIR", damaged("no-key", func(_, key string) { check(os.Remove(key)) })}, want: "store.key"},
		"store cut off":         {changes: []string{"BROKER_DATA_DIR", damaged("cut", func(store, _ string) { check(os.Truncate(store, 3*4096)) })}, want: "store.db"},
		"store empty":           {changes: []string{"BROKER_DATA_DIR", damaged("empty", func(store, _ string) { check(os.Truncate(store, 0)) })}, want: "store.db"},
		"store is another file": {changes: []string{"BROKER_DATA_DIR", damaged("foreign", func(store, _ string) { check(os.WriteFile(store, []byte(strings.Repeat("x", 9000)), 0o600)) })}, want: "store.db"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			code, stdout, stderr := runBroker(t, dir, environ(base, test.changes...), append([]string{"serve"}, test.args...)...)
			line, more, _ := strings.Cut(stderr, "\n")
			if code != 1 || line == "" || more != "" || stdout != "" {
				t.Fatalf("got exit code %d, standard output %q and standard error %q, want 1 and one line", code, stdout, stderr)
			}
			if !strings.Contains(line, test.want) {
				t.Errorf("got %q, want it to name %s", line, test.want)
			}
			if name != "unknown flag" && !strings.Contains(line, "set it to") && !strings.Contains(line, "set them to") {
				t.Errorf("got %q, want it to say what to set", line)
			}
			if variable := strings.SplitN(test.want, " ", 2)[0]; strings.HasPrefix(variable, "BROKER_TLS_") && strings.Count(line, "BROKER_") != 1 {
				t.Errorf("got %q, want it to name %s and no other setting", line, variable)
			}
		})
	}
}

func TestServe(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	devIn(t, dir).kill()
	base := settings(dir)
	// The flag wins over the variable.
	p := launch(t, dir, environ(base, "BROKER_DATA_DIR", "/absent"), binary, "serve", "--data-dir="+filepath.Join(dir, devDir))
	p.listen()
	if want := `msg="secret store: embedded" path=` + filepath.Join(dir, devDir, "store.db"); !strings.Contains(p.err.String(), want) {
		t.Errorf("got log %s, want %s", p.err, want)
	}
	ctx := callContext(t)
	must2(p.as("console-api").PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo-metrics", oidcKind), Value: "abc"}))(t)

	ask := func(path string) (int, string) {
		t.Helper()
		resp := must2(http.Get("http://" + p.metrics + path))(t)
		defer func() { _ = resp.Body.Close() }()
		return resp.StatusCode, string(must2(io.ReadAll(resp.Body))(t))
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, body := ask(path); code != http.StatusOK {
			t.Errorf("%s: got %d %s", path, code, body)
		}
	}
	_, metrics := ask("/metrics")
	for _, want := range []string{`grpc_server_handled_total{grpc_code="OK",grpc_method="PutSecret"`, "go_goroutines", "process_open_fds"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics have no %s", want)
		}
	}
	if strings.Contains(metrics, "demo-metrics") {
		t.Error("a secret's name stands in the metrics")
	}

	_, port, err := net.SplitHostPort(p.metrics)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{}, {"--live"}} {
		for _, address := range []string{p.metrics, ":" + port, "0.0.0.0:" + port} {
			env := []string{"BROKER_METRICS_ADDRESS=" + address, "HTTP_PROXY=http://127.0.0.1:1", "http_proxy=http://127.0.0.1:1"}
			if code, _, stderr := runBroker(t, dir, env, append([]string{"healthcheck"}, args...)...); code != 0 {
				t.Errorf("healthcheck %v at %s: got %d, %s", args, address, code, stderr)
			}
		}
	}
	p.end(syscall.SIGTERM)
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("after SIGTERM: got exit code %d, want 0: %s", code, p.err)
	}
	if code, _, _ := runBroker(t, dir, []string{"BROKER_METRICS_ADDRESS=" + p.metrics}, "healthcheck"); code != 1 {
		t.Errorf("healthcheck of nothing: got exit code %d, want 1", code)
	}
	if out := besideAuditLines(p.out.String()); out != "" {
		t.Errorf("got standard output %q, want the audit log alone", out)
	}
}

// TestServeFollowsItsFiles: what is revoked while the broker runs is so within 5 s, and
// the metrics tell that it was taken.
func TestServeFollowsItsFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	devIn(t, dir).kill()
	revoked := filepath.Join(dir, "revoked")
	if err := os.WriteFile(revoked, []byte("# nothing yet\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := launch(t, dir, environ(settings(dir), "BROKER_TLS_REVOKED_FILE", revoked), binary, "serve")
	p.listen()
	c, other, ctx := p.as("worker"), p.as("console-api"), callContext(t)
	list := func(c secretsv1.SecretsBrokerServiceClient) error {
		_, err := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{})
		return err
	}
	if err := list(c); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(revoked, []byte("spiffe://console.exto/worker # left\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	promised, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for list(c) == nil {
		if promised.Err() != nil {
			t.Fatal("it is not revoked within 5 s")
		}
	}
	if reason, _ := told(list(c)); reason != "CALLER_UNKNOWN" {
		t.Errorf("got %q, want CALLER_UNKNOWN", reason)
	}
	if err := list(other); err != nil {
		t.Errorf("another caller: %v", err)
	}
	resp := must2(http.Get("http://" + p.metrics + "/metrics"))(t)
	defer func() { _ = resp.Body.Close() }()
	metrics := string(must2(io.ReadAll(resp.Body))(t))
	for _, want := range []string{`secrets_broker_config_file_ok{file="client_ca"} 1`, `secrets_broker_config_file_reloads_total{file="revoked"} 1`, `secrets_broker_config_file_reloads_total{file="policy"} 0`} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics have no %s", want)
		}
	}
}

func TestServeWithoutAVault(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	devIn(t, dir).kill()
	for _, provider := range []string{"", "noop"} {
		p := launch(t, dir, environ(settings(dir), "SECRET_STORE_PROVIDER", provider, "BROKER_LOG_FORMAT", "text"), binary, "serve")
		p.listen()
		if !strings.Contains(p.err.String(), `level=WARN msg="secret store: noop"`) {
			t.Errorf("got log %s, want a warning", p.err)
		}
		c, ctx := p.as("console-api"), callContext(t)
		for range 2 {
			out := must2(c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", oidcKind), Value: "abc"}))(t)
			if out.GetMetadata().GetGeneration() != 1 || out.GetMetadata().GetVersion() == "" || out.GetUnchanged() {
				t.Errorf("Put: got %v, want generation 1", out)
			}
		}
		rotated := must2(c.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: ref("demo", tokenKind)}))(t)
		if rotated.GetValue() == "" || rotated.GetMetadata().GetGeneration() != 1 {
			t.Errorf("Rotate: got %v, want a token", rotated.GetMetadata())
		}
		removed := must2(c.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: ref("demo", tokenKind)}))(t)
		if removed.GetMetadata().GetGeneration() != 1 || removed.GetMetadata().GetVersion() == "" {
			t.Errorf("Delete: got %v, want generation 1", removed)
		}
		_, err := c.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: ref("demo", tokenKind), MustMatchVersion: "v"})
		if reason, _ := told(err); reason != "VERSION_MISMATCH" {
			t.Errorf("Delete of a version: got %v", err)
		}
		_, err = c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind)})
		if reason, _ := told(err); reason != "SECRET_NOT_FOUND" {
			t.Errorf("Get: got %v", err)
		}
		_, err = c.RecoverSecret(ctx, &secretsv1.RecoverSecretRequest{Ref: ref("demo", tokenKind)})
		if reason, _ := told(err); reason != "SECRET_NOT_FOUND" {
			t.Errorf("Recover: got %v", err)
		}
		if list := must2(c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{ShowDeleted: true}))(t); len(list.GetSecrets()) != 0 || list.GetNextPageToken() != "" {
			t.Errorf("List: got %v, want nothing", list)
		}
		if n := strings.Count(p.err.String(), "keeps nothing"); n < 8 {
			t.Errorf("got %d warnings, want one for each operation", n)
		}
		p.kill()
	}
}

func TestPolicyCheck(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	good := filepath.Join(dir, "good.yaml")
	if err := os.WriteFile(good, must2(os.ReadFile("../../internal/devdir/policy.yaml"))(t), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := runBroker(t, dir, nil, "policy", "check", good); code != 0 || !strings.Contains(stdout, "good") {
		t.Errorf("got %d %q %q, want it good", code, stdout, stderr)
	}
	bad := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("trust_domain: console.exto\nrules: 7\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := runBroker(t, dir, nil, "policy", "check", bad); code != 1 || !strings.Contains(stderr, "line 2") {
		t.Errorf("got %d %q, want line 2 named", code, stderr)
	}
}

// besideAuditLines gives what stands in out beside lines of an audit log.
func besideAuditLines(out string) string {
	var rest strings.Builder
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, `{"format":1,"seq":`) || !strings.HasSuffix(line, "\"}\n") {
			rest.WriteString(line)
		}
	}
	return rest.String()
}
