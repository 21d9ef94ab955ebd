package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/exto/secrets-broker/internal/devdir"
)

// demo is the instance. Its certificate is among those of a development folder.
const demo = "demo"

// system is the broker, a database and the three programs, on this machine.
type system struct {
	*supervisor
	bin string // has the programs
	dir string // has the certificates, the operator's header and the bodies of calls
	db  *database

	broker  string // its address, once it was started
	console string // likewise
}

var (
	brokerListens  = regexp.MustCompile(`msg=listening grpc=(\S+)`)
	consoleListens = regexp.MustCompile(`msg=listening http=(\S+)`)
	instanceReady  = regexp.MustCompile(`msg=ready `)
)

// prepare makes what the programs read.
func (s *system) prepare() error {
	if err := devdir.Prepare(s.certs(), time.Now()); err != nil {
		return err
	}
	return os.WriteFile(s.operatorFile(), []byte("Authorization: Bearer "+rand.Text()+"\n"), 0o600)
}

func (s *system) certs() string               { return filepath.Join(s.dir, devdir.Name) }
func (s *system) operatorFile() string        { return filepath.Join(s.dir, "operator-header") }
func (s *system) bodyFile(name string) string { return filepath.Join(s.dir, name+".json") }

// startBroker runs the broker over the store that env names. A second one listens
// where the first one did.
func (s *system) startBroker(ctx context.Context, env ...string) (*process, error) {
	in := func(name string) string { return filepath.Join(s.certs(), name) }
	broker, m, err := s.start(ctx, program{
		name: "broker", path: filepath.Join(s.bin, "broker"), args: []string{"serve"}, ready: brokerListens,
		env: append([]string{
			"BROKER_LISTEN_ADDRESS=" + cmp.Or(s.broker, "127.0.0.1:0"),
			"BROKER_METRICS_ADDRESS=127.0.0.1:0",
			"BROKER_TLS_CERT_FILE=" + in("server.pem"),
			"BROKER_TLS_KEY_FILE=" + in("server-key.pem"),
			"BROKER_TLS_CLIENT_CA_FILE=" + in("ca.pem"),
			"BROKER_POLICY_FILE=" + in("policy.yaml"),
			"BROKER_AUDIT_FILE=" + in("audit.log"),
		}, env...),
	})
	if err == nil {
		s.broker = m[1]
	}
	return broker, err
}

// startConsole runs the Console API. A second one listens where the first one did.
func (s *system) startConsole(ctx context.Context) (*process, error) {
	console, m, err := s.start(ctx, program{
		name: "console-api", path: filepath.Join(s.bin, "console-api"), ready: consoleListens,
		env: append(s.caller("console-api"),
			"LISTEN_ADDRESS="+cmp.Or(s.console, "127.0.0.1:0"),
			"OPERATOR_HEADER_FILE="+s.operatorFile(),
			"DATABASE_URL="+s.db.url,
		),
	})
	if err == nil {
		s.console = m[1]
	}
	return console, err
}

func (s *system) startWorker(ctx context.Context, interval time.Duration) error {
	_, _, err := s.start(ctx, program{
		name: "worker", path: filepath.Join(s.bin, "worker"),
		env: append(s.caller("worker"), "DATABASE_URL="+s.db.url, "INTERVAL="+interval.String()),
	})
	return err
}

func (s *system) startInstance(ctx context.Context, interval time.Duration) error {
	_, _, err := s.start(ctx, program{
		name: "instance", path: filepath.Join(s.bin, "instance"), ready: instanceReady,
		env: append(s.caller("instance-"+demo), "INSTANCE_ID="+demo, "CONSOLE_URL=http://"+s.console, "INTERVAL="+interval.String()),
	})
	return err
}

// caller is how a program finds the broker, and shows who it is.
func (s *system) caller(name string) []string {
	cert, key := devdir.PairFiles(s.certs(), name)
	return []string{
		"BROKER_ADDRESS=" + s.broker,
		"BROKER_CERT_FILE=" + cert,
		"BROKER_KEY_FILE=" + key,
		"BROKER_CA_FILE=" + filepath.Join(s.certs(), "ca.pem"),
	}
}

// addresses are two databases for the demo, as bodies of calls in files.
func (s *system) addresses(ctx context.Context) (secrets []string, err error) {
	var uris []string
	for _, name := range []string{"demo_1", "demo_2"} {
		password := rand.Text()
		uri, err := s.db.instance(ctx, name, password)
		if err != nil {
			return nil, err
		}
		uris = append(uris, uri)
		secrets = append(secrets, password)
	}
	oidc := rand.Text()
	for name, body := range map[string]map[string]string{
		"create":     {"id": demo, "database_uri": uris[0], "oidc_client_secret": oidc},
		"connection": {"database_uri": uris[1]},
	} {
		text, err := json.Marshal(body)
		if err == nil {
			err = os.WriteFile(s.bodyFile(name), text, 0o600)
		}
		if err != nil {
			return nil, err
		}
	}
	return append(secrets, oidc), nil
}

// call calls the Console API as its operator.
func (s *system) call(ctx context.Context, method, path string, body []byte) (status int, answer []byte, err error) {
	header, err := os.ReadFile(s.operatorFile())
	if err != nil {
		return 0, nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+s.console+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	_, token, _ := bytes.Cut(bytes.TrimSpace(header), []byte(": "))
	req.Header.Set("Authorization", string(token))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, answer, errors.Join(err, resp.Body.Close())
}

// create makes the demo instance.
func (s *system) create(ctx context.Context) error {
	body, err := os.ReadFile(s.bodyFile("create"))
	if err != nil {
		return err
	}
	status, answer, err := s.call(ctx, http.MethodPost, "/instances", body)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("creating the instance: %d %s", status, answer)
	}
	return err
}
