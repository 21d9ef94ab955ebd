package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/client/brokertest"
	"github.com/exto/secrets-broker/examples/rows"
	"github.com/exto/secrets-broker/internal/devdir"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/authz"
)

// story is one run of the system on a Key Vault in memory.
type story struct {
	t   *testing.T
	ctx context.Context
	*system
	log   transcript
	vault *keyvaultfake.Fake
	env   []string // of the broker
	table *rows.Table
	api   *client.Client // the test's own, with the rights of the Console API
	key   secret.Key     // of the registration token

	brokerProcess, consoleProcess *process
	token                         string // the last that was handed out

	mu      sync.Mutex
	secrets []string // all that were used
}

func newStory(t *testing.T, open func(*story) (*database, error)) *story {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	t.Cleanup(cancel)
	s := &story{t: t, ctx: ctx, key: brokertest.MustKey(t, demo, secret.RegistrationToken)}
	s.system = &system{bin: programs, dir: t.TempDir(), supervisor: newSupervisor(s.log.add)}
	t.Cleanup(func() {
		if len(s.running) > 0 {
			s.stop()
		}
		if t.Failed() {
			for _, name := range []string{"broker", "console-api", "worker"} {
				t.Logf("%s printed:\n%s", name, strings.Join(s.log.of(name), "\n"))
			}
			lines := s.log.of("instance")
			t.Logf("instance printed at the end:\n%s", strings.Join(lines[max(0, len(lines)-20):], "\n"))
		}
	})
	s.db = must(open(s))(s.t)
	// A recover is done at once: the broker looks again after seconds.
	s.vault = must(keyvaultfake.Start(keyvaultfake.Config{Transitions: &keyvaultfake.Transitions{Delete: 200 * time.Millisecond}}))(t)
	t.Cleanup(func() { _ = s.vault.Close() })
	s.check(s.prepare())
	s.secrets = append(must(s.addresses(ctx))(t), strings.Fields(s.read(s.operatorFile()))[2])
	vaultCA := filepath.Join(s.dir, "vault-ca.pem")
	s.check(os.WriteFile(vaultCA, s.vault.CAPEM(), 0o600))
	s.check(os.WriteFile(s.revokedFile(), nil, 0o600))
	s.env = slices.Concat(s.vault.Env(), s.vault.Broker().Env(), []string{
		"SSL_CERT_FILE=" + vaultCA,
		"BROKER_TLS_REVOKED_FILE=" + s.revokedFile(),
		"BROKER_CACHE_TTL=1s", // an outage is long when it is longer
	})
	s.serve()
	s.startConsoleAPI()
	s.check(s.startWorker(ctx, 50*time.Millisecond))
	s.table = must(rows.Open(s.db.url))(s.t)
	t.Cleanup(func() { _ = s.table.Close() })
	s.api = s.clientOf("console-api", "")
	return s
}

func (s *story) serve()           { s.brokerProcess = must(s.startBroker(s.ctx, s.env...))(s.t) }
func (s *story) startConsoleAPI() { s.consoleProcess = must(s.startConsole(s.ctx))(s.t) }

func (s *story) revokedFile() string { return filepath.Join(s.dir, "revoked") }
func (s *story) audit() string       { return s.read(filepath.Join(s.certs(), "audit.log")) }
func (s *story) body(name string) []byte {
	s.t.Helper()
	return []byte(s.read(s.bodyFile(name)))
}

// clientOf is a client with a program's certificate; with a copy of it in a folder
// that is given.
func (s *story) clientOf(name, copies string) *client.Client {
	s.t.Helper()
	cert, key := devdir.PairFiles(s.certs(), name)
	if copies != "" {
		for _, file := range []*string{&cert, &key} {
			content := s.read(*file)
			*file = filepath.Join(copies, filepath.Base(*file))
			s.check(os.WriteFile(*file, []byte(content), 0o600))
		}
	}
	c := must(client.New(s.broker, client.Config{CertFile: cert, KeyFile: key, CAFile: filepath.Join(s.certs(), "ca.pem")}))(s.t)
	s.t.Cleanup(func() { _ = c.Close() })
	return c
}

// serial is that of a certificate, as the audit log and the revocations have it.
func (s *story) serial(name string) string {
	s.t.Helper()
	pair := must(tls.LoadX509KeyPair(devdir.PairFiles(s.certs(), name)))(s.t)
	return authz.Serial(pair.Leaf.SerialNumber)
}

// shown is the serial number of the certificate that the broker shows now.
func (s *story) shown() string {
	s.t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(s.read(filepath.Join(s.certs(), "ca.pem"))))
	conn, err := tls.Dial("tcp", s.broker, &tls.Config{RootCAs: roots, NextProtos: []string{"h2"}})
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	return authz.Serial(conn.ConnectionState().PeerCertificates[0].SerialNumber)
}

// counts is what the instance last said of its calls.
type counts struct{ status, generation, calls, refused, failed int }

func (s *story) counts() (c counts) {
	line := s.log.last("instance", "msg=called ")
	_, values, _ := strings.Cut(line, "msg=called ")
	if _, err := fmt.Sscanf(values, "status=%d generation=%d calls=%d refused=%d failed=%d", &c.status, &c.generation, &c.calls, &c.refused, &c.failed); line != "" && err != nil {
		s.t.Errorf("%q: %v", line, err)
	}
	return c
}

// goesOn waits until so many further calls of the instance went well, and it has
// that generation of its token.
func (s *story) goesOn(calls, generation int) {
	s.t.Helper()
	before := s.counts()
	eventually(s.t, fmt.Sprintf("%d calls that go well, with generation %d", calls, generation), func() bool {
		now := s.counts()
		well := now.calls - now.refused - now.failed - (before.calls - before.refused - before.failed)
		return well >= calls && now.generation == generation
	})
}

func (s *story) noneFailed(when string, before counts) {
	s.t.Helper()
	if now := s.counts(); now.refused != before.refused || now.failed != before.failed {
		s.t.Errorf("%s: got %+v after %+v, want none refused or failed", when, now, before)
	}
}

// worksOn waits until the worker uses this database now; without PostgreSQL, until
// it tried.
func (s *story) worksOn(name string) {
	s.t.Helper()
	text := "msg=\"database opened\""
	if s.db.admin == "" {
		text = "msg=\"database not opened\""
	}
	eventually(s.t, "the worker uses "+name, func() bool {
		return strings.Contains(s.log.last("worker", text), "database="+name+" ")
	})
}

// operator calls the Console API.
func (s *story) operator(method, path string, body []byte) (status int, answer string) {
	s.t.Helper()
	status, content, err := s.call(s.ctx, method, path, body)
	if err != nil {
		s.t.Errorf("%s %s: %v", method, path, err)
	}
	return status, string(content)
}

// handedOut is the token that the Console API gives the operator, once. For any
// goroutine.
func (s *story) handedOut(method, path string, body []byte) string {
	s.t.Helper()
	status, answer := s.operator(method, path, body)
	var out struct {
		ID    string `json:"id"`
		Token string `json:"registration_token"`
	}
	if err := json.Unmarshal([]byte(answer), &out); err != nil || status != http.StatusOK || out.ID != demo || !strings.HasPrefix(out.Token, "exto_rt_") {
		s.t.Errorf("%s %s: got %d %s, want a token", method, path, status, answer)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets = append(s.secrets, out.Token)
	return out.Token
}

// hello calls the Console API as an instance with this token would.
func (s *story) hello(token string) (status int) {
	s.t.Helper()
	return s.anonymous(http.MethodGet, "/v1/instances/demo/hello", "Bearer "+token)
}

func (s *story) anonymous(method, path, authorization string) (status int) {
	s.t.Helper()
	req := must(http.NewRequestWithContext(s.ctx, method, "http://"+s.console+path, nil))(s.t)
	req.Header.Set("Authorization", authorization)
	resp := must(http.DefaultClient.Do(req))(s.t)
	s.check(resp.Body.Close())
	return resp.StatusCode
}

func (s *story) read(file string) string {
	s.t.Helper()
	return string(must(os.ReadFile(file))(s.t))
}

func (s *story) check(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// must gives a result; an error fails t.
func must[T any](result T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return result
	}
}
