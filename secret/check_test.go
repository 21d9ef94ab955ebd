package secret_test

import (
	"hash/crc32"
	"regexp"
	"strings"
	"testing"

	"github.com/exto/secrets-broker/secret"
)

// minted was made by the form's definition and not by this package.
const minted = "exto_rt_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA_3BSxUh"

var validValues = map[secret.Kind][]string{
	secret.RegistrationToken: {
		"x", "abc==", "AZaz09-._~+/=", "eyJhbGciOi.J9.sig-_", strings.Repeat("x", 4096), strings.Repeat("x", 4000) + strings.Repeat("=", 96),
		minted, "EXTO_RT_x", "exto_rt", "exto_rt-x", "xexto_rt_x", "exto-rt_x",
	},
	secret.DatabaseURI: {
		"mongodb://h", "mongodb://h/", "mongodb://h:27017/orders", "mongodb://app:secret@db-7:27017/orders",
		"mongodb://a:27017,b:27017/db?replicaSet=r", "mongodb://u:p@a,b,c:1/db?w=majority&password=x",
		"mongodb+srv://app:p@cluster0.x.mongodb.net/?retryWrites=true",
		"mongodb://%2Ftmp%2Fmongodb-27017.sock/db", "mongodb://[::1]:27017/db", "mongodb://u:p@[fe80::1%25eth0]/db", "mongodb://10.0.0.1",
		"postgres://h", "postgres://u@h/db", "postgresql://u:p@h1:5432,h2:5433/db?target_session_attrs=any", "postgres://%2Fvar%2Frun/db",
		"postgres://u:p%40ss@h/db", "postgres://u:p@ss@h/db", "postgres://:p@h", "postgres://u:@h", "postgres://h#x", "postgres://h?x=y",
		"mongodb://h/" + strings.Repeat("x", 25_000-len("mongodb://h/")),
	},
	secret.OIDCClientSecret: {
		"x", " ", "a b", "p@$$w0rd!\"'\\", "пароль", "密码", "🔑", "é", strings.Repeat("x", 4096), strings.Repeat("🔑", 4096),
	},
}

// An invalid value's marker is in it, and must not be in the error.
const marker = "hunter2"

var invalidValues = map[secret.Kind][]string{
	secret.RegistrationToken: {
		"", "=", "==", "=" + marker, marker + "=x", marker + " ", " " + marker, marker + "\n", marker + "\r\n", marker + "\t", marker + "\x00", marker + "é", marker + "!", marker + ",", marker + ":", "Bearer " + marker, `"` + marker + `"`, marker + "*",
		marker + strings.Repeat("x", 4097-len(marker)), strings.Repeat("x", 4096) + "=", marker + "\xff",
		"exto_rt_", "exto_rt_" + marker, minted + "=", minted + "x", minted[:len(minted)-1], "exto_rt_" + strings.Repeat("A", 43) + "_000000",
		"exto_rt_" + strings.Repeat("+", 43) + "_000000", strings.Replace(minted, "_3BSxUh", "-3BSxUh", 1),
		marker + strings.Repeat("x", 25_001-len(marker)),
	},
	secret.DatabaseURI: {
		"", marker, "host=" + marker, "://" + marker, "mysql://" + marker, "http://" + marker, "MONGODB://" + marker, "mongodb:/" + marker, "mongodb:" + marker, " mongodb://" + marker, "mongodb+ssl://" + marker, "jdbc:postgresql://" + marker, "mongodb+srv+x://" + marker,
		"mongodb://", "mongodb:///" + marker, "mongodb://" + marker + ":pw@", "mongodb://" + marker + ":pw@/db", "mongodb://?" + marker, "mongodb://#" + marker, "mongodb://@", "mongodb://:27017/" + marker,
		"postgres:///" + marker, "postgres:///" + marker + "?host=/var/run/postgresql", "postgresql:///", "postgres://" + marker + "@/db?host=/tmp", "postgres://u:" + marker + "@:5432/db",
		"mongodb://a,,b/" + marker, "mongodb://a,/" + marker, "mongodb://,a/" + marker, "mongodb://a:/" + marker, "mongodb://a:x/" + marker, "mongodb://a:123456/" + marker, "mongodb://a:1:2/" + marker,
		"mongodb://" + marker + " x/db", "mongodb://" + marker + "\n/db", "mongodb://ü" + marker, "mongodb://[" + marker + "]", "mongodb://[::1/" + marker, "mongodb://::1/" + marker, "mongodb://u:" + marker + "/x@h/db", "mongodb://" + marker + "\x00",
		"mongodb://h/" + marker + "\xff", "mongodb://h/" + marker + strings.Repeat("x", 25_001-len("mongodb://h/"+marker)),
	},
	secret.OIDCClientSecret: {
		"", "\n", marker + "\n", marker + "\r", "\r\n" + marker, marker + "\t", marker + "\x00", marker + "\x7f", marker + "\x1b[0m", marker + "\u0085", marker + "\u2028x", marker + "\u2029", marker + "\u00a0", marker + "\u200b", marker + "\ufeff", marker + "\u202e", marker + "\ue000",
		marker + "\xff", marker + "\xc3", marker + "\xed\xa0\x80",
		marker + strings.Repeat("x", 4097-len(marker)), strings.Repeat("🔑", 4097), strings.Repeat("é", 12_501),
	},
}

func TestCheckValueAccepts(t *testing.T) {
	t.Parallel()
	for kind, values := range validValues {
		for _, s := range values {
			if err := secret.CheckValue(kind, secret.NewValue(s)); err != nil {
				t.Errorf("%s %.100q: got %v, want it accepted", kind, s, err)
			}
		}
	}
}

func TestCheckValueRefuses(t *testing.T) {
	t.Parallel()
	for kind, values := range invalidValues {
		for _, s := range values {
			err := secret.CheckValue(kind, secret.NewValue(s))
			if err == nil {
				t.Errorf("%s %.100q: accepted, want an error", kind, s)
				continue
			}
			for i := range len(marker) - 3 {
				if strings.Contains(err.Error(), marker[i:i+4]) {
					t.Errorf("%s %.100q: got %v, which holds a part of it", kind, s, err)
				}
			}
			if !strings.Contains(err.Error(), " ") || strings.Contains(err.Error(), "%!") {
				t.Errorf("%s %.100q: got %q, want a sentence", kind, s, err)
			}
		}
	}
	for _, kind := range []secret.Kind{0, -1, 4} {
		if err := secret.CheckValue(kind, secret.NewValue("x")); err == nil {
			t.Errorf("%v: accepted, want an error", kind)
		}
	}
}

func TestMintToken(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile(`^exto_rt_[A-Za-z0-9_-]{43}_[0-9A-Za-z]{6}$`)
	seen := map[string]bool{}
	for range 1000 {
		token := secret.MintToken()
		if !form.MatchString(token.Reveal()) {
			t.Fatalf("%q is not of the form", token.Reveal())
		}
		if err := secret.CheckValue(secret.RegistrationToken, token); err != nil {
			t.Fatalf("%q: %v", token.Reveal(), err)
		}
		if !isMinted(token.Reveal()) {
			t.Fatalf("%q has another checksum", token.Reveal())
		}
		if seen[token.Reveal()] {
			t.Fatal("the same token twice")
		}
		seen[token.Reveal()] = true
	}
}

// A character that was mistyped anywhere after the prefix is noticed. In the
// prefix it makes a token of another form, which is none of the broker's.
func TestMistypedTokensAreRefused(t *testing.T) {
	t.Parallel()
	const prefix = "exto_rt_"
	for _, token := range []string{minted, secret.MintToken().Reveal()} {
		for i := range token {
			for _, c := range "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_.~+/=" {
				mistyped := token[:i] + string(c) + token[i+1:]
				err := secret.CheckValue(secret.RegistrationToken, secret.NewValue(mistyped))
				want := mistyped == token || i < len(prefix) && c != '='
				if (err == nil) != want {
					t.Errorf("%s with %q at %d: got %v, want accepted %v", token, c, i, err, want)
				}
			}
		}
		// Two characters that changed places.
		for i := len(prefix); i < len(token)-1; i++ {
			swapped := []byte(token)
			swapped[i], swapped[i+1] = swapped[i+1], swapped[i]
			if err := secret.CheckValue(secret.RegistrationToken, secret.NewValue(string(swapped))); (err == nil) != (string(swapped) == token) {
				t.Errorf("%s swapped at %d: got %v", token, i, err)
			}
		}
		for i := len(prefix); i < len(token); i++ {
			if secret.CheckValue(secret.RegistrationToken, secret.NewValue(token[:i])) == nil {
				t.Errorf("%s cut off at %d is accepted", token, i)
			}
		}
	}
}

// FuzzCheckValue looks that nothing panics, that every error is one of those
// known from the tables above (a sentence out of a fixed list holds no part of a
// value), and that tokens are accepted by their definition in RFC 6750 and by
// the broker's own form.
func FuzzCheckValue(f *testing.F) {
	known := map[string]bool{}
	for _, kind := range secret.Kinds() {
		for _, s := range append(invalidValues[kind], validValues[kind]...) {
			if len(s) <= 4097 {
				f.Add(int(kind), s)
			}
			if err := secret.CheckValue(kind, secret.NewValue(s)); err != nil {
				known[err.Error()] = true
			}
		}
	}
	known[secret.CheckValue(0, secret.NewValue("x")).Error()] = true
	f.Add(int(secret.RegistrationToken), secret.MintToken().Reveal())
	b64token := regexp.MustCompile(`^[A-Za-z0-9._~+/-]+=*$`)
	f.Fuzz(func(t *testing.T, kind int, s string) {
		err := secret.CheckValue(secret.Kind(kind), secret.NewValue(s))
		if err != nil && !known[err.Error()] {
			t.Fatalf("%q: got the unknown error %q", s, err)
		}
		if secret.Kind(kind) != secret.RegistrationToken {
			return
		}
		want := len(s) <= 4096 && b64token.MatchString(s) && (!strings.HasPrefix(s, "exto_rt_") || isMinted(s))
		if (err == nil) != want {
			t.Fatalf("%q: got %v, want accepted %v", s, err, want)
		}
	})
}

var mintedForm = regexp.MustCompile(`^(exto_rt_[A-Za-z0-9_-]{43})_([0-9A-Za-z]{6})$`)

// isMinted works the checksum out backwards, from digits to number.
func isMinted(s string) bool {
	m := mintedForm.FindStringSubmatch(s)
	if m == nil {
		return false
	}
	var sum uint64
	for _, digit := range m[2] {
		sum = sum*62 + uint64(strings.IndexRune("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", digit))
	}
	return sum == uint64(crc32.ChecksumIEEE([]byte(m[1])))
}
