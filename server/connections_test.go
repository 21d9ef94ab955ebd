package server_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/pki"
	"github.com/exto/secrets-broker/server"
)

// counted is a system whose metrics a test reads.
func counted(t *testing.T, b server.Bounds, change func(*server.Config)) (*system, func(why string) int) {
	t.Helper()
	s, metrics := newSystem(t), prometheus.NewRegistry()
	s.config = func(c *server.Config) {
		c.Metrics = metrics
		c.SetBounds(b)
		if change != nil {
			change(c)
		}
	}
	s.startEmbedded()
	return s, func(why string) int {
		t.Helper()
		families, err := metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			if family.GetName() != "secrets_broker_refused_before_handler_total" {
				continue
			}
			for _, m := range family.GetMetric() {
				if m.GetLabel()[0].GetValue() == why {
					return int(m.GetCounter().GetValue())
				}
			}
		}
		t.Fatalf("no counter for %q", why)
		return 0
	}
}

// wantCount waits until so many were refused for that reason.
func wantCount(t *testing.T, count func(string) int, why string, want int) {
	t.Helper()
	eventually(t, why+" is counted", func() bool { return count(why) >= want })
	if got := count(why); got != want {
		t.Errorf("%s: got %d, want %d", why, got, want)
	}
}

// callerTLS is for connections on which a test speaks HTTP/2 by hand.
func (s *system) callerTLS(path string) *tls.Config {
	cfg := s.clientTLS(s.certificate(spiffe(path)))
	cfg.NextProtos, cfg.ServerName = []string{"h2"}, "127.0.0.1"
	return cfg
}

// wantEnd checks that the server ends a connection.
func wantEnd(t *testing.T, conn net.Conn, what string) {
	t.Helper()
	deadline, _ := callContext(t).Deadline()
	_ = conn.SetReadDeadline(deadline)
	if _, err := io.ReadAll(conn); isTimeout(err) {
		t.Errorf("%s: the connection is still open", what)
	}
}

// TestSilentConnectionsKeepNobodyOut: however many there are, the oldest make room.
func TestSilentConnectionsKeepNobodyOut(t *testing.T) {
	t.Parallel()
	s, count := counted(t, server.Bounds{Handshakes: 4}, func(c *server.Config) { c.SetHandshakeTimeout(time.Hour) })
	var silent []net.Conn
	for range 4 {
		silent = append(silent, s.silent(t, ""))
	}
	// Past the handshake, but silent then: the same.
	conn, err := tls.Dial("tcp", s.addr, s.callerTLS(worker))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := list(t, s.as(consoleAPI)); err != nil {
		t.Errorf("a client beside silent ones: %v", err)
	}
	wantEnd(t, silent[0], "the oldest silent one")
	wantCount(t, count, "handshakes", 2)
	for range 4 {
		s.silent(t, "")
	}
	wantEnd(t, conn, "one without HTTP/2")
	eventually(t, "it is forgotten", func() bool { return s.face.Usage(spiffe(worker)).Connections == 0 })
	if err := list(t, s.as(consoleAPI)); err != nil {
		t.Errorf("a client beside silent ones: %v", err)
	}
}

func TestConnectionsOfOneCaller(t *testing.T) {
	t.Parallel()
	s, count := counted(t, server.Bounds{CallerConnections: 2}, nil)
	first, second := s.dial(s.callerTLS(consoleAPI)), s.dial(s.callerTLS(consoleAPI))
	for _, c := range []secretsv1.SecretsBrokerServiceClient{secretsv1.NewSecretsBrokerServiceClient(first), secretsv1.NewSecretsBrokerServiceClient(second)} {
		if err := list(t, c); err != nil {
			t.Fatal(err)
		}
	}
	third := secretsv1.NewSecretsBrokerServiceClient(s.dial(s.callerTLS(consoleAPI)))
	if f := failed(t, list(t, third)); f.code != codes.Unavailable {
		t.Errorf("a third connection: got %v, want UNAVAILABLE", f.code)
	}
	if count("caller_connections") == 0 || !s.logHasLine("refused before a handler", "caller_connections", spiffe(consoleAPI)) {
		t.Error("a third connection was neither counted nor logged")
	}
	if err := list(t, s.as(worker)); err != nil {
		t.Errorf("another identity: %v", err)
	}
	_ = first.Close()
	eventually(t, "there is room again", func() bool { return list(t, third) == nil })
}

func TestConnectionsOfAll(t *testing.T) {
	t.Parallel()
	s, count := counted(t, server.Bounds{Connections: 2}, nil)
	if err := list(t, s.as(consoleAPI)); err != nil {
		t.Fatal(err)
	}
	conn := s.dial(s.callerTLS(worker))
	if err := list(t, secretsv1.NewSecretsBrokerServiceClient(conn)); err != nil {
		t.Fatal(err)
	}
	third := s.as(operator)
	if f := failed(t, list(t, third)); f.code != codes.Unavailable {
		t.Errorf("a third connection: got %v, want UNAVAILABLE", f.code)
	}
	if count("connections") == 0 {
		t.Error("a third connection was not counted")
	}
	_ = conn.Close()
	eventually(t, "there is room again", func() bool { return list(t, third) == nil })
}

// TestHandshakesAreCounted: what a handshake failed for, as far as the server can know.
func TestHandshakesAreCounted(t *testing.T) {
	t.Parallel()
	// Long enough for those that are to come to their end beside other tests.
	s, count := counted(t, server.Bounds{}, func(c *server.Config) { c.SetHandshakeTimeout(3 * time.Second) })
	other, err := pki.NewCA("another CA", time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	caller, _ := url.Parse(spiffe(consoleAPI))
	template := x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, URIs: []*url.URL{caller}}
	foreign, err := other.Issue(template, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	expired, err := s.ca.Issue(template, time.Now().Add(-3*time.Hour), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	// A client in Go shows no certificate that the server did not ask for.
	show := func(pair pki.Pair) *tls.Config {
		cfg, cert := s.callerTLS(consoleAPI), pair.TLS()
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		return cfg
	}
	old := s.callerTLS(consoleAPI)
	old.MaxVersion = tls.VersionTLS12
	for why, dial := range map[string]func() (net.Conn, error){
		"no_certificate": func() (net.Conn, error) { return tls.Dial("tcp", s.addr, s.clientTLS()) },
		"unknown_ca":     func() (net.Conn, error) { return tls.Dial("tcp", s.addr, show(foreign)) },
		"expired":        func() (net.Conn, error) { return tls.Dial("tcp", s.addr, show(expired)) },
		"tls_version": func() (net.Conn, error) {
			conn, err := tls.Dial("tcp", s.addr, old)
			if err == nil {
				t.Error("TLS 1.2 was accepted")
			}
			return conn, nil
		},
		"handshake_timeout": func() (net.Conn, error) { return s.silent(t, ""), nil },
		"handshake_other":   func() (net.Conn, error) { return s.silent(t, "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"), nil },
		"preface": func() (net.Conn, error) {
			conn, err := tls.Dial("tcp", s.addr, s.callerTLS(consoleAPI))
			if err == nil {
				_, err = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
			}
			return conn, err
		},
	} {
		conn, err := dial()
		if err != nil && why != "no_certificate" && why != "unknown_ca" && why != "expired" {
			t.Fatalf("%s: %v", why, err)
		}
		wantCount(t, count, why, 1)
		if c, ok := conn.(*tls.Conn); (ok && c != nil) || (!ok && conn != nil) {
			wantEnd(t, conn, why)
			_ = conn.Close()
		}
	}
	// Nobody vouches for what a client shows.
	if !s.logHasLine("refused before a handler", "why=expired", "offered.caller="+spiffe(consoleAPI), "offered.serial="+expired.Cert.SerialNumber.Text(16)) {
		t.Error("the log does not name the expired certificate")
	}
	if strings.Contains(s.log.String(), "why=unknown_ca caller=") {
		t.Error("the log takes another CA's certificate at its word")
	}
	if err := list(t, s.as(consoleAPI)); err != nil {
		t.Errorf("a client of the usual kind: %v", err)
	}
}
