package server_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/race"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
)

// withRevoked gives a system an empty file of what is revoked.
func withRevoked(s *system) func(*server.TrustConfig) {
	return func(c *server.TrustConfig) {
		quiet(c)
		c.Files.Revoked = s.write("revoked", nil)
	}
}

// configFile is a metric of a file.
func (s *system) configFile(metric, name string) float64 {
	s.t.Helper()
	families, err := s.metrics.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "secrets_broker_config_file_"+metric && m.GetLabel()[0].GetValue() == name {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	s.t.Fatalf("no metric %s of %s", metric, name)
	return 0
}

func TestFilesAtStart(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	pair, other := s.serverPair(), s.serverPair()
	good := server.Files{
		Cert: s.write("c.pem", pair.CertPEM()), Key: s.write("k.pem", s.keyPEM(pair)), ClientCA: s.write("a.pem", s.ca.CertPEM()),
		Policy: s.write("p.yaml", []byte(policy)), Revoked: s.write("r", []byte("# nothing\n")),
	}
	with := func(change func(f *server.Files)) server.Files {
		f := good
		change(&f)
		return f
	}
	otherKey, empty, text := s.write("o.pem", s.keyPEM(other)), s.write("empty", nil), s.write("text", []byte("\n\nno such thing at all\n"))
	half := s.write("half.pem", bytes.Join([][]byte{s.ca.CertPEM(), s.ca.CertPEM()[:200]}, nil))
	damaged := s.write("damaged.pem", bytes.Join([][]byte{bytes.Replace(s.ca.CertPEM(), []byte("M"), []byte("!"), 1), s.ca.CertPEM()}, nil))
	absent := filepath.Join(s.dir, "absent")
	pipe := filepath.Join(s.dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(f server.Files) error {
		_, err := server.OpenTrust(server.TrustConfig{Files: f, Logger: slog.New(slog.DiscardHandler)})
		return err
	}
	for name, f := range map[string]server.Files{
		"all":             good,
		"nothing revoked": with(func(f *server.Files) { f.Revoked = empty }),
		"no file of it":   with(func(f *server.Files) { f.Revoked = "" }),
		"key and cert in 1": with(func(f *server.Files) {
			f.Cert = s.write("both.pem", append(s.keyPEM(pair), pair.CertPEM()...))
			f.Key = f.Cert
		}),
		"several CAs": with(func(f *server.Files) { f.ClientCA = s.write("several.pem", append(s.ca.CertPEM(), s.ca.CertPEM()...)) }),
	} {
		if err := open(f); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, tt := range map[string]struct {
		change func(f *server.Files)
		field  string
		named  string
	}{
		"no certificate":             {func(f *server.Files) { f.Cert = absent }, "Cert", absent},
		"no key":                     {func(f *server.Files) { f.Key = absent }, "Key", absent},
		"no client CA":               {func(f *server.Files) { f.ClientCA = absent }, "ClientCA", absent},
		"no policy":                  {func(f *server.Files) { f.Policy = absent }, "Policy", absent},
		"no revoked":                 {func(f *server.Files) { f.Revoked = absent }, "Revoked", absent},
		"empty certificate":          {func(f *server.Files) { f.Cert = empty }, "Cert", empty},
		"a key in the certificate":   {func(f *server.Files) { f.Cert = f.Key }, "Cert", good.Key},
		"a damaged certificate":      {func(f *server.Files) { f.Cert = damaged }, "Cert", damaged},
		"text in the key":            {func(f *server.Files) { f.Key = text }, "Key", text},
		"another's key":              {func(f *server.Files) { f.Key = otherKey }, "Key", otherKey},
		"text in the client CA":      {func(f *server.Files) { f.ClientCA = text }, "ClientCA", text},
		"empty client CA":            {func(f *server.Files) { f.ClientCA = empty }, "ClientCA", empty},
		"a key in the client CA":     {func(f *server.Files) { f.ClientCA = f.Key }, "ClientCA", good.Key},
		"the second CA cut off":      {func(f *server.Files) { f.ClientCA = half }, "ClientCA", half},
		"the first CA damaged":       {func(f *server.Files) { f.ClientCA = damaged }, "ClientCA", damaged},
		"a folder for the client CA": {func(f *server.Files) { f.ClientCA = s.dir }, "ClientCA", s.dir},
		"a pipe for the client CA":   {func(f *server.Files) { f.ClientCA = pipe }, "ClientCA", pipe},
		"empty policy":               {func(f *server.Files) { f.Policy = empty }, "Policy", empty + ": line 1"},
		"text in revoked":            {func(f *server.Files) { f.Revoked = text }, "Revoked", text + ": line 3"},
	} {
		err := open(with(tt.change))
		bad := (*server.FileError)(nil)
		if !errors.As(err, &bad) || bad.Field != tt.field {
			t.Errorf("%s: got %#v, want a fault of %s", name, err, tt.field)
			continue
		}
		if !contains(err.Error(), tt.named) || contains(err.Error(), "\n") || contains(err.Error(), "no such thing") {
			t.Errorf("%s: got %q, want one line that names %s and repeats nothing", name, err, tt.named)
		}
		if contains(err.Error(), "PRIVATE KEY-----") || contains(err.Error(), strings.Split(string(s.keyPEM(pair)), "\n")[1]) {
			t.Errorf("%s: the error holds a part of a key", name)
		}
	}
}

// TestBadFilesKeepTheOldOnes, each its own, say so once for each content, and show it
// in the metrics.
func TestBadFilesKeepTheOldOnes(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.trust = withRevoked(s)
	s.startEmbedded()
	pair := s.certificate("spiffe://console.exto/" + consoleAPI)
	cfg := s.clientTLS(pair)
	c := secretsv1.NewSecretsBrokerServiceClient(s.dial(cfg))
	first := s.served(cfg)
	works := func(when string) {
		t.Helper()
		if _, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{}); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if !s.served(cfg).Equal(first) {
			t.Errorf("%s: another certificate is served", when)
		}
	}
	said := func(what string) int { return strings.Count(s.log.String(), what) }
	const complaint, praise = "a changed file is bad", "a file is again the one in force"
	all := []string{"policy", "revoked", "client_ca", "certificate"}
	n := 0
	for file, name := range map[string]string{"server.pem": "certificate", "server-key.pem": "certificate", "ca.pem": "client_ca", "policy.yaml": "policy", "revoked": "revoked"} {
		good, err := os.ReadFile(filepath.Join(s.dir, file))
		if err != nil {
			t.Fatal(err)
		}
		for what, spoil := range map[string]func(){
			"no such thing": func() { s.replace(file, []byte("no such thing")) },
			"half": func() {
				s.replace(file, append(bytes.Clone(good[:len(good)/2]), "\nno such thing"...))
			},
			"gone": func() {
				if err := os.Remove(filepath.Join(s.dir, file)); err != nil {
					t.Fatal(err)
				}
			},
		} {
			spoil()
			s.trusted.Look()
			if got := said(complaint); got != n {
				t.Errorf("%s, %s: complained about at the first look, when it may be half written", file, what)
			}
			n++
			for range 3 {
				s.trusted.Look()
				works(file + ", " + what)
			}
			if got := said(complaint); got != n || !s.logHasLine(complaint, "level=ERROR", "file="+name, filepath.Join(s.dir, file)) {
				t.Errorf("%s, %s: got %d complaints so far, want %d, that name the file", file, what, got, n)
			}
			for _, each := range all {
				if got, want := s.configFile("ok", each), float64(len(strings.TrimPrefix(each, name)))/float64(len(each)); got != want {
					t.Errorf("%s, %s: got ok %v of %s, want %v", file, what, got, each, want)
				}
			}
			s.replace(file, good)
			s.look()
			works(file + ", put right")
			if got := said(praise); got != n || said(complaint) != n || s.configFile("ok", name) != 1 {
				t.Errorf("%s, put right: got %d of %d times that it is so, ok %v", file, got, n, s.configFile("ok", name))
			}
		}
	}
	for _, each := range all {
		if got := s.configFile("reloads_total", each); got != 0 {
			t.Errorf("got %v reloads of %s, want none", got, each)
		}
	}
	if contains(s.log.String(), "such thing") {
		t.Error("the log repeats a bad file")
	}

	// Beside a bad file another is taken, and the bad one when it is good.
	s.replace("policy.yaml", []byte("no such thing"))
	s.replace("revoked", []byte(pair.Cert.SerialNumber.Text(16)))
	s.look()
	_, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
	wantReason(t, err, secret.CallerUnknown, "")
	s.replace("policy.yaml", []byte("trust_domain: console.exto\nrules: []\n"))
	s.replace("revoked", nil)
	s.look()
	_, err = c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
	wantReason(t, err, secret.CallerUnknown, "")
	if p, r := s.configFile("reloads_total", "policy"), s.configFile("reloads_total", "revoked"); p != 1 || r != 2 {
		t.Errorf("got %v and %v reloads of policy and revoked, want 1 and 2", p, r)
	}
}

// TestHalfWrittenFilesAreLeft until they are whole: a list of revocations that is
// written over in place is empty for a moment, and that revokes nothing.
func TestHalfWrittenFilesAreLeft(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.trust = withRevoked(s)
	s.startEmbedded()
	pair := s.certificate("spiffe://console.exto/" + consoleAPI)
	c := secretsv1.NewSecretsBrokerServiceClient(s.dial(s.clientTLS(pair)))
	revoked := func(when string) {
		t.Helper()
		_, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
		if err == nil {
			t.Fatalf("%s: let in", when)
		}
		wantReason(t, err, secret.CallerUnknown, "")
	}
	line := "# why\n" + pair.Cert.SerialNumber.Text(16) + "\n"
	s.write("revoked", []byte(line))
	s.look()
	revoked("at first")
	for n := range len(line) {
		s.write("revoked", []byte(line[:n]))
		s.trusted.Look()
		revoked("half written")
		s.write("revoked", []byte(line))
		s.look()
		revoked("written")
	}
	// Another file that is written all the time holds up nothing.
	s.write("revoked", nil)
	for n := range 4 {
		s.write("ca.pem", append(s.ca.CertPEM(), strings.Repeat("\n", n)...))
		s.trusted.Look()
	}
	if _, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{}); err != nil {
		t.Errorf("beside a file that never comes to rest: %v", err)
	}
}

// TestOneStep: files that are swapped together are taken together. This policy knows
// the caller only while it is revoked, so that it is let in by a mix of two folders
// alone.
func TestOneStep(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	pair := s.certificate("spiffe://console.exto/" + consoleAPI)
	mount := filepath.Join(s.dir, "mount")
	files := map[string]map[string]string{
		"..closed": {"policy.yaml": "trust_domain: console.exto\nrules: []\n", "revoked": ""},
		"..open":   {"policy.yaml": policy, "revoked": pair.Cert.SerialNumber.Text(16)},
	}
	for folder, contents := range files {
		if err := os.MkdirAll(filepath.Join(mount, folder), 0o700); err != nil {
			t.Fatal(err)
		}
		for name, content := range contents {
			s.write(filepath.Join("mount", folder, name), []byte(content))
		}
	}
	swap := func(folder string) {
		t.Helper()
		temp := filepath.Join(mount, "..data_tmp")
		if err := errors.Join(os.Symlink(folder, temp), os.Rename(temp, filepath.Join(mount, "..data"))); err != nil {
			t.Fatal(err)
		}
	}
	swap("..closed")
	changes := make(chan server.Hashes, 1000)
	s.trust = func(c *server.TrustConfig) {
		quiet(c)
		c.Files.Policy, c.Files.Revoked = filepath.Join(mount, "..data", "policy.yaml"), filepath.Join(mount, "..data", "revoked")
		c.OnChange = func(h server.Hashes) { changes <- h }
	}
	s.startEmbedded()
	c := secretsv1.NewSecretsBrokerServiceClient(s.dial(s.clientTLS(pair)))
	swaps := 300
	if race.Enabled {
		swaps = 50
	}
	for n := range swaps {
		swapped := make(chan struct{})
		go func() {
			defer close(swapped)
			swap([]string{"..open", "..closed"}[n%2])
		}()
		for range 3 { // the first one during the swap
			s.trusted.Look()
			_, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
			wantReason(t, err, secret.CallerUnknown, "")
			<-swapped
		}
	}
	close(changes)
	hash := func(folder, name string) string {
		h := sha256.Sum256([]byte(files[folder][name]))
		return hex.EncodeToString(h[:])
	}
	seen := map[string]int{}
	for h := range changes {
		together := ""
		for folder := range files {
			if h.Policy == hash(folder, "policy.yaml") && h.Revoked == hash(folder, "revoked") {
				together = folder
			}
		}
		seen[together]++
	}
	if seen["..closed"] == 0 || seen["..open"] == 0 || seen[""] > 0 {
		t.Errorf("got %v, want the files of one folder each time", seen)
	}
}

// TestChangesAreToldBeforeTheyCount: at the start, and at each change, with the hashes
// of the files in force.
func TestChangesAreToldBeforeTheyCount(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	var told []server.Hashes
	var during func()
	s.trust = func(c *server.TrustConfig) {
		withRevoked(s)(c)
		c.OnChange = func(h server.Hashes) {
			told = append(told, h)
			if during != nil {
				during()
			}
		}
	}
	s.startEmbedded()
	hash := func(name string) string {
		content, err := os.ReadFile(filepath.Join(s.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.Sum256(content)
		return hex.EncodeToString(h[:])
	}
	want := func(n int) {
		t.Helper()
		now := server.Hashes{Policy: hash("policy.yaml"), Revoked: hash("revoked"), ClientCA: hash("ca.pem"), Certificate: hash("server.pem")}
		if len(told) != n || told[n-1] != now {
			t.Errorf("got %d changes, the last to %v, want %d, to %v", len(told), told[len(told)-1], n, now)
		}
	}
	want(1)
	s.look()
	want(1)
	pair := s.certificate("spiffe://console.exto/" + consoleAPI)
	c := secretsv1.NewSecretsBrokerServiceClient(s.dial(s.clientTLS(pair)))
	during = func() {
		if _, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{}); err != nil {
			t.Errorf("while the change is told: %v", err)
		}
	}
	s.replace("revoked", []byte(pair.Cert.SerialNumber.Text(16)))
	s.look()
	want(2)
	_, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
	wantReason(t, err, secret.CallerUnknown, "")
	during = nil
	next := s.serverPair()
	s.replace("server.pem", next.CertPEM())
	s.replace("server-key.pem", s.keyPEM(next))
	s.replace("policy.yaml", []byte(policy+"# again\n"))
	s.look()
	want(3)
	s.replace("policy.yaml", []byte("no such thing"))
	s.look()
	if len(told) != 3 {
		t.Errorf("a bad file was told as a change: %v", told[3])
	}
}

// TestNothingRevokedWithoutAFile: then its hash is empty.
func TestNothingRevokedWithoutAFile(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	var told server.Hashes
	s.trust = func(c *server.TrustConfig) { c.OnChange = func(h server.Hashes) { told = h } }
	s.startEmbedded()
	if told.Revoked != "" || told.Policy == "" {
		t.Errorf("got %v, want all but revoked", told)
	}
	if _, err := s.as(consoleAPI).ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{}); err != nil {
		t.Error(err)
	}
	_, err := server.OpenTrust(server.TrustConfig{Logger: s.logger(), Metrics: s.metrics, Files: server.Files{
		Cert: filepath.Join(s.dir, "server.pem"), Key: filepath.Join(s.dir, "server-key.pem"), ClientCA: filepath.Join(s.dir, "ca.pem"), Policy: filepath.Join(s.dir, "policy.yaml"),
	}})
	if again := (prometheus.AlreadyRegisteredError{}); !errors.As(err, &again) {
		t.Errorf("with the metrics of another one: got %v, want it refused", err)
	}
}
