package client_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/secret"
)

func TestMutualTLS(t *testing.T) {
	t.Parallel()
	b := start(t, answerFull)
	// Credentials among the options must not take the place of ours.
	c := b.client(t, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if _, err := c.Describe(t.Context(), dbKey); err != nil {
		t.Fatal(err)
	}
	state := b.only(t).tls
	if state.Version != tls.VersionTLS13 {
		t.Errorf("got %s, want TLS 1.3", tls.VersionName(state.Version))
	}
	if got := state.PeerCertificates[0].URIs[0].String(); got != callerID {
		t.Errorf("the broker saw %q, want %q", got, callerID)
	}
}

func TestServerName(t *testing.T) {
	t.Parallel()
	b := start(t, answerFull)
	for name, accepted := range map[string]bool{"broker.example": true, "127.0.0.1": true, "other.example": false} {
		cfg := b.files
		cfg.ServerName = name
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if accepted {
			ctx = t.Context()
		}
		_, err := newClient(t, b.addr, cfg).Describe(ctx, dbKey)
		cancel()
		if (err == nil) != accepted {
			t.Errorf("server name %s: got error %v, want accepted %t", name, err, accepted)
		}
	}
}

func TestHandshakeRefused(t *testing.T) {
	t.Parallel()
	tests := map[string]func(t *testing.T) *client.Client{
		"the broker's CA is another": func(t *testing.T) *client.Client {
			b := start(t, nil)
			cfg := b.files
			cfg.CAFile = newCA(t).issue(t).CAFile
			return newClient(t, b.addr, cfg)
		},
		"the caller's CA is another": func(t *testing.T) *client.Client {
			b := start(t, nil)
			cfg := newCA(t).issue(t)
			cfg.CAFile = b.files.CAFile
			return newClient(t, b.addr, cfg)
		},
		"TLS 1.2": func(t *testing.T) *client.Client {
			return startTLS(t, tls.VersionTLS12, nil).client(t)
		},
	}
	for name, connect := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// A call waits for a broker that accepts it, and says why there was none.
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := connect(t).Put(ctx, dbKey, secret.NewValue(dbURI), client.PutOptions{})
			e, ok := errors.AsType[*client.Error](err)
			if !ok || e.Code != codes.DeadlineExceeded || e.CommitState != secret.Unknown || !strings.Contains(e.Message, "latest balancer error") {
				t.Errorf("got %#v, want DEADLINE_EXCEEDED, UNKNOWN, with why no connection is ready", err)
			}
		})
	}
}

func TestNewNamesFieldAndFile(t *testing.T) {
	t.Parallel()
	good := newCA(t).issue(t)
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage.pem")
	if err := os.WriteFile(garbage, []byte("not PEM\nat all\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(dir, "missing.pem")
	otherKey := newCA(t).issue(t).KeyFile
	tests := []struct {
		name   string
		change func(*client.Config)
		want   []string
	}{
		{"no CertFile", func(c *client.Config) { c.CertFile = "" }, []string{"CertFile"}},
		{"no KeyFile", func(c *client.Config) { c.KeyFile = "" }, []string{"KeyFile"}},
		{"no CAFile", func(c *client.Config) { c.CAFile = "" }, []string{"CAFile"}},
		{"missing CertFile", func(c *client.Config) { c.CertFile = missing }, []string{"CertFile", missing}},
		{"missing KeyFile", func(c *client.Config) { c.KeyFile = missing }, []string{"KeyFile", missing}},
		{"missing CAFile", func(c *client.Config) { c.CAFile = missing }, []string{"CAFile", missing}},
		{"bad CertFile", func(c *client.Config) { c.CertFile = garbage }, []string{"CertFile", garbage}},
		{"bad KeyFile", func(c *client.Config) { c.KeyFile = garbage }, []string{"KeyFile", garbage}},
		{"bad CAFile", func(c *client.Config) { c.CAFile = garbage }, []string{"CAFile", garbage}},
		{"another's key", func(c *client.Config) { c.KeyFile = otherKey }, []string{"KeyFile", otherKey}},
	}
	for _, test := range tests {
		cfg := good
		test.change(&cfg)
		_, err := client.New("127.0.0.1:1", cfg)
		if err == nil {
			t.Errorf("%s: got no error", test.name)
			continue
		}
		for _, want := range test.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %q, want %q in it", test.name, err, want)
			}
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got more than one line: %q", test.name, err)
		}
	}
	if _, err := client.New("", good); err == nil {
		t.Error("no target: got no error")
	}
}

// New must not need the broker: programs start in any order.
func TestNewConnectsLazily(t *testing.T) {
	t.Parallel()
	b := start(t, answerFull)
	var dialled atomic.Int32
	c := b.client(t, grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		dialled.Add(1)
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}))
	if got := dialled.Load(); got != 0 {
		t.Errorf("New dialled %d times, want none", got)
	}
	for range 2 {
		if _, err := c.Describe(t.Context(), dbKey); err != nil {
			t.Fatal(err)
		}
	}
	if got := dialled.Load(); got != 1 {
		t.Errorf("two calls dialled %d times, want once", got)
	}
}

func TestClose(t *testing.T) {
	t.Parallel()
	c := start(t, answerFull).client(t)
	if err := c.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	for _, op := range operations {
		checkUnknown(t, op, op.call(t.Context(), c, ""), context.Canceled)
	}
}

func TestDeadlines(t *testing.T) {
	t.Parallel()
	b := start(t, answerFull)
	c := b.client(t)
	for _, op := range operations {
		timeout := 30 * time.Second
		if op.write {
			timeout = 2 * time.Minute
		}
		checkDeadline(t, b, op.name+" without deadline", timeout, func() error { return op.call(t.Context(), c, "") })

		// The caller's own deadline holds, shorter or longer.
		for _, own := range []time.Duration{10 * time.Second, time.Hour} {
			ctx, cancel := context.WithTimeout(t.Context(), own)
			checkDeadline(t, b, op.name+" with deadline", own, func() error { return op.call(ctx, c, "") })
			cancel()
		}
	}
}

// checkDeadline makes a call and looks at the deadline of the last one that the
// broker saw.
func checkDeadline(t *testing.T, b *broker, name string, timeout time.Duration, call func() error) {
	t.Helper()
	before := time.Now()
	if err := call(); err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	calls := b.seen()
	got := calls[len(calls)-1].deadline
	// The context's may have been made a little before; gRPC rounds up, by a
	// second at most.
	earliest, latest := before.Add(timeout-time.Second), time.Now().Add(timeout+time.Second)
	if got.Before(earliest) || got.After(latest) {
		t.Errorf("%s: the broker got a deadline %v from now, want %v", name, got.Sub(before), timeout)
	}
}

func TestContextErrors(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{}, 1)
	b := start(t, func(ctx context.Context, _ proto.Message) (proto.Message, error) {
		arrived <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	})
	c := b.client(t)
	for _, op := range operations {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-arrived
			cancel()
		}()
		checkUnknown(t, op, op.call(ctx, c, ""), context.Canceled)

		ctx, cancel = context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
		checkUnknown(t, op, op.call(ctx, c, ""), context.DeadlineExceeded)
		cancel()
	}
}

// checkUnknown looks for an error that does not come from the broker.
func checkUnknown(t *testing.T, op operation, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", op.name, err, want)
		return
	}
	e, ok := errors.AsType[*client.Error](err)
	if !ok || e.Reason != "" {
		t.Errorf("%s: got %#v, want an *Error without reason", op.name, err)
		return
	}
	state := secret.CommitState("")
	if op.write {
		state = secret.Unknown
	}
	if e.CommitState != state {
		t.Errorf("%s: got commit state %q, want %q", op.name, e.CommitState, state)
	}
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	c := start(t, answerFull).client(t)
	var wg sync.WaitGroup
	for range 4 {
		for _, op := range operations {
			wg.Go(func() {
				if err := op.call(t.Context(), c, ""); err != nil {
					t.Errorf("%s: %v", op.name, err)
				}
			})
		}
	}
	wg.Wait()
}
