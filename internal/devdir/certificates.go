package devdir

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"time"

	"github.com/exto/secrets-broker/internal/pki"
)

// Lives of the certificates.
const (
	caLife    = 10 * 365 * 24 * time.Hour
	leafLife  = 30 * 24 * time.Hour
	leafRenew = 24 * time.Hour // renewed when less is left
	// renewEvery is how often KeepRenewed looks.
	renewEvery = time.Hour
)

// leaves are the certificates besides the CA's: the name of the file, and the
// path of the SPIFFE ID in the trust domain of policy.yaml.
var leaves = []struct{ name, path string }{
	{"server", "/broker"},
	{"console-api", "/console-api"},
	{"worker", "/worker"},
	{"operator", "/operator"},
	{"instance-demo", "/instance/demo"},
}

// ensureCertificates makes the CA and the leaves that are missing, not the CA's,
// or about to end.
func ensureCertificates(dir string, now time.Time) error {
	ca, err := pki.Load(PairFiles(dir, "ca"))
	if errors.Is(err, fs.ErrNotExist) {
		if ca, err = pki.NewCA("broker dev CA", now, caLife); err == nil {
			err = writePair(dir, "ca", ca)
		}
	}
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Cert)
	for _, leaf := range leaves {
		have, err := pki.Load(PairFiles(dir, leaf.name))
		if err == nil {
			_, err = have.Cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now.Add(leafRenew), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		}
		if err == nil {
			continue
		}
		template := x509.Certificate{
			Subject:     pkix.Name{CommonName: leaf.name},
			URIs:        []*url.URL{{Scheme: "spiffe", Host: "console.exto", Path: leaf.path}},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}
		if leaf.name == "server" {
			template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
			template.DNSNames = []string{"localhost"}
			template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
		}
		made, err := ca.Issue(template, now, leafLife)
		if err != nil {
			return err
		}
		if err := writePair(dir, leaf.name, made); err != nil {
			return err
		}
	}
	return nil
}

// KeepRenewed renews the certificates of a folder in use before they end, until
// ctx does.
func KeepRenewed(ctx context.Context, dir string, log *slog.Logger) {
	tick := time.NewTicker(renewEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if err := ensureCertificates(dir, now); err != nil {
				log.Error("certificates were not renewed", "error", err)
			}
		}
	}
}

// PairFiles are where the certificate of that name is, and its private key.
func PairFiles(dir, name string) (cert, key string) {
	return filepath.Join(dir, name+".pem"), filepath.Join(dir, name+"-key.pem")
}

// writePair writes the key first, so that a certificate is never without it.
func writePair(dir, name string, pair pki.Pair) error {
	keyPEM, err := pair.KeyPEM()
	if err != nil {
		return err
	}
	certFile, keyFile := PairFiles(dir, name)
	if err := WriteFile(keyFile, keyPEM, 0o600); err != nil {
		return err
	}
	return WriteFile(certFile, pair.CertPEM(), 0o644)
}
