// Package pki makes certificates: those of broker dev, and those of tests. What
// runs in production gets its certificates from elsewhere.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"
)

// clockSlack is how far the clock of whoever verifies a new certificate may lag.
const clockSlack = time.Hour

// Pair is a certificate with its private key, ECDSA P-256.
type Pair struct {
	Cert *x509.Certificate
	Key  *ecdsa.PrivateKey
}

// NewCA makes a CA that lives from about now on. Its name must differ from the
// names of all that it issues: OpenSSL takes a certificate whose subject is its
// issuer's name for a self-signed one.
func NewCA(name string, now time.Time, life time.Duration) (Pair, error) {
	return sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-clockSlack),
		NotAfter:              now.Add(life),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil)
}

// Issue makes a certificate of template that lives from about now on, with a new
// key and serial number.
func (ca Pair) Issue(template x509.Certificate, now time.Time, life time.Duration) (Pair, error) {
	template.NotBefore, template.NotAfter = now.Add(-clockSlack), now.Add(life)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	return sign(&template, &ca)
}

func sign(template *x509.Certificate, ca *Pair) (Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return Pair{}, err
	}
	if ca == nil {
		ca = &Pair{template, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Cert, key.Public(), ca.Key)
	if err != nil {
		return Pair{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return Pair{cert, key}, err
}

// Load reads a pair from PEM files.
func Load(certFile, keyFile string) (Pair, error) {
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return Pair{}, fmt.Errorf("certificate %s: %w", certFile, err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return Pair{}, fmt.Errorf("certificate %s: its key is not of ECDSA", certFile)
	}
	return Pair{pair.Leaf, key}, nil
}

// CertPEM is the certificate for a file.
func (p Pair) CertPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.Cert.Raw})
}

// KeyPEM is the private key for a file that nobody else can read.
func (p Pair) KeyPEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(p.Key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// TLS is the pair as crypto/tls uses it.
func (p Pair) TLS() tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{p.Cert.Raw}, PrivateKey: p.Key, Leaf: p.Cert}
}
