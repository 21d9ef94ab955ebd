package server

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/exto/secrets-broker/server/authz"
)

// Files names the files that a Trust reads. All are required but Revoked. They are
// read again while the broker runs; one that has become bad or is gone leaves in
// force what was read before.
type Files struct {
	Cert     string // PEM: the broker's certificate, and those that lead to its CA
	Key      string // PEM: its private key
	ClientCA string // PEM: the CAs of the callers' certificates
	Revoked  string // what authz.ParseRevoked reads; none when empty
	Policy   string // what authz.ParsePolicy reads
}

// FileError is what is wrong with a file.
type FileError struct {
	Field string // of Files
	Err   error  // names the file
}

func (e *FileError) Error() string { return e.Err.Error() }
func (e *FileError) Unwrap() error { return e.Err }

// maxFileBytes is more than any of the files has; a million revoked certificates fit.
const maxFileBytes = 64 << 20

type sum = [sha256.Size]byte

// source is one or two files that only mean something together.
type source struct {
	name  string // in the log and in metrics
	files []file
	// load puts what the files say into s, or leaves it as it was.
	load func(contents [][]byte, s *snapshot) error
	// hash is that of the first file.
	hash                  func(*Hashes) *string
	seen, judged, inForce sum
}

type file struct{ field, path string }

func (f file) fault(err error) error {
	return &FileError{f.field, fmt.Errorf("%s: %w", f.path, err)}
}

// read gives the contents, and a sum that differs when they do, or when it is another
// error that keeps them from being read.
func (s *source) read() (contents [][]byte, _ sum, err error) {
	all := sha256.New()
	for _, f := range s.files {
		content, err := readFile(f.path)
		if err != nil {
			return nil, sha256.Sum256([]byte("unreadable: " + err.Error())), &FileError{f.field, err}
		}
		one := sha256.Sum256(content)
		_, _ = all.Write(one[:])
		contents = append(contents, content)
	}
	return contents, sum(all.Sum(nil)), nil
}

// readFile reads a file that can be read again: a pipe would be empty the next time,
// or never end.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	content, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err == nil && len(content) > maxFileBytes {
		err = fmt.Errorf("%s: over %d bytes", path, maxFileBytes)
	}
	return content, err
}

func (f Files) sources() []*source {
	cert, key, ca := file{"Cert", f.Cert}, file{"Key", f.Key}, file{"ClientCA", f.ClientCA}
	revoked, policy := file{"Revoked", f.Revoked}, file{"Policy", f.Policy}
	// The order is that of the settings, of which the first bad one is named.
	all := []*source{
		{name: "certificate", files: []file{cert, key}, hash: func(h *Hashes) *string { return &h.Certificate },
			load: func(contents [][]byte, s *snapshot) error {
				if _, err := parseCertificates(contents[0]); err != nil {
					return cert.fault(err)
				}
				pair, err := tls.X509KeyPair(contents[0], contents[1])
				if err != nil {
					return key.fault(err)
				}
				s.certificate = pair
				return nil
			}},
		{name: "client_ca", files: []file{ca}, hash: func(h *Hashes) *string { return &h.ClientCA },
			load: func(contents [][]byte, s *snapshot) error {
				certs, err := parseCertificates(contents[0])
				if err != nil {
					return ca.fault(err)
				}
				s.clientCAs = x509.NewCertPool()
				for _, c := range certs {
					s.clientCAs.AddCert(c)
				}
				return nil
			}},
		{name: "policy", files: []file{policy}, hash: func(h *Hashes) *string { return &h.Policy },
			load: func(contents [][]byte, s *snapshot) error {
				p, err := authz.ParsePolicy(contents[0])
				if err != nil {
					return policy.fault(err)
				}
				s.policy = p
				return nil
			}},
	}
	if f.Revoked != "" {
		all = append(all, &source{name: "revoked", files: []file{revoked}, hash: func(h *Hashes) *string { return &h.Revoked },
			load: func(contents [][]byte, s *snapshot) error {
				r, err := authz.ParseRevoked(contents[0])
				if err != nil {
					return revoked.fault(err)
				}
				s.revoked = r
				return nil
			}})
	}
	return all
}

// take is load, with the hash of what it loaded.
func (s *source) take(contents [][]byte, into *snapshot) error {
	if err := s.load(contents, into); err != nil {
		return err
	}
	one := sha256.Sum256(contents[0])
	*s.hash(&into.hashes) = hex.EncodeToString(one[:])
	return nil
}

// parseCertificates reads all certificates of a PEM file, and refuses one of which a
// part is damaged or missing, which is nothing that crypto/x509 would notice.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	const kind = "CERTIFICATE"
	begun := bytes.Count(data, []byte("-----BEGIN "+kind+"-----"))
	var certs []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != kind {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of it: %w", len(certs)+1, err)
		}
		certs = append(certs, c)
	}
	switch {
	case begun == 0:
		return nil, errors.New("no certificate in PEM form")
	case len(certs) != begun:
		return nil, errors.New("a certificate in it is damaged or cut off")
	}
	return certs, nil
}
