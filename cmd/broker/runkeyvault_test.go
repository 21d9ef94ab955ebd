//go:build linux

package main

import (
	"net"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// TestRunKeyVault is make run-keyvault: two processes, with TLS and the
// environment credential between them.
func TestRunKeyVault(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "run-keyvault")
	if out, err := exec.Command("go", "build", "-ldflags=-w", "-o", program, "../../internal/run-keyvault").CombinedOutput(); err != nil {
		t.Fatalf("building it: %v\n%s", err, out)
	}
	for name, end := range map[string]struct {
		signal syscall.Signal
		code   int
		log    string
	}{
		"interrupted": {syscall.SIGINT, 0, `msg="broker stopped"`},
		"terminated":  {syscall.SIGTERM, 0, `msg="broker stopped"`},
		"killed":      {syscall.SIGKILL, -1, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// What the shell has set must lead the broker nowhere else.
			p := launch(t, t.TempDir(), []string{
				"BROKER_LISTEN_ADDRESS=127.0.0.1:0", "BROKER_METRICS_ADDRESS=127.0.0.1:0",
				"SECRET_STORE_PROVIDER=noop", "AZURE_KEY_VAULT_URL=https://another.vault.azure.net/", "NO_PROXY=*", "SSL_CERT_FILE=/absent",
			}, program, binary)
			p.listen()
			if want := `msg="secret store: azure key vault" vault=https://exto-test.vault.azure.net/`; !strings.Contains(p.err.String(), want) {
				t.Errorf("got log %s, want %s", p.err, want)
			}
			if p.out.await(regexp.MustCompile(regexp.QuoteMeta(p.addr)+` \S+/RecoverSecret\n`)) == nil {
				t.Errorf("got standard output %s, want calls of %s", p.out, p.addr)
			}
			ctx := callContext(t)
			made := must2(p.as("console-api").PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", uriKind), Value: "postgres://h/db"}))(t)
			got := must2(p.as("instance-demo").GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", uriKind)}))(t)
			if got.GetValue() != "postgres://h/db" || got.GetMetadata().GetVersion() != made.GetMetadata().GetVersion() {
				t.Errorf("got %v, want what was put", got.GetMetadata())
			}

			// Both write to the same standard output: once that has ended, so have they.
			p.end(end.signal)
			if code := p.cmd.ProcessState.ExitCode(); code != end.code || !strings.Contains(p.err.String(), end.log) {
				t.Errorf("got exit code %d, want %d and a log with %s: %s", code, end.code, end.log, p.err)
			}
			for _, address := range []string{p.addr, p.metrics} {
				if conn, err := net.Dial("tcp", address); err == nil {
					_ = conn.Close()
					t.Errorf("somebody still listens on %s", address)
				}
			}
		})
	}
}
