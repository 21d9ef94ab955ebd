package main

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/examples/rows"
	"github.com/exto/secrets-broker/internal/devdir"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
)

// TestStory is the life of one instance, told by the processes themselves: the
// broker on a Key Vault, the Console API, the worker and the instance.
func TestStory(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("SSL_CERT_FILE leads to the vault's CA on Linux alone")
	}
	t.Run("PostgreSQL", func(t *testing.T) {
		t.Parallel()
		if _, err := findPostgres(); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
		tell(t, func(s *story) (*database, error) { return startPostgres(s.ctx, s.supervisor, databaseFolder(t)) })
	})
	t.Run("SQLite", func(t *testing.T) {
		t.Parallel()
		tell(t, func(*story) (*database, error) { return startSQLite(t.TempDir()), nil })
	})
}

func tell(t *testing.T, open func(*story) (*database, error)) {
	s := newStory(t, open)
	s.created()
	s.instanceStarts()
	s.rotatedWithGrace()
	s.rotatedAtOnce()
	s.killedInARotation()
	s.certificatesRenewed()
	s.vaultOut()
	s.connected()
	s.decommissioned()
	s.createdAgain()
	s.ended()
}

func (s *story) created() {
	body := s.body("create")
	if status := s.anonymous(http.MethodPost, "/instances", "Bearer wrong"); status != http.StatusUnauthorized {
		s.t.Errorf("somebody who is not the operator got %d, want 401", status)
	}
	s.token = s.handedOut(http.MethodPost, "/instances", body)
	if status, answer := s.operator(http.MethodPost, "/instances", body); status != http.StatusConflict {
		s.t.Errorf("a second one of the same id got %d %s, want 409", status, answer)
	}
	row, err := s.table.Get(s.ctx, s.key.InstanceID())
	if want := (rows.Row{ID: demo, State: rows.Active, Creation: row.Creation, RegistrationTokenRef: "instance-demo", DBURIRef: "instance-demo-dburi", OIDCClientSecretRef: "instance-demo-oidc-secret"}); err != nil || row != want {
		s.t.Errorf("got row %v, %v, want %v", row, err, want)
	}
	s.worksOn("demo_1")
}

func (s *story) instanceStarts() {
	if err := s.startInstance(s.ctx, callInterval); err != nil {
		s.t.Fatal(err)
	}
	s.goesOn(10, 1)
	s.noneFailed("at its start", counts{})
}

// Not one call fails, neither with the old token nor with the new one.
func (s *story) rotatedWithGrace() {
	before, old := s.counts(), s.token
	s.token = s.handedOut(http.MethodPost, "/instances/demo/rotate", []byte(`{"grace": "1h"}`))
	s.goesOn(50, 2)
	s.noneFailed("through a rotation with grace", before)
	for _, token := range []string{old, s.token} {
		if status := s.hello(token); status != http.StatusOK {
			s.t.Errorf("within the grace got %d, want 200", status)
		}
	}
}

// The old token is refused at once, and the instance goes on by itself.
func (s *story) rotatedAtOnce() {
	before, old := s.counts(), s.token
	s.token = s.handedOut(http.MethodPost, "/instances/demo/rotate", []byte(`{"grace": "0s"}`))
	rotated := time.Now()
	s.goesOn(1, 3)
	s.t.Logf("rotated without grace: the instance went on after %v", time.Since(rotated).Round(time.Millisecond))
	s.goesOn(50, 3)
	after := s.counts()
	if refused := after.refused - before.refused; refused > 5 || after.failed != before.failed {
		s.t.Errorf("without grace: got %v after %v, want a few refused and none failed", after, before)
	}
	eventually(s.t, "the old token is refused", func() bool { return s.hello(old) == http.StatusUnauthorized })
	s.noneFailed("once it had the new token", after)
}

// The vault has the new version, but the broker dies before it can say so. The one
// that is started in its place answers the same request, and rotates no more.
func (s *story) killedInARotation() {
	before := s.counts()
	const name = "instance-demo"
	versions := len(s.vault.Versions(name))
	release := s.holdOnce(keyvaultfake.OpSet, name)
	token := make(chan string, 1)
	go func() { token <- s.handedOut(http.MethodPost, "/instances/demo/rotate", []byte(`{"grace": "1h"}`)) }()
	eventually(s.t, "the vault has the new version", func() bool { return len(s.vault.Versions(name)) == versions+1 })
	s.brokerProcess.end(syscall.SIGKILL)
	release()
	s.serve()
	s.token = <-token
	s.goesOn(50, 4)
	s.noneFailed("through a kill of the broker", before)
	s.rotatedTo(4)
}

// All certificates are renewed by the same CA, and then the old ones are revoked:
// whoever still used one would be refused.
func (s *story) certificatesRenewed() {
	before := s.counts()
	callers := []string{"console-api", "worker", "instance-demo"}
	old := s.clientOf("console-api", s.t.TempDir())
	var revoked strings.Builder
	for _, name := range append(callers, "server") {
		revoked.WriteString(s.serial(name) + "\n")
		cert, _ := devdir.PairFiles(s.certs(), name)
		if err := os.Remove(cert); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := devdir.Prepare(s.certs(), time.Now()); err != nil {
		s.t.Fatal(err)
	}
	for _, name := range callers {
		serial := s.serial(name)
		eventually(s.t, name+" shows its new certificate", func() bool { return strings.Contains(s.audit(), `"serial":"`+serial+`"`) })
	}
	eventually(s.t, "the broker shows its new certificate", func() bool { return s.shown() == s.serial("server") })
	if err := devdir.WriteFile(s.revokedFile(), []byte(revoked.String()), 0o600); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "the old certificate is refused", func() bool {
		_, err := old.Describe(s.ctx, s.key)
		return errors.Is(err, client.ErrCallerUnknown)
	})
	s.goesOn(50, 4)
	s.noneFailed("while certificates were renewed", before)
}

// callInterval is how often the instance calls.
const callInterval = 10 * time.Millisecond

// Tokens are verified from memory, and a rotation waits for the vault and happens
// once.
func (s *story) vaultOut() {
	before := s.counts()
	s.vault.SetDown(true)
	token := make(chan string, 1)
	go func() { token <- s.handedOut(http.MethodPost, "/instances/demo/rotate", []byte(`{"grace": "1h"}`)) }()
	eventually(s.t, "the broker serves what it has", func() bool {
		got, err := s.api.Get(s.ctx, s.key, client.GetOptions{})
		return err == nil && got.Source == client.StaleOnError
	})
	if verified, err := s.api.Verify(s.ctx, s.key.InstanceID(), secret.NewValue(s.token)); err != nil || !verified.OK() {
		s.t.Errorf("during an outage got %v, %v, want that the token is good", verified, err)
	}
	calls := 100
	if outage, err := time.ParseDuration(os.Getenv("BROKER_TEST_OUTAGE")); err == nil {
		calls = int(outage / callInterval)
	}
	s.goesOn(calls, 4)
	select {
	case <-token:
		s.t.Error("rotated without a vault")
	default:
	}
	s.vault.SetDown(false)
	s.token = <-token
	s.goesOn(50, 5)
	s.noneFailed("through an outage of the vault", before)
	s.rotatedTo(5)
}

func (s *story) connected() {
	if status, answer := s.operator(http.MethodPut, "/instances/demo/connection", s.body("connection")); status != http.StatusNoContent {
		s.t.Fatalf("another connection: got %d %s", status, answer)
	}
	s.worksOn("demo_2")
}

// The Console API dies in the middle of it, and the row tells the next one what is
// left to do.
func (s *story) decommissioned() {
	id := s.key.InstanceID()
	release := s.holdOnce(keyvaultfake.OpDelete, "instance-demo-dburi")
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _, _ = s.call(s.ctx, http.MethodDelete, "/instances/demo", nil) // it is cut off
	}()
	eventually(s.t, "the vault deletes the second secret", func() bool { return s.vault.State("instance-demo-dburi") != keyvaultfake.Live })
	s.consoleProcess.end(syscall.SIGKILL)
	release()
	<-gone
	s.startConsoleAPI()
	if row, err := s.table.Get(s.ctx, id); err != nil || row.State != rows.Deleting {
		s.t.Errorf("after a crash got row %v, %v, want one that says deleting", row, err)
	}
	if status, answer := s.operator(http.MethodPost, "/instances/demo/rotate", []byte(`{"grace": "0s"}`)); status != http.StatusConflict {
		s.t.Errorf("rotating what is being deleted: got %d %s, want 409", status, answer)
	}
	for range 2 { // it may be run again
		if status, answer := s.operator(http.MethodDelete, "/instances/demo", nil); status != http.StatusNoContent {
			s.t.Fatalf("decommissioning: got %d %s", status, answer)
		}
	}
	if row, err := s.table.Get(s.ctx, id); !errors.Is(err, rows.ErrNotFound) {
		s.t.Errorf("got row %v, %v, want none", row, err)
	}
	if status := s.hello(s.token); status != http.StatusUnauthorized {
		s.t.Errorf("the token of a decommissioned instance got %d, want 401", status)
	}
	refused := s.counts().refused
	eventually(s.t, "the instance is refused", func() bool { return s.counts().refused > refused })
	var states []client.State
	for m, err := range s.api.List(s.ctx, client.ListOptions{InstanceID: id, ShowDeleted: true}) {
		if err != nil {
			s.t.Fatal(err)
		}
		states = append(states, m.State)
	}
	if want := []client.State{client.Deleted, client.Deleted, client.Deleted}; !slices.Equal(states, want) {
		s.t.Errorf("got secrets in states %v, want %v", states, want)
	}
}

// The Console API dies in the middle of the first attempt: the row tells of it, and
// what there is can be deleted. At the second, the instance, which was never
// restarted, finds its new secrets.
func (s *story) createdAgain() {
	old := s.token
	release := s.holdOnce(keyvaultfake.OpSet, "instance-demo-oidc-secret")
	versions := len(s.vault.Versions("instance-demo-oidc-secret"))
	cut := make(chan struct{})
	go func() {
		defer close(cut)
		_, _, _ = s.call(s.ctx, http.MethodPost, "/instances", s.body("create"))
	}()
	eventually(s.t, "the vault has the second secret", func() bool { return len(s.vault.Versions("instance-demo-oidc-secret")) > versions })
	s.consoleProcess.end(syscall.SIGKILL)
	release()
	<-cut
	s.startConsoleAPI()
	if row, err := s.table.Get(s.ctx, s.key.InstanceID()); err != nil || row.State != rows.Creating {
		s.t.Errorf("after a crash got row %v, %v, want one that says creating", row, err)
	}
	if status, answer := s.operator(http.MethodPost, "/instances", s.body("create")); status != http.StatusConflict {
		s.t.Errorf("over a part of an instance: got %d %s, want 409", status, answer)
	}
	if status, answer := s.operator(http.MethodDelete, "/instances/demo", nil); status != http.StatusNoContent {
		s.t.Errorf("deleting a part of an instance: got %d %s, want 204", status, answer)
	}
	s.token = s.handedOut(http.MethodPost, "/instances", s.body("create"))
	s.goesOn(20, 6)
	before := s.counts()
	s.goesOn(50, 6)
	s.noneFailed("once it was there again", before)
	if status := s.hello(old); status != http.StatusUnauthorized {
		s.t.Errorf("the token of the instance before got %d, want 401", status)
	}
	s.worksOn("demo_1")
	s.rotatedTo(6)
}

// All end when they are told to, and no secret is where it must not be.
func (s *story) ended() {
	all := slices.Clone(s.running)
	s.stop()
	for _, p := range all {
		if code := p.cmd.ProcessState.ExitCode(); code > 0 {
			s.t.Errorf("%s ended with %d: %s", p.name, code, s.log.last(p.name, ""))
		}
	}
	places := map[string][]byte{"the audit log": []byte(s.audit())}
	for _, name := range []string{"postgres", "broker", "console-api", "worker", "instance"} {
		places["what "+name+" printed"] = []byte(strings.Join(s.log.of(name), "\n"))
	}
	if err := filepath.WalkDir(s.db.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		places[path], err = os.ReadFile(path)
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	found := false
	for place, content := range places {
		found = found || strings.HasPrefix(place, s.db.dir) && strings.Contains(string(content), "instance-demo-dburi")
		for i, secret := range s.secrets {
			if strings.Contains(string(content), secret) {
				s.t.Errorf("secret %d is in %s", i, place)
			}
		}
	}
	if !found || len(s.secrets) < 10 {
		s.t.Errorf("looked for %d secrets, and found the name of one in the database: %v, want 10 and true", len(s.secrets), found)
	}
}

// holdOnce lets the vault do the next request of that kind, and keeps its answer
// back until release.
func (s *story) holdOnce(op keyvaultfake.Op, name string) (release func()) {
	held := make(chan struct{})
	var once sync.Once
	s.vault.OnRequest(func(r *keyvaultfake.Request) (fault keyvaultfake.Fault) {
		if r.Op == op && r.Name == name && !r.Challenge {
			once.Do(func() { fault.HoldAfter = held })
		}
		return fault
	})
	return func() { close(held); s.vault.OnRequest(nil) }
}

// rotatedTo checks that the token has had so many versions, and not one more.
func (s *story) rotatedTo(generation int) {
	s.t.Helper()
	described, err := s.api.Describe(s.ctx, s.key)
	if err != nil || described.Generation != int64(generation) || len(s.vault.Versions(s.key.String())) != generation {
		s.t.Errorf("got generation %d and %d versions in the vault, %v, want %d of both", described.Generation, len(s.vault.Versions(s.key.String())), err, generation)
	}
}
