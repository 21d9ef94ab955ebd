package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/devdir"
	"github.com/exto/secrets-broker/server/audit"
)

// binary is the broker, built once for all tests.
var binary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

// atOnce is how many tests run at once: they wait for processes most of the time.
const atOnce = "6"

func testMain(m *testing.M) int {
	flag.Parse()
	set := false
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == "test.parallel" })
	if !set {
		_ = flag.Set("test.parallel", atOnce)
	}
	dir, err := os.MkdirTemp("", "broker-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	binary = filepath.Join(dir, "broker")
	if out, err := exec.Command("go", "build", "-ldflags=-w", "-o", binary, ".").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the broker: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// process is a running broker.
type process struct {
	t       *testing.T
	cmd     *exec.Cmd
	dir     string // its working directory
	out     *capture
	err     *capture
	addr    string
	metrics string
	exited  chan struct{}
}

// capture keeps what a process writes, and lets a test wait for it.
type capture struct {
	mu   sync.Mutex
	cond *sync.Cond
	b    bytes.Buffer
	done bool
}

func newCapture() *capture {
	c := &capture{}
	c.cond = sync.NewCond(&c.mu)
	return c
}

func (c *capture) read(r io.Reader) {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		c.mu.Lock()
		c.b.Write(line)
		c.done = err != nil
		c.cond.Broadcast()
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (c *capture) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}

// await waits for a match in what was written, or for the end of it: then nil.
func (c *capture) await(pattern *regexp.Regexp) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if m := pattern.FindStringSubmatch(c.b.String()); m != nil {
			return m
		}
		if c.done {
			return nil
		}
		c.cond.Wait()
	}
}

var listeningLine = regexp.MustCompile(`msg=listening grpc=(\S+) metrics=(\S+)\n`)

// launch runs a command of the broker in dir, and kills it with the test. The
// environment is env alone.
func launch(t *testing.T, dir string, env []string, command string, args ...string) *process {
	t.Helper()
	return launchAs(t, nil, dir, env, command, args...)
}

// launchAs is launch, with what the system shall know of the process.
func launchAs(t *testing.T, attr *syscall.SysProcAttr, dir string, env []string, command string, args ...string) *process {
	t.Helper()
	p := &process{t: t, dir: dir, out: newCapture(), err: newCapture(), exited: make(chan struct{})}
	p.cmd = exec.Command(command, args...)
	p.cmd.SysProcAttr = attr
	p.cmd.Dir, p.cmd.Env = dir, append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pipes sync.WaitGroup
	pipes.Go(func() { p.out.read(stdout) })
	pipes.Go(func() { p.err.read(stderr) })
	go func() {
		pipes.Wait()
		_ = p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(p.kill)
	return p
}

// devIn runs broker dev in dir until it listens.
func devIn(t *testing.T, dir string) *process {
	t.Helper()
	p := launch(t, dir, []string{"SECRET_STORE_PROVIDER=noop"}, binary, "dev", "--listen-address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--log-level=debug")
	p.listen()
	return p
}

func (p *process) listen() {
	p.t.Helper()
	m := p.err.await(listeningLine)
	if m == nil {
		p.t.Fatalf("the broker ended: %s", p.err)
	}
	p.addr, p.metrics = m[1], m[2]
}

func (p *process) kill() { p.end(syscall.SIGKILL) }

// end sends a signal and waits for the exit.
func (p *process) end(sig syscall.Signal) {
	_ = p.cmd.Process.Signal(sig)
	<-p.exited
}

// as is a client with one of the certificates of dev.
func (p *process) as(name string) secretsv1.SecretsBrokerServiceClient {
	p.t.Helper()
	return secretsv1.NewSecretsBrokerServiceClient(p.dial(name))
}

func (p *process) dial(name string) *grpc.ClientConn {
	p.t.Helper()
	certFile, keyFile := devdir.PairFiles(filepath.Join(p.dir, devDir), name)
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		p.t.Fatal(err)
	}
	ca, err := os.ReadFile(filepath.Join(p.dir, devDir, "ca.pem"))
	if err != nil {
		p.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	conn, err := grpc.NewClient(p.addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots})))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func callContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func ref(id string, kind secretsv1.SecretKind) *secretsv1.SecretRef {
	return &secretsv1.SecretRef{InstanceId: id, Kind: kind}
}

const (
	tokenKind = secretsv1.SecretKind_SECRET_KIND_REGISTRATION_TOKEN
	uriKind   = secretsv1.SecretKind_SECRET_KIND_DATABASE_URI
	oidcKind  = secretsv1.SecretKind_SECRET_KIND_OIDC_CLIENT_SECRET
)

// runBroker runs a command of the broker to its end.
func runBroker(t *testing.T, dir string, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	p := launch(t, dir, env, binary, args...)
	<-p.exited
	return p.cmd.ProcessState.ExitCode(), p.out.String(), p.err.String()
}

func must[T any](t *testing.T, result T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// auditFile is the audit log of broker dev, in the folder that it was started in.
const auditFile = devDir + "/audit.log"

// auditRecords reads an audit log.
func auditRecords(t *testing.T, file string) (records []audit.Record) {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(content) {
		var r audit.Record
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		records = append(records, r)
	}
	return records
}

// awaitMetric waits until the process shows this line among its metrics.
func (p *process) awaitMetric(line string) {
	p.t.Helper()
	ctx := callContext(p.t)
	for again := time.Tick(10 * time.Millisecond); ; <-again {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.metrics+"/metrics", nil)
		if err != nil {
			p.t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			p.t.Fatalf("waiting for %q: %v", line, err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			p.t.Fatal(err)
		}
		if slices.Contains(strings.Split(string(body), "\n"), line) {
			return
		}
	}
}
