package server_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/pki"
	"github.com/exto/secrets-broker/server"
)

// serverPair is a certificate for a server on this machine.
func (s *system) serverPair() pki.Pair {
	s.t.Helper()
	return s.issue("server", x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, time.Hour)
}

// replace puts another file in the place of one, as careful writers do.
func (s *system) replace(name string, content []byte) {
	s.t.Helper()
	if err := os.Rename(s.write(name+".new", content), filepath.Join(s.dir, name)); err != nil {
		s.t.Fatal(err)
	}
}

// handshake connects with a client certificate and gives what the server showed.
// The error is that of the server's refusal too, which in TLS 1.3 comes only
// after the client's own handshake.
func (s *system) handshake(cfg *tls.Config) (tls.ConnectionState, error) {
	s.t.Helper()
	cfg = cfg.Clone()
	cfg.NextProtos = []string{"h2"}
	dialer := &tls.Dialer{Config: cfg}
	conn, err := dialer.DialContext(callContext(s.t), "tcp", s.addr)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer func() { _ = conn.Close() }()
	deadline, _ := callContext(s.t).Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return tls.ConnectionState{}, err
	}
	// The server's settings, after which tickets for resumption have come too.
	if _, err := io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
		return tls.ConnectionState{}, err
	}
	_, err = io.ReadFull(conn, make([]byte, 9))
	return conn.(*tls.Conn).ConnectionState(), err
}

// wantServed checks which certificate the server shows.
func (s *system) wantServed(cfg *tls.Config, want pki.Pair, when string) {
	s.t.Helper()
	state, err := s.handshake(cfg)
	if err != nil {
		s.t.Fatalf("%s: %v", when, err)
	}
	if got := state.PeerCertificates[0]; !got.Equal(want.Cert) {
		s.t.Errorf("%s: got the server certificate %x, want %x", when, got.SerialNumber, want.Cert.SerialNumber)
	}
}

// quiet reads files again when a test says so, by look.
func quiet(c *server.TrustConfig) { c.SetReadEvery(time.Hour) }

// look reads the files until a change of them is taken.
func (s *system) look() {
	for range 2 {
		s.trusted.Look()
	}
}

// startQuiet is startSystem with files that are read when the test says so.
func startQuiet(t *testing.T) *system {
	t.Helper()
	s := newSystem(t)
	s.trust = quiet
	s.startEmbedded()
	return s
}

func TestNewServerCertificate(t *testing.T) {
	t.Parallel()
	s := startQuiet(t)
	cfg := s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI))
	open := s.as(consoleAPI)
	list := func(when string) {
		t.Helper()
		if _, err := open.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{}); err != nil {
			t.Errorf("on the open connection %s: %v", when, err)
		}
	}
	list("before")
	next := s.serverPair()
	// Between the two writes certificate and key don't belong together.
	s.replace("server.pem", next.CertPEM())
	s.look()
	if state, err := s.handshake(cfg); err != nil || state.PeerCertificates[0].Equal(next.Cert) {
		t.Fatalf("a new certificate without its key: got %v, want that before to be in force", err)
	}
	s.replace("server-key.pem", s.keyPEM(next))
	s.look()
	s.wantServed(cfg, next, "a new certificate with its key")
	list("after")
	// Written over in place, too.
	next = s.serverPair()
	s.write("server.pem", append(next.CertPEM(), strings.Repeat("\n", 64)...))
	s.write("server-key.pem", append(s.keyPEM(next), strings.Repeat("\n", 64)...))
	s.look()
	s.wantServed(cfg, next, "written in place")
}

func TestNewClientCA(t *testing.T) {
	t.Parallel()
	s := startQuiet(t)
	ca, err := pki.NewCA("next CA", time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	old := s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI))
	template := s.certificate("spiffe://console.exto/" + consoleAPI).Cert
	pair, err := ca.Issue(x509.Certificate{URIs: template.URIs, ExtKeyUsage: template.ExtKeyUsage}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	next := s.clientTLS(pair)
	want := func(when string, old, next bool, cfgs ...*tls.Config) {
		t.Helper()
		for i, served := range []bool{old, next} {
			_, err := secretsv1.NewSecretsBrokerServiceClient(s.dial(cfgs[i])).ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
			if served && err != nil {
				t.Errorf("%s: %v", when, err)
			}
			if !served && failed(t, err).code != codes.Unavailable {
				t.Errorf("%s: got %v, want UNAVAILABLE from the handshake", when, err)
			}
		}
	}
	want("the first CA", true, false, old, next)
	s.replace("ca.pem", append(s.ca.CertPEM(), ca.CertPEM()...))
	s.look()
	want("both CAs", true, true, old, next)
	s.replace("ca.pem", ca.CertPEM())
	s.look()
	want("the next CA", false, true, old, next)
}

// TestSymlinkSwap changes all files at once as Kubernetes does it: they are links
// through a link to a folder, and that one is replaced. The new files have the
// size and the time of the old ones.
func TestSymlinkSwap(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	when := time.Now().Add(-time.Hour).Truncate(time.Second)
	mount := filepath.Join(s.dir, "mount")
	names := []string{"tls.crt", "tls.key", "ca.crt"}
	publish := func(folder string, p pki.Pair) {
		t.Helper()
		target := filepath.Join(mount, folder)
		if err := os.MkdirAll(target, 0o700); err != nil {
			t.Fatal(err)
		}
		for i, content := range [][]byte{p.CertPEM(), s.keyPEM(p), s.ca.CertPEM()} {
			file := filepath.Join(target, names[i])
			content = append(content, bytes.Repeat([]byte("\n"), 4096-len(content))...)
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(file, when, when); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink(folder, filepath.Join(mount, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(mount, "..data_tmp"), filepath.Join(mount, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	first, second := s.serverPair(), s.serverPair()
	publish("..first", first)
	for _, name := range names {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(mount, name)); err != nil {
			t.Fatal(err)
		}
	}
	s.trust = func(c *server.TrustConfig) {
		quiet(c)
		c.Files.Cert, c.Files.Key, c.Files.ClientCA = filepath.Join(mount, names[0]), filepath.Join(mount, names[1]), filepath.Join(mount, names[2])
	}
	s.startEmbedded()
	cfg := s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI))
	s.wantServed(cfg, first, "at start")
	publish("..second", second)
	s.look()
	s.wantServed(cfg, second, "after the swap")
	if err := os.RemoveAll(filepath.Join(mount, "..first")); err != nil {
		t.Fatal(err)
	}
	s.look()
	s.wantServed(cfg, second, "after the old folder is gone")
}

func (s *system) served(cfg *tls.Config) *x509.Certificate {
	s.t.Helper()
	state, err := s.handshake(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	return state.PeerCertificates[0]
}

// TestNoResumption: a resumed session would go past a client CA that changed.
func TestNoResumption(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	cfg := s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI))
	cache := &sessions{ClientSessionCache: tls.NewLRUClientSessionCache(0)}
	cfg.ClientSessionCache = cache
	for range 3 {
		state, err := s.handshake(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if state.DidResume || state.Version != tls.VersionTLS13 {
			t.Errorf("got resumed %v, version %x, want a full handshake of TLS 1.3", state.DidResume, state.Version)
		}
	}
	if cache.tickets > 0 {
		t.Errorf("got %d tickets for resumption", cache.tickets)
	}
	if cache.asked == 0 {
		t.Error("the client did not try to resume: nothing was tested")
	}
}

// sessions counts what a client asks for and is given.
type sessions struct {
	tls.ClientSessionCache
	asked, tickets int
}

func (c *sessions) Get(key string) (*tls.ClientSessionState, bool) {
	c.asked++
	return c.ClientSessionCache.Get(key)
}

func (c *sessions) Put(key string, state *tls.ClientSessionState) {
	if state != nil {
		c.tickets++
	}
	c.ClientSessionCache.Put(key, state)
}
