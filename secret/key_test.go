package secret_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/exto/secrets-broker/secret"
)

// Both lists also serve as seeds.
var (
	goodIDs = []string{
		"a", "7", "abc", "0123", "a-b", "a--b", "customer-42", "a1b2c3d4-0000-4000-8000-a1b2c3d4e5f6", strings.Repeat("x", 100),
		// Endings that only look like those of keys.
		"dburi", "oidc-secret", "abc-dbur", "abc-dburi2", "abc-dburi-x", "abcdburi", "abc-oidc", "abc-secret", "abcoidc-secret", "instance-abc",
	}
	badIDs = []string{
		"", "-", "-a", "a-", "--", "A", "aB", "ABC", "a_b", "a.b", "a/b", "a b", " a", "a ", "a\n", "\na", "a\x00", "é", "а" /* Cyrillic */, "１", "a%2fb",
		strings.Repeat("x", 101), strings.Repeat("x", 1000),
		"abc-dburi", "abc-oidc-secret", "a-dburi", "abc-dburi-dburi", "abc-dburi-oidc-secret", "-dburi", "-oidc-secret", "ABC-DBURI",
	}
)

func TestParseInstanceID(t *testing.T) {
	t.Parallel()
	for _, s := range goodIDs {
		id, err := secret.ParseInstanceID(s)
		if err != nil || id.String() != s {
			t.Errorf("%q: got %q, %v, want it accepted", s, id, err)
		}
		if again, _ := secret.ParseInstanceID(s); id != again {
			t.Errorf("%q: parsed twice, the ids differ", s)
		}
	}
	for _, s := range badIDs {
		id, err := secret.ParseInstanceID(s)
		if err == nil || id != (secret.InstanceID{}) {
			t.Errorf("%q: got %q, %v, want the zero id and an error", s, id, err)
		}
	}
}

func TestParseInstanceIDSaysWhy(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		"":                "required",
		"Zebra9":          "lower-case letters, digits and inner hyphens",
		"abc-dburi":       "-dburi",
		"abc-oidc-secret": "-oidc-secret",
	} {
		_, err := secret.ParseInstanceID(s)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want it to hold %q", s, err, want)
		}
		if err != nil && s != "" && strings.Contains(err.Error(), s) {
			t.Errorf("%q: got %v, which repeats it", s, err)
		}
	}
}

func TestKeys(t *testing.T) {
	t.Parallel()
	for _, id := range goodIDs {
		for kind, want := range map[secret.Kind]string{
			secret.RegistrationToken: "instance-" + id,
			secret.DatabaseURI:       "instance-" + id + "-dburi",
			secret.OIDCClientSecret:  "instance-" + id + "-oidc-secret",
		} {
			key, err := secret.NewKey(mustID(t, id), kind)
			if err != nil || key.String() != want || key.InstanceID() != mustID(t, id) || key.Kind() != kind {
				t.Errorf("%s %s: got %q (%s, %s), %v, want %q", id, kind, key, key.InstanceID(), key.Kind(), err, want)
			}
			if parsed, err := secret.ParseKey(want); err != nil || parsed != key {
				t.Errorf("ParseKey %q: got %q, %v", want, parsed, err)
			}
		}
	}
}

func TestParseKeyRefuses(t *testing.T) {
	t.Parallel()
	names := []string{"", "instance", "instance-", "abc", "abc-dburi", "Instance-abc", "INSTANCE-abc", "instance-Abc", "instance-abc-DBURI", "instances-abc", " instance-abc", "instance-abc ", "xinstance-abc", "instance--abc", "instance-abc-", "instance--dburi", "instance-abc-dburi-dburi", "instance-abc-oidc-secret-dburi", "instance-abc-dburi-oidc-secret", "instance-abc/versions"}
	for _, id := range badIDs {
		if !strings.HasSuffix(id, "-dburi") && !strings.HasSuffix(id, "-oidc-secret") {
			names = append(names, "instance-"+id)
		}
		names = append(names, "instance-"+id+"-dburi", "instance-"+id+"-oidc-secret")
	}
	for _, s := range names {
		if key, err := secret.ParseKey(s); err == nil || key != (secret.Key{}) {
			t.Errorf("%q: got %q, %v, want the zero key and an error", s, key, err)
		}
	}
}

func TestNewKeyRefuses(t *testing.T) {
	t.Parallel()
	if key, err := secret.NewKey(secret.InstanceID{}, secret.DatabaseURI); err == nil || key != (secret.Key{}) {
		t.Errorf("zero id: got %q, %v, want an error", key, err)
	}
	for _, kind := range []secret.Kind{0, -1, 4, 100} {
		if key, err := secret.NewKey(mustID(t, "abc"), kind); err == nil || key != (secret.Key{}) {
			t.Errorf("%v: got %q, %v, want an error", kind, key, err)
		}
	}
}

func TestZeroNames(t *testing.T) {
	t.Parallel()
	if got := (secret.InstanceID{}).String(); got != "" {
		t.Errorf("zero InstanceID: got %q, want nothing", got)
	}
	var key secret.Key
	if key.String() != "" || key.InstanceID() != (secret.InstanceID{}) || key.Kind() != 0 {
		t.Errorf("zero Key: got %q, %q, %v, want nothing", key, key.InstanceID(), key.Kind())
	}
}

func TestKinds(t *testing.T) {
	t.Parallel()
	for i, want := range []string{"REGISTRATION_TOKEN", "DATABASE_URI", "OIDC_CLIENT_SECRET"} {
		kind := secret.Kinds()[i]
		if parsed, err := secret.ParseKind(want); kind.String() != want || int(kind) != i+1 || parsed != kind || err != nil {
			t.Errorf("got %d %s, parsed as %v, %v, want %d %s", int(kind), kind, parsed, err, i+1, want)
		}
	}
	if got := len(secret.Kinds()); got != 3 {
		t.Errorf("got %d kinds, want 3", got)
	}
	for _, s := range []string{"", "database_uri", "Database_Uri", "SECRET_KIND_DATABASE_URI", "DATABASE_URI ", "Kind(0)", "2"} {
		if kind, err := secret.ParseKind(s); err == nil || kind != 0 {
			t.Errorf("%q: got %v, %v, want an error", s, kind, err)
		}
	}
}

// instanceForm is the contract's.
var instanceForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,98}[a-z0-9])?$`)

func FuzzParseInstanceID(f *testing.F) {
	for _, s := range append(goodIDs, badIDs...) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		want := instanceForm.MatchString(s) && !strings.HasSuffix(s, "-dburi") && !strings.HasSuffix(s, "-oidc-secret")
		id, err := secret.ParseInstanceID(s)
		if (err == nil) != want {
			t.Fatalf("%q: got %v, want accepted %v", s, err, want)
		}
		if want && id.String() != s || !want && id != (secret.InstanceID{}) {
			t.Fatalf("%q: got %q", s, id)
		}
	})
}

// FuzzParseKey looks that names and (instance, kind) are one to one: what parses
// prints back as it was, and the three keys of its instance parse as themselves.
func FuzzParseKey(f *testing.F) {
	for _, s := range append(goodIDs, badIDs...) {
		f.Add("instance-" + s)
		f.Add("instance-" + s + "-dburi")
		f.Add("instance-" + s + "-oidc-secret")
	}
	f.Fuzz(func(t *testing.T, s string) {
		key, err := secret.ParseKey(s)
		if err != nil {
			if key != (secret.Key{}) {
				t.Fatalf("%q: got %q with the error %v", s, key, err)
			}
			return
		}
		if key.String() != s {
			t.Fatalf("%q: prints as %q", s, key)
		}
		names := map[string]bool{}
		for _, kind := range secret.Kinds() {
			made, err := secret.NewKey(key.InstanceID(), kind)
			if err != nil {
				t.Fatalf("%q: %v", s, err)
			}
			if parsed, err := secret.ParseKey(made.String()); err != nil || parsed != made {
				t.Fatalf("%q: got %v, %v, want %v", made, parsed, err, made)
			}
			if kind == key.Kind() && made != key {
				t.Fatalf("%q: got %v, made again %v", s, key, made)
			}
			names[made.String()] = true
		}
		if len(names) != 3 {
			t.Fatalf("%q: its instance has %d keys", s, len(names))
		}
	})
}

func mustID(t testing.TB, s string) secret.InstanceID {
	t.Helper()
	id, err := secret.ParseInstanceID(s)
	if err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	return id
}
