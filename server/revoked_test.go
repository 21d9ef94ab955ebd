package server_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/pki"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
)

// colons writes a serial number as openssl does.
func colons(c *x509.Certificate) string {
	var parts []string
	for _, b := range append([]byte{0}, c.SerialNumber.Bytes()...) {
		parts = append(parts, fmt.Sprintf("%02X", b))
	}
	return strings.Join(parts, ":")
}

// template is a caller's certificate before somebody issues it.
func template(path string) x509.Certificate {
	return x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, URIs: []*url.URL{{Scheme: "spiffe", Host: "console.exto", Path: "/" + path}}}
}

// open is all that can be open on a connection.
type open struct {
	t          *testing.T
	conn       *grpc.ClientConn
	watch      *watching
	reflection grpc.BidiStreamingClient[reflectionpb.ServerReflectionRequest, reflectionpb.ServerReflectionResponse]
}

// open begins a stream of each kind; the caller may watch and debug.
func (s *system) open(t *testing.T, pair pki.Pair) *open {
	t.Helper()
	o := &open{t: t, conn: s.dial(s.clientTLS(pair))}
	o.watch = watch(t, secretsv1.NewSecretsBrokerServiceClient(o.conn), ref("demo", uriKind))
	o.watch.want("MISSING")
	var err error
	if o.reflection, err = reflectionpb.NewServerReflectionClient(o.conn).ServerReflectionInfo(callContext(t)); err != nil {
		t.Fatal(err)
	}
	o.works()
	return o
}

// calls makes a call of each kind.
func (o *open) calls() map[string]error {
	_, list := secretsv1.NewSecretsBrokerServiceClient(o.conn).ListSecrets(callContext(o.t), &secretsv1.ListSecretsRequest{})
	return map[string]error{"list": list}
}

func (o *open) works() {
	o.t.Helper()
	for what, err := range o.calls() {
		if err != nil {
			o.t.Errorf("%s: %v", what, err)
		}
	}
	if err := o.reflection.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		o.t.Error(err)
	}
	if _, err := o.reflection.Recv(); err != nil {
		o.t.Errorf("reflection: %v", err)
	}
}

// wantOver checks that nothing is left of what was open, and nothing new begins.
func (o *open) wantOver() {
	o.t.Helper()
	for what, err := range o.calls() {
		if err == nil {
			o.t.Errorf("%s: let in", what)
			continue
		}
		wantReason(o.t, err, secret.CallerUnknown, "")
		if f := failed(o.t, err); f.code != codes.Unauthenticated || contains(f.status.Message(), "revoked:") {
			o.t.Errorf("%s: got %v, want UNAUTHENTICATED", what, f.status)
		}
	}
	o.watch.wantEnd(codes.Unauthenticated, secret.CallerUnknown)
	_, err := o.reflection.Recv()
	wantReason(o.t, err, secret.CallerUnknown, "")
}

// TestCertificateIsNoneAnyMore, each in another way, while another one of the same
// caller goes on, and the caller's next one is as good.
func TestCertificateIsNoneAnyMore(t *testing.T) {
	t.Parallel()
	type taken struct {
		s           *system
		wall        *clock
		lost, other pki.Pair
	}
	for name, tt := range map[string]struct {
		take func(x *taken)
		give func(x *taken) // nil: it was for good
		why  string
	}{
		"serial":                  {func(x *taken) { x.s.replace("revoked", []byte(x.lost.Cert.SerialNumber.Text(16)+"\n")) }, func(x *taken) { x.s.replace("revoked", nil) }, "the certificate is revoked"},
		"serial as openssl's":     {func(x *taken) { x.s.replace("revoked", []byte("# lost\r\n\r\n"+colons(x.lost.Cert)+" # laptop\r\n")) }, nil, "the certificate is revoked"},
		"SPIFFE ID":               {func(x *taken) { x.s.replace("revoked", []byte("spiffe://console.exto/team/lost\n")) }, func(x *taken) { x.s.replace("revoked", nil) }, "the certificate is revoked"},
		"expiry":                  {func(x *taken) { x.wall.advance(30 * time.Minute) }, nil, "has expired"},
		"client CA":               {func(x *taken) { x.s.replace("ca.pem", x.s.ca.CertPEM()) }, nil, "not of the present client CA"},
		"policy":                  {func(x *taken) { x.s.replace("policy.yaml", []byte(policy+teamRule("other"))) }, func(x *taken) { x.s.replace("policy.yaml", []byte(x.s.policy)) }, "no rule of the policy"},
		"serial, then expiry too": {func(x *taken) { x.s.replace("revoked", []byte(colons(x.lost.Cert))); x.wall.advance(30 * time.Minute) }, nil, "the certificate is revoked"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSystem(t)
			wall := &clock{now: time.Now()}
			s.policy += teamRule("lost") + teamRule("other")
			ca, err := pki.NewCA("other CA", time.Now(), 24*time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			s.config = func(c *server.Config) { c.Now = wall.Now }
			s.trust = func(c *server.TrustConfig) {
				withRevoked(s)(c)
				c.Files.ClientCA = s.write("ca.pem", append(s.ca.CertPEM(), ca.CertPEM()...))
			}
			s.startEmbedded()
			x := &taken{s: s, wall: wall, other: s.certificate("spiffe://console.exto/team/other")}
			if x.lost, err = ca.Issue(template("team/lost"), time.Now(), 20*time.Minute); err != nil {
				t.Fatal(err)
			}
			lost, other := s.open(t, x.lost), s.open(t, x.other)
			tt.take(x)
			s.look()
			if name == "policy" { // which says nothing of the certificate
				delete := func(err error) { wantReason(t, err, secret.CallerUnknown, "") }
				delete(lost.calls()["list"])
				lost.watch.wantEnd(codes.Unauthenticated, secret.CallerUnknown)
				_, err := lost.reflection.Recv()
				delete(err)
			} else {
				lost.wantOver()
			}
			other.works()
			if !s.logHasLine("level=WARN", "caller=spiffe://console.exto/team/lost", tt.why) {
				t.Errorf("the log has no line that says why: %s", tt.why)
			}
			if name != "SPIFFE ID" && name != "policy" {
				s.open(t, s.certificate("spiffe://console.exto/team/lost")) // re-issued
			}
			if tt.give != nil {
				tt.give(x)
				s.look()
				lost.watch = watch(t, secretsv1.NewSecretsBrokerServiceClient(lost.conn), ref("demo", uriKind))
				lost.watch.want("MISSING")
				for what, err := range lost.calls() {
					if err != nil {
						t.Errorf("%s, given back: %v", what, err)
					}
				}
			}
			other.works()
		})
	}
}

func teamRule(name string) string {
	return "  - identity: spiffe://console.exto/team/" + name + "\n    allow: [list, watch, debug]\n"
}

// TestEverythingBetweenCertificateAndCA counts: an intermediate one that is revoked or
// expires takes with it what it issued; the CA's own number means nothing.
func TestEverythingBetweenCertificateAndCA(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	wall := &clock{now: time.Now()}
	s.config = func(c *server.Config) { c.Now = wall.Now }
	s.trust = withRevoked(s)
	s.startEmbedded()
	intermediate := func(life time.Duration) pki.Pair {
		t.Helper()
		pair, err := pki.NewCA("intermediate", time.Now(), life)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, pair.Cert, s.ca.Cert, pair.Key.Public(), s.ca.Key)
		if err != nil {
			t.Fatal(err)
		}
		if pair.Cert, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		return pair
	}
	list := func(from pki.Pair) func() error {
		t.Helper()
		leaf, err := from.Issue(template(consoleAPI), time.Now(), 20*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		cfg := s.clientTLS(leaf)
		cfg.Certificates[0].Certificate = append(cfg.Certificates[0].Certificate, from.Cert.Raw)
		c := secretsv1.NewSecretsBrokerServiceClient(s.dial(cfg))
		return func() error {
			_, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
			return err
		}
	}
	short, long := intermediate(time.Hour), intermediate(10*time.Hour)
	first, second := list(short), list(long)
	for what, call := range map[string]func() error{"first": first, "second": second} {
		if err := call(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	wall.advance(time.Hour + time.Second)
	wantReason(t, first(), secret.CallerUnknown, "")
	if err := second(); err != nil {
		t.Errorf("of one that has not expired: %v", err)
	}
	s.replace("revoked", []byte(colons(s.ca.Cert)))
	s.look()
	if err := second(); err != nil {
		t.Errorf("with the CA's number revoked: %v", err)
	}
	// Another client CA file, so that the chain is built again, and after the end of one.
	s.replace("ca.pem", append(s.ca.CertPEM(), '\n'))
	s.look()
	wantReason(t, first(), secret.CallerUnknown, "")
	if err := second(); err != nil {
		t.Errorf("with the same client CA written another way: %v", err)
	}
	wall.advance(-2 * time.Second) // what has no chain for its time alone is tried again
	if err := first(); err != nil {
		t.Errorf("within its time again: %v", err)
	}
	s.replace("revoked", []byte(colons(long.Cert)))
	s.look()
	wantReason(t, second(), secret.CallerUnknown, "")
	if err := first(); err != nil {
		t.Errorf("of one that is not revoked: %v", err)
	}
}

// TestClientCAChangesDuringAHandshake, which then ends by the one before.
func TestClientCAChangesDuringAHandshake(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	ca, err := pki.NewCA("other CA", time.Now(), 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	s.trust = func(c *server.TrustConfig) {
		quiet(c)
		c.Files.ClientCA = s.write("ca.pem", append(s.ca.CertPEM(), ca.CertPEM()...))
	}
	s.startEmbedded()
	pair, err := ca.Issue(template(consoleAPI), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.clientTLS()
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		s.replace("ca.pem", s.ca.CertPEM())
		s.look()
		cert := pair.TLS()
		return &cert, nil
	}
	_, err = secretsv1.NewSecretsBrokerServiceClient(s.dial(cfg)).ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
	wantReason(t, err, secret.CallerUnknown, "")
}

// TestPolicyChangesUnderWatches: a watch of which one secret is no longer allowed
// ends, and all others go on.
func TestPolicyChangesUnderWatches(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.trust = quiet
	rule := func(allow, instances string) string {
		return "  - identity: spiffe://console.exto/team\n    allow: [" + allow + "]\n    instances: [" + instances + "]\n"
	}
	s.policy += rule("watch, get", "one, two")
	s.startEmbedded()
	c := s.as("team")
	begin := func(ids ...string) *watching {
		t.Helper()
		var refs []*secretsv1.SecretRef
		for _, id := range ids {
			refs = append(refs, ref(id, uriKind))
		}
		w := watch(t, c, refs...)
		for range ids {
			w.want("MISSING")
		}
		return w
	}
	one, two, both := begin("one"), begin("two"), begin("two", "one")
	conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/team")))
	silent, err := conn.NewStream(callContext(t), &grpc.StreamDesc{ServerStreams: true}, secretsv1.SecretsBrokerService_WatchSecrets_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := healthpb.NewHealthClient(conn).Check(callContext(t), &healthpb.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	s.replace("policy.yaml", []byte(policy+rule("watch, get", "one")))
	s.look()
	two.wantEnd(codes.PermissionDenied, secret.CallerNotAllowed)
	both.wantEnd(codes.PermissionDenied, secret.CallerNotAllowed)
	s.in(t, "one", "absent").put(1)
	one.want("PUT ACTIVE/1")
	// One whose request came after the change, but that began before.
	if err := silent.SendMsg(&secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{ref("two", uriKind)}}); err != nil {
		t.Fatal(err)
	}
	wantReason(t, silent.RecvMsg(&secretsv1.WatchSecretsResponse{}), secret.CallerNotAllowed, "")
	_, err = c.GetSecret(callContext(t), &secretsv1.GetSecretRequest{Ref: ref("two", uriKind)})
	wantReason(t, err, secret.CallerNotAllowed, "")
	watch(t, c, ref("two", uriKind)).wantEnd(codes.PermissionDenied, secret.CallerNotAllowed)

	s.replace("policy.yaml", []byte(policy+rule("get", "one")))
	s.look()
	one.wantEnd(codes.PermissionDenied, secret.CallerNotAllowed)
	if _, err := c.GetSecret(callContext(t), &secretsv1.GetSecretRequest{Ref: ref("one", uriKind)}); err != nil {
		t.Error(err)
	}
}

// TestRevokedWhoDoesNotRead is gone all the same: the server waits for no room to send
// to it.
func TestRevokedWhoDoesNotRead(t *testing.T) {
	t.Parallel()
	s, w, filler, _ := stall(t) // its files are read every second
	defer w.end()
	ended := func() bool { return s.logHasLine("finished call", "WatchSecrets", "grpc.code=Unauthenticated") }
	if ended() {
		t.Fatal("it has ended before")
	}
	withoutOperator, _, _ := strings.Cut(policy, "  - identity: spiffe://console.exto/operator")
	s.replace("policy.yaml", []byte(withoutOperator))
	ctx, cancel := context.WithTimeout(context.Background(), promised)
	defer cancel()
	for !ended() {
		if ctx.Err() != nil {
			t.Fatalf("the watch goes on after %v", promised)
		}
		filler.c = s.as(consoleAPI)
		filler.put(1) // something to send
	}
}
