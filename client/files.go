package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// fileInterval is how often the files are looked at, at most.
const fileInterval = time.Second

// files are the files of a Config as they were last good. Safe for concurrent
// use.
type files struct {
	cfg Config

	mu      sync.Mutex
	checked time.Time
	pem     [3][]byte // certificate, key, CA
	tls     *tls.Config
	version int // one more for each change
}

func openFiles(cfg Config) (*files, error) {
	pem, err := cfg.read()
	if err != nil {
		return nil, err
	}
	tlsConfig, err := cfg.tls(pem)
	if err != nil {
		return nil, err
	}
	return &files{cfg: cfg, checked: time.Now(), pem: pem, tls: tlsConfig}, nil
}

// current is what the files hold now, or held when they were last good, and the
// number of that.
func (f *files) current() (*tls.Config, int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Since(f.checked) < fileInterval {
		return f.tls, f.version
	}
	f.checked = time.Now()
	pem, err := f.cfg.read()
	if err != nil || bytes.Equal(pem[0], f.pem[0]) && bytes.Equal(pem[1], f.pem[1]) && bytes.Equal(pem[2], f.pem[2]) {
		return f.tls, f.version
	}
	// Among the errors is a certificate whose key is yet to be written.
	if tlsConfig, err := f.cfg.tls(pem); err == nil {
		f.pem, f.tls = pem, tlsConfig
		f.version++
	}
	return f.tls, f.version
}

func (f *files) credentials() credentials.TransportCredentials {
	return fileCredentials{credentials.NewTLS(f.tls), f}
}

// fileCredentials make each handshake with what the files hold then.
type fileCredentials struct {
	credentials.TransportCredentials
	files *files
}

func (c fileCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	tlsConfig, _ := c.files.current()
	return credentials.NewTLS(tlsConfig).ClientHandshake(ctx, authority, conn)
}

func (c fileCredentials) Clone() credentials.TransportCredentials {
	return fileCredentials{c.TransportCredentials.Clone(), c.files}
}

func (cfg Config) read() (pem [3][]byte, err error) {
	for i, file := range []struct{ field, path string }{
		{"CertFile", cfg.CertFile}, {"KeyFile", cfg.KeyFile}, {"CAFile", cfg.CAFile},
	} {
		if file.path == "" {
			return pem, fmt.Errorf("%s is required: the path of a PEM file", file.field)
		}
		if pem[i], err = os.ReadFile(file.path); err != nil {
			return pem, fmt.Errorf("%s: %w", file.field, err)
		}
	}
	return pem, nil
}

func (cfg Config) tls(pem [3][]byte) (*tls.Config, error) {
	cert, err := tls.X509KeyPair(pem[0], pem[1])
	if err != nil {
		return nil, fmt.Errorf("CertFile %s with KeyFile %s: %w", cfg.CertFile, cfg.KeyFile, err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem[2]) {
		return nil, fmt.Errorf("CAFile %s: no certificate in PEM form", cfg.CAFile)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    roots,
		ServerName: cfg.ServerName,
		// Not Certificates: crypto/tls would send none of those when the broker
		// asks for another CA's, and the broker could not say who was refused.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
	}, nil
}
