package main

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/devdir"
	"github.com/exto/secrets-broker/server"
)

// counter counts Puts, and says when there were enough.
type counter struct {
	secretsv1.UnimplementedSecretsBrokerServiceServer
	most    int    // then enough is closed
	fails   bool   // from then on
	version string // that it answers

	mu        sync.Mutex
	calls     int
	instances map[string]int
	ids       map[string]bool
	enough    chan struct{}
}

func (c *counter) PutSecret(ctx context.Context, in *secretsv1.PutSecretRequest) (*secretsv1.PutSecretResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	c.instances[in.GetRef().GetInstanceId()]++
	c.ids[in.GetRequestId()+in.GetValue()] = true
	if c.calls == c.most {
		close(c.enough)
	}
	if c.fails && c.calls >= c.most {
		return nil, status.Error(codes.Aborted, "no more")
	}
	return &secretsv1.PutSecretResponse{Metadata: &secretsv1.SecretMetadata{Version: c.version}}, nil
}

// serve runs a counter until the test ends, and gives its address and the folder
// of the certificates.
func serve(t *testing.T, c *counter) (address, dir string) {
	t.Helper()
	c.instances, c.ids, c.enough = map[string]int{}, map[string]bool{}, make(chan struct{})
	dir = t.TempDir()
	if err := devdir.Prepare(dir, time.Now()); err != nil {
		t.Fatal(err)
	}
	cert, key := devdir.PairFiles(dir, "server")
	trust, err := server.OpenTrust(server.TrustConfig{Logger: slog.New(slog.DiscardHandler), Files: server.Files{
		Cert: cert, Key: key, ClientCA: filepath.Join(dir, "ca.pem"), Policy: filepath.Join(dir, "policy.yaml"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(trust.TLS())))
	secretsv1.RegisterSecretsBrokerServiceServer(s, c)
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() { s.Stop(); serving.Wait() })
	return l.Addr().String(), dir
}

func putRequests(t *testing.T, secrets int) request {
	t.Helper()
	r, err := put.request(secrets)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestLoad(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		callers, connections, calls int
		asked, answered             int // bytes, beside what is there anyway
	}{
		"one caller":                     {1, 1, 200, 0, 0},
		"callers that share connections": {6, 4, 5000, 0, 0},
		"callers that wait for window":   {64, 4, 1000, 15_000, 0},
		"answers of several frames":      {3, 3, 200, 0, 30_000}, // and together beyond the window
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const secrets = 12
			c := &counter{most: test.calls, version: strings.Repeat("v", test.answered)}
			address, dir := serve(t, c)
			asked := putRequest(numberMark, serialMark)
			asked.Value += strings.Repeat("v", test.asked)
			r, err := newRequest(secretsv1.SecretsBrokerService_PutSecret_FullMethodName, secrets, asked)
			if err != nil {
				t.Fatal(err)
			}
			l, err := dial(t.Context(), address, dir, r, test.callers)
			if err != nil {
				t.Fatal(err)
			}
			defer l.close()
			l.measuring.Store(true)
			l.start(t.Context())
			if !wait(l.failed, c.enough) {
				t.Error("the load ended by itself")
			}
			if err := l.stop(); err != nil {
				t.Fatal(err)
			}
			if got := l.answered(); int(got) != c.calls || c.calls < test.calls || l.latencies().total != uint64(got) {
				t.Errorf("got %d answers and %d latencies of %d calls, want as many, and at least %d", got, l.latencies().total, c.calls, test.calls)
			}
			if len(l.connections) != test.connections {
				t.Errorf("got %d connections, want %d", len(l.connections), test.connections)
			}
			if len(c.ids) != c.calls {
				t.Errorf("got %d different request ids and values in %d calls", len(c.ids), c.calls)
			}
			for name := range c.instances {
				if n, err := strconv.Atoi(strings.TrimPrefix(name, "bench-")); err != nil || n >= secrets {
					t.Errorf("got a call for %s, want one of %d secrets", name, secrets)
				}
			}
		})
	}
}

func TestLoadFails(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		counter *counter
		least   int
		want    string
	}{
		"another status":      {&counter{most: 100, fails: true}, 0, `/PutSecret: the server answered with gRPC status "10": no more`},
		"too short an answer": {&counter{most: 100, version: "v"}, 100, "has not all that it is to have"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address, dir := serve(t, test.counter)
			r := putRequests(t, 10)
			r.Least = test.least
			l, err := dial(t.Context(), address, dir, r, 8)
			if err != nil {
				t.Fatal(err)
			}
			defer l.close()
			l.start(t.Context())
			<-l.failed.Done()
			if err := l.stop(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %s", err, test.want)
			}
		})
	}
}

// TestLoadProcess is the side of a load process that its parent sees.
func TestLoadProcess(t *testing.T) {
	t.Parallel()
	for name, fails := range map[string]bool{"until released": false, "failing": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := &counter{most: 100, fails: fails}
			address, dir := serve(t, c)
			line, err := json.Marshal(order{Address: address, Dir: dir, Request: putRequests(t, 10), Callers: 2})
			if err != nil {
				t.Fatal(err)
			}
			in, toIn := io.Pipe()
			fromOut, out := io.Pipe()
			failed := make(chan error, 1)
			go func() {
				err := runLoad(t.Context(), in, out)
				_ = out.CloseWithError(err)
				failed <- err
			}()
			if _, err := toIn.Write(append(line, '\n')); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(fromOut)
			if begun, err := lines.ReadString('\n'); begun != "\n" || err != nil {
				t.Fatalf("got %q and %v, want an empty line", begun, err)
			}
			<-c.enough
			var s sample
			if fails {
				if err := json.NewDecoder(lines).Decode(&s); err == nil {
					t.Errorf("got %+v of a load that failed", s)
				}
				if err := <-failed; err == nil || !strings.Contains(err.Error(), `gRPC status "10"`) {
					t.Errorf("got %v, want the status of the answer", err)
				}
				return
			}
			_ = toIn.Close()
			if err := json.NewDecoder(lines).Decode(&s); err != nil || s.Rate <= 0 {
				t.Errorf("got %+v and %v, want a rate", s, err)
			}
			if err := <-failed; err != nil {
				t.Error(err)
			}
		})
	}
}
