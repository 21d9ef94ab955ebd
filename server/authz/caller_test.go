package authz_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
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

// FuzzCaller looks that what is accepted is one of the names that a policy can
// hold: of at most 512 bytes, and the same when read from a policy file.
func FuzzCaller(f *testing.F) {
	for _, uri := range []string{"spiffe://console.exto/worker", "SPIFFE://a/b", "spiffe://a", "spiffe://a/%2e%2e/b", "spiffe://a/b#", "https://a/b", "spiffe:a/b"} {
		f.Add(uri)
	}
	f.Fuzz(func(t *testing.T, s string) {
		uri, err := url.Parse(s)
		if err != nil {
			t.Skip() // no certificate with it parses either
		}
		id, err := authz.CallerFromCertificate(&x509.Certificate{URIs: []*url.URL{uri}})
		if err != nil {
			if !id.IsZero() {
				t.Fatalf("got %v with the error %v", id, err)
			}
			return
		}
		policy := "trust_domain: " + `"` + id.TrustDomain().Name() + `"` + "\nrules:\n- identity: " + id.String() + "\n  allow: [get]\n"
		if len(id.String()) > 512 || !mustParse(t, policy).Knows(id) {
			t.Fatalf("%q is accepted", id)
		}
	})
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
