package server_test

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/pki"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
)

// promised is within what time a change of trust counts on open connections.
const promised = 5 * time.Second

// often reads files again and again.
func often(c *server.TrustConfig) { c.SetReadEvery(5 * time.Millisecond) }

// TestTheRevokedStopAndOthersLoseNothing: 200 callers whose calls never end, and
// watches, on one server; half of them are revoked at once, each in another way.
func TestTheRevokedStopAndOthersLoseNothing(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	wall := &clock{now: time.Now()}
	otherCA, err := pki.NewCA("other CA", time.Now(), 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	rule := func(name string) string {
		return "  - identity: spiffe://console.exto/team/" + name + "\n    allow: [get, watch]\n"
	}
	before := policy
	for _, name := range []string{"serial", "caller", "expiry", "ca", "stays"} {
		before += rule(name)
	}
	s.policy = before + rule("policy")
	s.config = func(c *server.Config) { c.Now, c.Logger = wall.Now, slog.New(slog.DiscardHandler) }
	s.trust = func(c *server.TrustConfig) {
		often(c)
		c.Files.Revoked = s.write("revoked", nil)
		c.Files.ClientCA = s.write("ca.pem", append(s.ca.CertPEM(), otherCA.CertPEM()...))
	}
	s.startEmbedded()
	x := s.in(t, "demo", "active")
	issue := func(ca pki.Pair, name string, life time.Duration) pki.Pair {
		t.Helper()
		pair, err := ca.Issue(template("team/"+name), time.Now(), life)
		if err != nil {
			t.Fatal(err)
		}
		return pair
	}
	lost := map[string]pki.Pair{
		"serial": issue(s.ca, "serial", 10*time.Hour), "caller": issue(s.ca, "caller", 10*time.Hour), "expiry": issue(s.ca, "expiry", 20*time.Minute),
		"ca": issue(otherCA, "ca", 10*time.Hour), "policy": issue(s.ca, "policy", 10*time.Hour),
	}

	background := callContext(t)
	get := func(c secretsv1.SecretsBrokerServiceClient) error {
		_, err := c.GetSecret(background, &secretsv1.GetSecretRequest{Ref: x.ref})
		return err
	}
	var losing, lostAll, staying sync.WaitGroup
	var calls atomic.Int64
	stop := make(chan struct{})
	end := sync.OnceFunc(func() { close(stop); staying.Wait() })
	defer end()
	begin := func(pair pki.Pair, callers int, of *sync.WaitGroup, loop func(c secretsv1.SecretsBrokerServiceClient)) *watching {
		c := secretsv1.NewSecretsBrokerServiceClient(s.dial(s.clientTLS(pair)))
		w := watch(t, c, x.ref)
		w.want("CURRENT ACTIVE/2")
		for range callers {
			of.Go(func() { loop(c) })
		}
		return w
	}
	var ending, going []*watching
	over := make(chan struct{})
	for name, pair := range lost {
		losing.Add(20)
		ending = append(ending, begin(pair, 20, &lostAll, func(c secretsv1.SecretsBrokerServiceClient) {
			var err error
			for err == nil {
				err = get(c)
			}
			losing.Done()
			<-over
			for range 5 { // and are never let in again
				if err == nil || failed(t, err).reason != secret.CallerUnknown {
					t.Errorf("%s: got %v, want CALLER_UNKNOWN", name, err)
					return
				}
				err = get(c)
			}
		}))
	}
	for range 5 {
		going = append(going, begin(issue(s.ca, "stays", 10*time.Hour), 20, &staying, func(c secretsv1.SecretsBrokerServiceClient) {
			for {
				if err := get(c); err != nil {
					t.Errorf("a caller who is not revoked: %v", err)
					return
				}
				calls.Add(1)
				select {
				case <-stop:
					return
				default:
				}
			}
		}))
	}

	ctx, cancel := context.WithTimeout(context.Background(), promised)
	defer cancel()
	wall.advance(30 * time.Minute)
	s.replace("ca.pem", s.ca.CertPEM())
	s.replace("policy.yaml", []byte(before))
	s.replace("revoked", []byte("spiffe://console.exto/team/caller\n"+colons(lost["serial"].Cert)+"\n"))
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		losing.Wait()
		for _, w := range ending {
			w.wantEnd(codes.Unauthenticated, secret.CallerUnknown)
		}
	}()
	select {
	case <-stopped:
	case <-ctx.Done():
		t.Errorf("some of the revoked go on after %v", promised)
		<-stopped
	}
	close(over)
	lostAll.Wait()
	// Those who are issued new certificates come back.
	for _, name := range []string{"serial", "expiry", "ca"} {
		again := secretsv1.NewSecretsBrokerServiceClient(s.dial(s.clientTLS(issue(s.ca, name, 10*time.Hour))))
		if err := get(again); err != nil {
			t.Errorf("%s, re-issued: %v", name, err)
		}
	}
	x.put(3)
	for _, w := range going {
		w.want("PUT ACTIVE/3")
	}
	end()
	if n := calls.Load(); n < 100 {
		t.Errorf("got %d calls of those who stay, want one of each at least", n)
	}
}

// TestCertificatesSwappedUnderLoad, 50 times, in two writes each, with new connections
// all the time: no call fails.
func TestCertificatesSwappedUnderLoad(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.trust = often
	s.startEmbedded()
	x := s.in(t, "demo", "active")
	cfg := s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI))
	background := callContext(t)
	get := func(c secretsv1.SecretsBrokerServiceClient) {
		if _, err := c.GetSecret(background, &secretsv1.GetSecretRequest{Ref: x.ref}); err != nil {
			t.Errorf("a call: %v", err)
		}
	}
	stop := make(chan struct{})
	var load sync.WaitGroup
	forever := func(f func()) {
		load.Go(func() {
			for {
				f()
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	for range 8 {
		forever(func() { get(x.c) })
	}
	var connections atomic.Int64
	for range 4 {
		forever(func() {
			conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
			if err != nil {
				t.Error(err)
				return
			}
			get(secretsv1.NewSecretsBrokerServiceClient(conn))
			_ = conn.Close()
			connections.Add(1)
		})
	}
	for n := range 50 {
		next := s.serverPair()
		put := s.replace
		if n%2 == 1 { // over the old one
			put = func(name string, content []byte) { s.write(name, content) }
		}
		if n%4 < 2 {
			put("server.pem", next.CertPEM())
			put("server-key.pem", s.keyPEM(next))
		} else {
			put("server-key.pem", s.keyPEM(next))
			put("server.pem", next.CertPEM())
		}
		for !s.served(cfg).Equal(next.Cert) {
			if background.Err() != nil {
				t.Fatalf("certificate %d is never served", n)
			}
		}
	}
	close(stop)
	load.Wait()
	if n := connections.Load(); n < 50 {
		t.Errorf("got %d new connections, want one for each swap at least", n)
	}
	if n := s.configFile("reloads_total", "certificate"); n < 50 {
		t.Errorf("got %v reloads of the certificate, want 50 at least", n)
	}
}
