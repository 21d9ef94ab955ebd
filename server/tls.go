package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/exto/secrets-broker/server/authz"
)

// TLSFiles names the PEM files by which connections are secured. All are
// required. They are read again when they change: a new certificate is used from
// the next handshake on, and so is a new client CA.
type TLSFiles struct {
	Cert     string
	Key      string
	ClientCA string
}

// Config reads the files and gives a configuration for TLS 1.3 with a client
// certificate of the client CA required. Later changes of the files are taken up
// together or not at all; files that are bad then leave those before in force,
// and logger says so.
func (f TLSFiles) Config(logger *slog.Logger) (*tls.Config, error) {
	r := &tlsReloader{files: f, log: logger}
	if err := r.reload(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return r.current(), nil
		},
	}, nil
}

// tlsReloader looks at each handshake whether the files changed, which costs
// little beside the handshake itself.
type tlsReloader struct {
	files TLSFiles
	log   *slog.Logger

	mu     sync.Mutex
	seen   [3]fs.FileInfo // nil for a file that is not there
	config *tls.Config
}

func (r *tlsReloader) current() *tls.Config {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.changed() {
		if err := r.reload(); err != nil {
			r.log.Error("changed TLS files are bad; those before stay in force", "error", err)
		} else {
			r.log.Info("TLS files read again", "cert_file", r.files.Cert, "client_ca_file", r.files.ClientCA)
		}
	}
	return r.config
}

func (r *tlsReloader) look() (infos [3]fs.FileInfo) {
	for i, name := range []string{r.files.Cert, r.files.Key, r.files.ClientCA} {
		infos[i], _ = os.Stat(name) // why it failed is for reload to say
	}
	return infos
}

// changed reports whether a file is another one than before. Its time and size
// don't tell alone: those of a certificate and its successor are easily alike.
func (r *tlsReloader) changed() bool {
	for i, now := range r.look() {
		was := r.seen[i]
		if now == nil || was == nil {
			if now != was {
				return true
			}
			continue
		}
		if !os.SameFile(now, was) || !now.ModTime().Equal(was.ModTime()) || now.Size() != was.Size() {
			return true
		}
	}
	return false
}

func (r *tlsReloader) reload() error {
	r.seen = r.look() // before reading: a change in between is seen the next time
	cert, err := tls.LoadX509KeyPair(r.files.Cert, r.files.Key)
	if err != nil {
		return fmt.Errorf("TLS certificate %s with key %s: %w", r.files.Cert, r.files.Key, err)
	}
	pem, err := os.ReadFile(r.files.ClientCA)
	if err != nil {
		return fmt.Errorf("TLS client CA: %w", err)
	}
	clientCAs := x509.NewCertPool()
	if !clientCAs.AppendCertsFromPEM(pem) {
		return fmt.Errorf("TLS client CA %s: no certificate in PEM form", r.files.ClientCA)
	}
	r.config = &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    clientCAs,
		NextProtos:   []string{"h2"},
		// A resumed session would skip the verification of the client's chain
		// against a client CA that has changed since.
		SessionTicketsDisabled: true,
	}
	return nil
}

// connection is what is known of a client's connection, for all calls on it.
type connection struct {
	credentials.TLSInfo
	caller  identity
	watches atomic.Int32 // under way
	peer    net.Addr
	account *account
	traffic *traffic
}

// newConnection reads the certificate that the handshake verified.
func newConnection(info credentials.TLSInfo) *connection {
	c := &connection{TLSInfo: info, caller: identity{problem: errNoCertificate}}
	if len(info.State.PeerCertificates) > 0 {
		leaf := info.State.PeerCertificates[0]
		id, err := authz.CallerFromCertificate(leaf)
		c.caller = identity{id: id, expires: leaf.NotAfter, problem: err}
	}
	return c
}

// connectionOf is the connection that a call came on.
func connectionOf(ctx context.Context) *connection {
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.AuthInfo.(*connection); ok {
			return c
		}
	}
	return &connection{caller: identity{problem: errNoCertificate}, account: &account{}, traffic: &traffic{clock: &atomic.Uint32{}}}
}
