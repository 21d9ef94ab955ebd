package authz_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/exto/secrets-broker/server/authz"
)

func TestCallerFromCertificate(t *testing.T) {
	t.Parallel()
	longest := "spiffe://console.exto/" + strings.Repeat("x", 512-len("spiffe://console.exto/"))
	tests := []struct {
		name  string
		uris  []string
		want  string
		error string // a part of the error
	}{
		{"one SPIFFE ID", []string{"spiffe://console.exto/worker"}, "spiffe://console.exto/worker", ""},
		{"case is kept", []string{"spiffe://console.exto/Worker"}, "spiffe://console.exto/Worker", ""},
		{"512 bytes", []string{longest}, longest, ""},
		{"513 bytes", []string{longest + "x"}, "", "512"},
		{"no URI", nil, "", "no URI"},
		{"two SPIFFE IDs", []string{"spiffe://console.exto/worker", "spiffe://console.exto/operator"}, "", "more than one"},
		{"the same twice", []string{"spiffe://console.exto/worker", "spiffe://console.exto/worker"}, "", "more than one"},
		{"a SPIFFE ID and another URI", []string{"spiffe://console.exto/worker", "https://console.exto/"}, "", "more than one"},
		{"another scheme", []string{"https://console.exto/worker"}, "", "scheme"},
		{"no trust domain", []string{"spiffe:///worker"}, "", "trust domain"},
		{"trust domain in upper case", []string{"spiffe://Console.exto/worker"}, "", "trust domain"},
		{"a port", []string{"spiffe://console.exto:443/worker"}, "", "trust domain"},
		{"a user", []string{"spiffe://user@console.exto/worker"}, "", "trust domain"},
		{"a query", []string{"spiffe://console.exto/worker?x=y"}, "", "path"},
		{"a fragment", []string{"spiffe://console.exto/worker#x"}, "", "path"},
		{"an encoded character", []string{"spiffe://console.exto/w%6Frker"}, "", "path"},
		{"an encoded slash", []string{"spiffe://console.exto/instance%2Fdemo"}, "", "path"},
		{"a trailing slash", []string{"spiffe://console.exto/worker/"}, "", "slash"},
		{"dot segments", []string{"spiffe://console.exto/worker/../console-api"}, "", "dot segments"},
		{"an empty segment", []string{"spiffe://console.exto//worker"}, "", "empty segments"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := authz.CallerFromCertificate(certificate(t, tt.uris))
			if got.String() != tt.want || (err == nil) != (tt.error == "") {
				t.Fatalf("got %q, %v, want %q", got, err, tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), tt.error) {
				t.Errorf("got %q, want it to hold %q", err, tt.error)
			}
			for _, uri := range tt.uris {
				if err != nil && strings.Contains(err.Error(), uri) {
					t.Errorf("got %q, which repeats the certificate", err)
				}
			}
		})
	}
}

// callerForm is what a caller's name looks like, said in another way than the
// library that reads it does.
var callerForm = regexp.MustCompile(`^spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)*$`)

// FuzzCertificateToCaller makes certificates with these URI SANs, byte for byte. It
// looks that a name is read from exactly one URI, that it is that URI, and that a
// policy can hold it.
func FuzzCertificateToCaller(f *testing.F) {
	for _, uri := range []string{"spiffe://console.exto/worker", "SPIFFE://a/b", "spiffe://a", "spiffe://a/%2e%2e/b", "spiffe://a/../b", "spiffe://a/b#", "spiffe://a/b?", "https://a/b", "spiffe:a/b", "spiffe://a/b\x00", "spiffe://\u00e4/b"} {
		f.Add(uri, "", uint8(1))
		f.Add(uri, "spiffe://console.exto/operator", uint8(2))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, first, second string, count uint8) {
		uris := []string{first, second}[:count%3]
		leaf, err := withURIs(key, uris)
		if err != nil {
			return // refused at the handshake
		}
		id, err := authz.CallerFromCertificate(leaf)
		if err != nil {
			if !id.IsZero() {
				t.Fatalf("got %v with the error %v", id, err)
			}
			return
		}
		name := id.String()
		if len(uris) != 1 || len(name) > 512 || !callerForm.MatchString(name) || strings.Contains(name+"/", "/./") || strings.Contains(name+"/", "/../") {
			t.Fatalf("%q is read as %q", uris, name)
		}
		// A URI's scheme has no case, and an empty fragment says nothing.
		if !strings.EqualFold(uris[0][:len("spiffe")], "spiffe") || strings.TrimSuffix(uris[0][len("spiffe"):], "#") != name[len("spiffe"):] {
			t.Fatalf("%q is read as %q", uris[0], name)
		}
		policy := "trust_domain: " + `"` + id.TrustDomain().Name() + `"` + "\nrules:\n- identity: " + name + "\n  allow: [get]\n"
		if !mustParse(t, policy).Knows(id) {
			t.Fatalf("no policy can hold %q", name)
		}
	})
}

// withURIs is a certificate with these URI SANs as they are, whatever they are.
func withURIs(key *ecdsa.PrivateKey, uris []string) (*x509.Certificate, error) {
	names := []asn1.RawValue{}
	for _, uri := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)})
	}
	san, err := asn1.Marshal(names)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:    big.NewInt(1),
		NotAfter:        time.Now().Add(time.Hour),
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: san}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// certificate is a leaf with these URIs and a DNS name, which says nothing of
// the caller. It went through an encoding, as one from a handshake has.
func certificate(t *testing.T, uris []string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "spiffe://console.exto/console-api"},
		DNSNames:     []string{"console-api"},
		NotAfter:     time.Now().Add(time.Hour),
	}
	for _, s := range uris {
		uri, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, uri)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}
