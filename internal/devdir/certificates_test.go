package devdir

import (
	"crypto/x509"
	"testing"
	"time"

	"github.com/exto/secrets-broker/internal/pki"
)

func TestCertificates(t *testing.T) {
	t.Parallel()
	dir, now := t.TempDir(), time.Now()
	if err := ensureCertificates(dir, now); err != nil {
		t.Fatal(err)
	}
	load := func(name string) pki.Pair {
		t.Helper()
		pair, err := pki.Load(PairFiles(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return pair
	}
	ca, server, worker := load("ca"), load("server"), load("worker")
	if life := ca.Cert.NotAfter.Sub(now); life < 3640*24*time.Hour || !ca.Cert.IsCA {
		t.Errorf("got a CA for %v, want 10 years", life)
	}
	for _, name := range []string{"localhost", "127.0.0.1", "::1"} {
		if err := server.Cert.VerifyHostname(name); err != nil {
			t.Error(err)
		}
	}
	for leaf, id := range map[string]string{"server": "broker", "console-api": "console-api", "worker": "worker", "operator": "operator", "instance-demo": "instance/demo"} {
		cert := load(leaf).Cert
		if len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://console.exto/"+id {
			t.Errorf("%s: got %v", leaf, cert.URIs)
		}
		if cert.Subject.String() == ca.Cert.Subject.String() {
			t.Errorf("%s has the CA's name", leaf)
		}
		if life := cert.NotAfter.Sub(now).Round(time.Hour); life != 30*24*time.Hour {
			t.Errorf("%s lives %v, want 30 days", leaf, life)
		}
	}
	same := func(later time.Duration) bool {
		t.Helper()
		if err := ensureCertificates(dir, now.Add(later)); err != nil {
			t.Fatal(err)
		}
		return load("worker").Cert.Equal(worker.Cert)
	}
	if !same(28 * 24 * time.Hour) {
		t.Error("renewed with two days left")
	}
	if same(29*24*time.Hour + time.Minute) {
		t.Error("not renewed with under a day left")
	}
	if err := load("worker").Cert.CheckSignatureFrom(ca.Cert); err != nil {
		t.Errorf("renewed by another CA: %v", err)
	}
	foreign, err := pki.NewCA("foreign", now, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	stray, err := foreign.Issue(x509.Certificate{}, now, 30*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := writePair(dir, "worker", stray); err != nil {
		t.Fatal(err)
	}
	if err := ensureCertificates(dir, now); err != nil {
		t.Fatal(err)
	}
	if err := load("worker").Cert.CheckSignatureFrom(ca.Cert); err != nil {
		t.Errorf("a certificate of another CA was kept: %v", err)
	}
}
