package secret_test

import (
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/exto/secrets-broker/secret"
)

func TestRedact(t *testing.T) {
	t.Parallel()
	tests := []struct{ uri, want string }{
		{"mongodb://app:hunter2@db-7:27017/orders", "mongodb://app:***@db-7:27017/orders"},
		{"mongodb+srv://app:hunter2@cluster0.x.mongodb.net/orders", "mongodb+srv://app:***@cluster0.x.mongodb.net/orders"},
		{"postgres://app:hunter2@h", "postgres://app:***@h"},
		{"postgresql://app:hunter2@h/", "postgresql://app:***@h/"},

		// Several hosts.
		{"mongodb://app:hunter2@a:27017,b:27017/db?replicaSet=r", "mongodb://app:***@a:27017,b:27017/db?replicaSet=r"},
		{"postgres://app:hunter2@a:5432,b,c:1/db?target_session_attrs=any&sslmode=require", "postgres://app:***@a:5432,b,c:1/db?target_session_attrs=any&sslmode=require"},
		{"mongodb://app:hunter2@a,app:hunter2@b/db", "mongodb://app:***@b/db"},

		// IPv6 and sockets.
		{"mongodb://app:hunter2@[::1]:27017/db", "mongodb://app:***@[::1]:27017/db"},
		{"postgres://app:hunter2@[2001:db8::7],[::1]:5433/db", "postgres://app:***@[2001:db8::7],[::1]:5433/db"},
		{"mongodb://app:hunter2@%2Ftmp%2Fmongodb-27017.sock/db", "mongodb://app:***@%2Ftmp%2Fmongodb-27017.sock/db"},

		// No user, no password.
		{"mongodb://h:27017/db", "mongodb://h:27017/db"},
		{"mongodb://a:27017,b:27017/db?replicaSet=r", "mongodb://a:27017,b:27017/db?replicaSet=r"},
		{"mongodb://app@h/db", "mongodb://app@h/db"},
		{"mongodb://app:@h/db", "mongodb://app:***@h/db"},
		{"mongodb://:hunter2@h/db", "mongodb://:***@h/db"},
		{"mongodb://@h/db", "mongodb://h/db"},

		// Passwords with encoded and with raw reserved characters.
		{"mongodb://app:p%40ss%2Fhunter2@h/db", "mongodb://app:***@h/db"},
		{"mongodb://app:p@hunter2@h/db", "mongodb://app:***@h/db"},
		{"mongodb://app:p:hunter2@h/db", "mongodb://app:***@h/db"},
		{"mongodb://app:://hunter2@h/db", "***"},
		{"mongodb://app:hunter2/x@h/db", "***"},
		{"mongodb://app:123/hunter2@h/db", "***"},
		{"mongodb://app:123?hunter2@h/db", "***"},
		{"mongodb://app:123?w=hunter2@h/db", "***"},
		{"mongodb://app:123#hunter2@h/db", "***"},
		{"mongodb://app:x@123/hunter2@h/db", "***"},
		{"mongodb://app:x@123?w=1&hunter2@h", "***"},
		{"mongodb://app:hunter2 @h/db", "mongodb://app:***@h/db"},

		// A password in what looks like a user, host or database.
		{"mongodb://app%3Ahunter2@h/db", "***"},
		{"mongodb://app%3ahunter2:x@h/db", "***"},
		{"mongodb://app%40h:hunter2@h/db", "***"},
		{"mongodb://app%253Ahunter2@h/db", "***"},
		{"mongodb://app%3Ahunter2%40h/db", "***"},
		{"mongodb://app%3ahunter2%40h:27017,b/db", "***"},
		{"mongodb://app%253Ahunter2%2540h/db", "***"},
		{"mongodb://h/app%3Ahunter2", "***"},
		{"mongodb://app;password=hunter2@h/db", "***"},
		{"mongodb://app=hunter2@h/db", "***"},
		{"mongodb://app@hunter2:x@h/db", "***"},
		{"mongodb://app hunter2@h/db", "***"},
		{"mongodb://h/db/hunter2", "***"},
		{"mongodb://h/db;password=hunter2", "***"},
		{"mongodb://h/db#hunter2", "***"},
		{"mongodb://h/db\nhunter2", "***"},

		// Parameters.
		{"postgres://h/db?user=app&password=hunter2", "postgres://h/db"},
		{"postgres://h/db?PASSWORD=hunter2&sslMode=require", "postgres://h/db?sslMode=require"},
		{"postgres://h/db?sslpassword=hunter2&sslmode=require", "postgres://h/db?sslmode=require"},
		{"postgres://h/db?sslmode=require&SSLPassword=hunter2", "postgres://h/db?sslmode=require"},
		{"mongodb://h/?authMechanism=MONGODB-AWS&authMechanismProperties=AWS_SESSION_TOKEN:hunter2", "mongodb://h/?authMechanism=MONGODB-AWS"},
		{"mongodb://h/?AUTHMECHANISMPROPERTIES=AWS_SESSION_TOKEN:hunter2&w=majority", "mongodb://h/?w=majority"},
		{"mongodb://h/?tlsCertificateKeyFilePassword=hunter2&tls=true", "mongodb://h/?tls=true"},
		{"mongodb://h/?proxyPassword=hunter2", "mongodb://h/"},
		{"mongodb://h/?%70assword=hunter2", "mongodb://h/"},
		{"mongodb://h/?whatever=hunter2", "mongodb://h/"},
		{"mongodb://h/?hunter2", "mongodb://h/"},
		{"mongodb://h/?hunter2=", "mongodb://h/"},
		{"mongodb://h/?tls=true;password=hunter2", "mongodb://h/"},
		{"mongodb://h/?tls=true;password=hunter2&w=1", "mongodb://h/?w=1"},
		{"mongodb://h/?w=1&tls=true%26password=hunter2", "mongodb://h/?w=1"},
		{"mongodb://h/?w=1%26password%3Dhunter2", "mongodb://h/"},
		{"mongodb://h/?w=1?password=hunter2", "mongodb://h/"},
		{"mongodb://h/?w=1#hunter2", "***"},
		{"mongodb://h/?w=1&x=a:hunter2@h", "***"},
		{"mongodb://h?w=1", "mongodb://h?w=1"},
		{"mongodb://h/db?", "mongodb://h/db"},
		{"mongodb://h/db?&&w=1&", "mongodb://h/db?w=1"},

		// What does not parse.
		{"", "***"},
		{"hunter2", "***"},
		{"host=h password=hunter2", "***"},
		{"mysql://app:hunter2@h/db", "***"},
		{"MONGODB://app:hunter2@h/db", "***"},
		{"mongodb://app:hunter2@", "***"},
		{"mongodb://app:hunter2@/db", "***"},
		{"mongodb://app:hunter2", "***"},
		{"mongodb:app:hunter2@h", "***"},
		{"mongodb://app:hunter2@h:x/db", "***"},
		{"mongodb://app:hunter2@a,,b/db", "***"},
		{"mongodb://app:hunter2@::1/db", "***"},
		{" mongodb://app:hunter2@h/db", "***"},
	}
	for _, tt := range tests {
		if got := secret.Redact(secret.DatabaseURI, secret.NewValue(tt.uri)); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.uri, got, tt.want)
		}
	}
}

func TestRedactShowsNothingOfOtherKinds(t *testing.T) {
	t.Parallel()
	for _, kind := range []secret.Kind{0, secret.RegistrationToken, secret.OIDCClientSecret, 4} {
		for _, s := range []string{"", "hunter2", "mongodb://app@h/db"} {
			if got := secret.Redact(kind, secret.NewValue(s)); got != "***" {
				t.Errorf("%v %q: got %q, want ***", kind, s, got)
			}
		}
	}
}

// checkIndependent looks that the redaction of before+part+after tells nothing of
// part: it is *** or the same as with another text in its place. So it shows no
// run of characters of part that the rest does not hold.
func checkIndependent(t *testing.T, before, part, after string) {
	t.Helper()
	got := secret.Redact(secret.DatabaseURI, secret.NewValue(before+part+after))
	if got == "***" {
		return
	}
	if without := secret.Redact(secret.DatabaseURI, secret.NewValue(before+"x"+after)); got != without {
		t.Fatalf("%q: got %q, which tells of %q: without it, %q", before+part+after, got, part, without)
	}
}

var (
	secretName  = regexp.MustCompile(`(?i)pass|secret|token|properties|key|credential`)
	encodedMark = regexp.MustCompile(`(?i)%(25)*(3a|40)`)
	// Names of parameters that carry secrets, in the drivers' spelling.
	secretParams = []string{"password", "sslpassword", "authMechanismProperties", "tlsCertificateKeyFilePassword", "proxyPassword", "oauth_client_secret", "scram_client_key", "sslCertificateKeyFilePassword"}
)

// FuzzRedact looks at a raw string, and at a URI built from parts, for what is
// secret in it by notions that owe nothing to Redact.
func FuzzRedact(f *testing.F) {
	schemes := []string{"mongodb", "mongodb+srv", "postgres", "postgresql"}
	for i, s := range append(validValues[secret.DatabaseURI], invalidValues[secret.DatabaseURI]...) {
		f.Add(s[:min(len(s), 200)], uint8(i), "app", "hunter2", "h:27017", "/db", uint8(i), "s3cr3t-token")
	}
	for i, password := range []string{"", "p@ss", "123/456", "12?w=3", "1#2", "x:y", "x@1/2", "%41%3a", "a&w=b", "***", ",h2:1", "[::1]", "://x", "\x00", "пароль"} {
		f.Add("mongodb://app:"+password+"@h/db?w=1&password="+password, uint8(i), "u%20x", password, "a:1,b,[::1]:2", "/db?w=1&tls=true", uint8(16+i), password)
		f.Add("postgres://app%3A"+password+"@h", uint8(i), "app%3Ax", password, "%2Ftmp%2Fx.sock", "/?sslmode=require;x=y", uint8(32+i), password)
	}
	f.Fuzz(func(t *testing.T, raw string, scheme uint8, user, password, hosts, db string, param uint8, value string) {
		got := secret.Redact(secret.DatabaseURI, secret.NewValue(raw))
		if encodedMark.MatchString(got) {
			t.Fatalf("%q: got %q with an encoded : or @", raw, got)
		}
		// Raw: between the first colon of what follows :// and the last @.
		if start := strings.Index(raw, "://"); start >= 0 {
			start += len("://")
			colon, at := strings.IndexByte(raw[start:], ':')+start+1, strings.LastIndexByte(raw, '@')
			if colon > start && at >= colon {
				checkIndependent(t, raw[:colon], raw[colon:at], raw[at:])
			}
		}
		// Raw: the values of all parameters with a name that sounds of secrets.
		for i, end := strings.IndexByte(raw, '?')+1, 0; i > 0 && i < len(raw); i = end + 1 {
			end = len(raw)
			if n := strings.IndexAny(raw[i:], "&;"); n >= 0 {
				end = i + n
			}
			if name, v, ok := strings.Cut(raw[i:end], "="); ok && secretName.MatchString(name) {
				checkIndependent(t, raw[:end-len(v)], v, raw[end:])
			}
		}

		// Built: the password raw and encoded; the parameter first and last.
		name := secretParams[int(param)%len(secretParams)]
		switch param / 16 % 4 {
		case 1:
			name = strings.ToUpper(name)
		case 2:
			name = strings.ToLower(name)
		}
		// These would end the value, raw, for every reader of the URI.
		rawValue := strings.NewReplacer("&", "%26", "#", "%23").Replace(value)
		first := "?"
		if strings.Contains(db, "?") {
			first = "&"
		}
		authority := schemes[int(scheme)%len(schemes)] + "://" + user + ":"
		for _, pw := range []string{password, url.QueryEscape(password), url.PathEscape(password)} {
			for _, v := range []string{rawValue, url.QueryEscape(value)} {
				beforeValue := authority + pw + "@" + hosts + db + first + name + "="
				checkIndependent(t, authority, pw, "@"+hosts+db+first+name+"="+v)
				checkIndependent(t, beforeValue, v, "")
				checkIndependent(t, beforeValue, v, "&w=1")
			}
		}
	})
}
