package client_test

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/protobuf/proto"

	"github.com/exto/secrets-broker/client"
	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// copyFiles puts the files of one Config in the place of another's.
func copyFiles(t *testing.T, to, from client.Config) {
	t.Helper()
	for _, pair := range [][2]string{{to.CertFile, from.CertFile}, {to.KeyFile, from.KeyFile}, {to.CAFile, from.CAFile}} {
		data, err := os.ReadFile(pair[1])
		if err != nil {
			t.Fatal(err)
		}
		write(t, pair[0], data)
	}
}

// eventually asks until so, or the test's patience ends.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(30 * time.Second); !so(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// TestRenewedCertificate renews the certificate under calls that go on all the
// time, with one that began before and a watch. No call fails, all go over to the
// new certificate, and the old connection is closed.
func TestRenewedCertificate(t *testing.T) {
	t.Parallel()
	held, release := make(chan struct{}, 1), make(chan struct{})
	b := start(t, func(ctx context.Context, req proto.Message) (proto.Message, error) {
		if _, ok := req.(*secretsv1.DescribeSecretRequest); ok {
			held <- struct{}{}
			<-release
		}
		return answerFull(ctx, req)
	})
	watches := make(chan struct{}, 10)
	b.watch = func(_ *secretsv1.WatchSecretsRequest, stream grpc.ServerStreamingServer[secretsv1.WatchSecretsResponse]) error {
		watches <- struct{}{}
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	files := b.ca.issue(t)
	var open atomic.Int32
	c := newClient(t, b.addr, files, grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err == nil {
			open.Add(1)
			conn = &counted{Conn: conn, open: &open}
		}
		return conn, err
	}))
	client.NoRetries(c) // so that a call that fails is seen
	latest := func() *x509.Certificate {
		if _, err := c.Get(t.Context(), dbKey, client.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		calls := b.seen()
		return calls[len(calls)-1].tls.PeerCertificates[0]
	}
	first := latest()

	var others sync.WaitGroup
	defer others.Wait()
	others.Go(func() {
		if _, err := c.Describe(t.Context(), dbKey); err != nil {
			t.Errorf("the call under way: %v", err)
		}
	})
	<-held
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	others.Go(func() {
		for _, err := range c.Watch(ctx, dbKey) {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("the watch ended: %v", err)
			}
		}
	})
	<-watches

	copyFiles(t, files, b.ca.issue(t))
	eventually(t, "calls with the new certificate", func() bool { return !latest().Equal(first) })
	<-watches // on the new connection
	if got := open.Load(); got != 2 {
		t.Errorf("got %d connections with a call under way on the old one, want 2", got)
	}
	close(release)
	eventually(t, "the old connection closed", func() bool { return open.Load() == 1 })
}

// counted is a connection that is counted while it is open.
type counted struct {
	net.Conn
	open *atomic.Int32
	once sync.Once
}

func (c *counted) Close() error {
	c.once.Do(func() { c.open.Add(-1) })
	return c.Conn.Close()
}

func TestFilesThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	b := start(t, answerFull)
	files := b.ca.issue(t)
	c := b.clientOf(t, files)
	call := func() seen {
		t.Helper()
		if _, err := c.Get(t.Context(), dbKey, client.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		calls := b.seen()
		return calls[len(calls)-1]
	}
	first := call().tls.PeerCertificates[0]
	other := newCA(t).issue(t) // the broker refuses it
	for _, bad := range []func(){
		func() { write(t, files.CertFile, []byte("half a fi")) },
		func() { copyFiles(t, files, other) },
	} {
		bad()
		client.WaitForFiles(c)
		if got := call().tls.PeerCertificates[0]; !got.Equal(first) {
			t.Error("the broker saw another certificate, want the old one")
		}
	}
	copyFiles(t, files, b.ca.issue(t))
	eventually(t, "calls with a good certificate", func() bool { return !call().tls.PeerCertificates[0].Equal(first) })
}

// A handshake is made with what the files hold then: here the CA is the broker's
// only after a while.
func TestHandshakeReadsTheFiles(t *testing.T) {
	t.Parallel()
	b := start(t, answerFull)
	files := newCA(t).issue(t)
	c := b.clientOf(t, files)
	done := make(chan error, 1)
	go func() {
		_, err := c.Get(t.Context(), dbKey, client.GetOptions{})
		done <- err
	}()
	copyFiles(t, files, b.ca.issue(t))
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Of several addresses those are called at which the broker says that it serves;
// where none does, calls wait.
func TestHealthLeadsTheCalls(t *testing.T) {
	t.Parallel()
	one := start(t, answerFull)
	two := one.another(t)
	two.serve(false)
	names := manual.NewBuilderWithScheme("test")
	names.InitialState(resolver.State{Addresses: []resolver.Address{{Addr: one.addr}, {Addr: two.addr}}})
	files := one.files
	files.ServerName = "broker.example"
	c := newClient(t, "test:///brokers", files, grpc.WithResolvers(names))
	client.NoRetries(c)
	get := func(timeout time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		_, err := c.Get(ctx, dbKey, client.GetOptions{})
		return err
	}
	for range 20 {
		if err := get(time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(two.seen()); got != 0 {
		t.Errorf("got %d calls where nobody serves, want none", got)
	}
	two.serve(true)
	one.serve(false)
	eventually(t, "calls at the other broker alone", func() bool {
		before := len(two.seen())
		for range 4 {
			if err := get(time.Minute); err != nil {
				t.Fatal(err)
			}
		}
		return len(two.seen()) == before+4
	})
	two.serve(false)
	eventually(t, "calls wait", func() bool {
		e, ok := errors.AsType[*client.Error](get(100 * time.Millisecond))
		return ok && e.Code == codes.DeadlineExceeded
	})
	one.serve(true)
	if err := get(time.Minute); err != nil {
		t.Error(err)
	}
}
