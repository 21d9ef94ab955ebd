package server

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
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

// tlsReloader looks at the files' times at each handshake, which costs little
// beside the handshake itself.
type tlsReloader struct {
	files TLSFiles
	log   *slog.Logger

	mu     sync.Mutex
	seen   [3]fileState
	config *tls.Config
}

type fileState struct {
	modified time.Time
	size     int64
}

func (r *tlsReloader) current() *tls.Config {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.look() != r.seen {
		if err := r.reload(); err != nil {
			r.log.Error("changed TLS files are bad; those before stay in force", "error", err)
		} else {
			r.log.Info("TLS files read again", "cert_file", r.files.Cert, "client_ca_file", r.files.ClientCA)
		}
	}
	return r.config
}

func (r *tlsReloader) look() (states [3]fileState) {
	for i, name := range []string{r.files.Cert, r.files.Key, r.files.ClientCA} {
		if info, err := os.Stat(name); err == nil {
			states[i] = fileState{info.ModTime(), info.Size()}
		}
	}
	return states
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
