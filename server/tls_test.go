package server_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
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

func TestTLSFilesAtStart(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	pair, other := s.serverPair(), s.serverPair()
	cert, key := s.write("c.pem", pair.CertPEM()), s.write("k.pem", s.keyPEM(pair))
	ca, otherKey := s.write("a.pem", s.ca.CertPEM()), s.write("o.pem", s.keyPEM(other))
	empty, text := s.write("empty.pem", nil), s.write("text.pem", []byte("not PEM at all\n"))
	absent := filepath.Join(s.dir, "absent.pem")
	logger := slog.New(slog.DiscardHandler)
	if _, err := (server.TLSFiles{Cert: cert, Key: key, ClientCA: ca}).Config(logger); err != nil {
		t.Fatalf("good files: %v", err)
	}
	for name, tt := range map[string]struct {
		files server.TLSFiles
		named string
	}{
		"no certificate":             {server.TLSFiles{Cert: absent, Key: key, ClientCA: ca}, absent},
		"no key":                     {server.TLSFiles{Cert: cert, Key: absent, ClientCA: ca}, absent},
		"no client CA":               {server.TLSFiles{Cert: cert, Key: key, ClientCA: absent}, absent},
		"empty certificate":          {server.TLSFiles{Cert: empty, Key: key, ClientCA: ca}, empty},
		"a key in the certificate":   {server.TLSFiles{Cert: key, Key: key, ClientCA: ca}, key},
		"text in the key":            {server.TLSFiles{Cert: cert, Key: text, ClientCA: ca}, text},
		"another's key":              {server.TLSFiles{Cert: cert, Key: otherKey, ClientCA: ca}, otherKey},
		"text in the client CA":      {server.TLSFiles{Cert: cert, Key: key, ClientCA: text}, text},
		"empty client CA":            {server.TLSFiles{Cert: cert, Key: key, ClientCA: empty}, empty},
		"a key in the client CA":     {server.TLSFiles{Cert: cert, Key: key, ClientCA: key}, key},
		"a folder for the client CA": {server.TLSFiles{Cert: cert, Key: key, ClientCA: s.dir}, s.dir},
	} {
		cfg, err := tt.files.Config(logger)
		if err == nil || cfg != nil {
			t.Errorf("%s: got a configuration, want an error", name)
			continue
		}
		if !contains(err.Error(), tt.named) || contains(err.Error(), "\n") {
			t.Errorf("%s: got %q, want one line that names %s", name, err, tt.named)
		}
		if contains(err.Error(), "PRIVATE KEY-----") || contains(err.Error(), strings.Split(string(s.keyPEM(pair)), "\n")[1]) {
			t.Errorf("%s: the error holds a part of a key", name)
		}
	}
}

func TestNewServerCertificate(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
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
	if state, err := s.handshake(cfg); err != nil || state.PeerCertificates[0].Equal(next.Cert) {
		t.Fatalf("a new certificate without its key: got %v, want that before to be in force", err)
	}
	s.replace("server-key.pem", s.keyPEM(next))
	s.wantServed(cfg, next, "a new certificate with its key")
	list("after")
	// Written over in place, too.
	next = s.serverPair()
	s.write("server.pem", append(next.CertPEM(), strings.Repeat("\n", 64)...))
	s.write("server-key.pem", append(s.keyPEM(next), strings.Repeat("\n", 64)...))
	s.wantServed(cfg, next, "written in place")
}

func TestNewClientCA(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
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
	want("both CAs", true, true, old, next)
	s.replace("ca.pem", ca.CertPEM())
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
	s.config = func(c *server.Config) {
		var err error
		c.TLS, err = server.TLSFiles{Cert: filepath.Join(mount, names[0]), Key: filepath.Join(mount, names[1]), ClientCA: filepath.Join(mount, names[2])}.Config(s.logger())
		if err != nil {
			t.Fatal(err)
		}
	}
	s.startEmbedded()
	cfg := s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI))
	s.wantServed(cfg, first, "at start")
	publish("..second", second)
	s.wantServed(cfg, second, "after the swap")
	if err := os.RemoveAll(filepath.Join(mount, "..first")); err != nil {
		t.Fatal(err)
	}
	s.wantServed(cfg, second, "after the old folder is gone")
}

// TestBadNewFilesKeepTheOldOnes, and say so once for each change.
func TestBadNewFilesKeepTheOldOnes(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	cfg := s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI))
	first := s.served(cfg)
	complaints := func() int { return strings.Count(s.log.String(), "TLS files are bad") }
	if n := complaints(); n > 0 {
		t.Fatalf("got %d complaints about good files", n)
	}
	good := map[string][]byte{}
	for _, name := range []string{"server.pem", "server-key.pem", "ca.pem"} {
		content, err := os.ReadFile(filepath.Join(s.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		good[name] = content
	}
	n := 0
	for name, content := range good {
		for what, spoil := range map[string]func(){
			"no PEM": func() { s.replace(name, []byte("not PEM")) },
			"empty":  func() { s.replace(name, nil) },
			"gone": func() {
				if err := os.Remove(filepath.Join(s.dir, name)); err != nil {
					t.Fatal(err)
				}
			},
		} {
			spoil()
			n++
			for range 3 {
				if !s.served(cfg).Equal(first) {
					t.Errorf("%s of %s: another certificate is served", what, name)
				}
			}
			if got := complaints(); got != n {
				t.Errorf("%s of %s: got %d complaints so far, want %d, one for each change", what, name, got, n)
			}
			if !s.logHasLine("TLS files are bad", "level=ERROR", filepath.Join(s.dir, name)) {
				t.Errorf("%s of %s: no complaint names the file", what, name)
			}
			s.replace(name, content)
			if !s.served(cfg).Equal(first) || complaints() != n {
				t.Errorf("%s of %s: put right again, it is still complained about", what, name)
			}
		}
	}
	// Good files are taken up after bad ones. All of them at once: a bad CA keeps a
	// good certificate back.
	next := s.serverPair()
	s.replace("ca.pem", []byte("not PEM"))
	s.replace("server.pem", next.CertPEM())
	s.replace("server-key.pem", s.keyPEM(next))
	if !s.served(cfg).Equal(first) {
		t.Error("the certificate was taken up beside a bad client CA")
	}
	s.replace("ca.pem", good["ca.pem"])
	s.wantServed(cfg, next, "with all files good again")
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
