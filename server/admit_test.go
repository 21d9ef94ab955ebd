package server_test

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"testing"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/server"
)

// TestAdmittingAllocatesNothing while nothing changes: it is on the way of every call.
func TestAdmittingAllocatesNothing(t *testing.T) { // not in parallel, others allocate
	admit, s := admitting(t)
	if err := admit(); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(1000, func() { _ = admit() }); n > 0 {
		t.Errorf("got %v allocations for a call", n)
	}
	s.replace("policy.yaml", []byte(policy+"# again\n"))
	s.look()
	if err := admit(); err != nil {
		t.Errorf("after a change: %v", err)
	}
	if n := testing.AllocsPerRun(1000, func() { _ = admit() }); n > 0 {
		t.Errorf("after a change: got %v allocations for a call", n)
	}
}

func BenchmarkAdmit(b *testing.B) {
	admit, _ := admitting(b)
	b.ReportAllocs()
	for b.Loop() {
		if err := admit(); err != nil {
			b.Fatal(err)
		}
	}
}

func admitting(t testing.TB) (func() error, *system) {
	t.Helper()
	s := newSystem(t)
	cert := s.serverPair()
	cfg := server.TrustConfig{Logger: slog.New(slog.DiscardHandler), Files: server.Files{
		Cert: s.write("c.pem", cert.CertPEM()), Key: s.write("k.pem", s.keyPEM(cert)), ClientCA: s.write("a.pem", s.ca.CertPEM()),
		Policy: s.write("policy.yaml", []byte(policy)), Revoked: s.write("r", []byte("# nothing\n")),
	}}
	var err error
	if s.trusted, err = server.OpenTrust(cfg); err != nil {
		t.Fatal(err)
	}
	state := tls.ConnectionState{PeerCertificates: []*x509.Certificate{s.certificate("spiffe://console.exto/" + consoleAPI).Cert}}
	return server.Admitting(s.trusted, state, secretsv1.SecretsBrokerService_GetSecret_FullMethodName), s
}
