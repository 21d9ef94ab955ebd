package authz_test

import (
	"math/big"
	"regexp"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/exto/secrets-broker/server/authz"
)

func serial(t *testing.T, hex string) string {
	t.Helper()
	n, ok := new(big.Int).SetString(hex, 16)
	if !ok {
		t.Fatalf("%q is no hex", hex)
	}
	return authz.Serial(n)
}

func TestParseRevoked(t *testing.T) {
	t.Parallel()
	worker := spiffeid.RequireFromString("spiffe://console.exto/worker")
	for name, tt := range map[string]struct {
		file    string
		serials []string
		callers []spiffeid.ID
	}{
		"nothing":                      {"", nil, nil},
		"comments and empty lines":     {"# a list\n\n   \t\n  # more\r\n", nil, nil},
		"a serial":                     {"3fa201\n", []string{"3fa201"}, nil},
		"no line break at the end":     {"3fa201", []string{"3fa201"}, nil},
		"colons":                       {"3f:a2:01\n", []string{"3fa201"}, nil},
		"upper case":                   {"3F:A2:01\n", []string{"3fa201"}, nil},
		"leading zeros":                {"00:00:3f:a2:01\n003fa202\n", []string{"3fa201", "3fa202"}, nil},
		"zero":                         {"00\n", []string{"0"}, nil},
		"digits alone are hex":         {"10\n", []string{"10"}, nil},
		"spaces around":                {"  3fa201\t\r\n", []string{"3fa201"}, nil},
		"a comment behind":             {"3fa201 # a lost laptop\nspiffe://console.exto/worker#too\n", []string{"3fa201"}, []spiffeid.ID{worker}},
		"a SPIFFE ID":                  {"spiffe://console.exto/worker\n", nil, []spiffeid.ID{worker}},
		"twice":                        {"3fa201\n3F:A2:01\n", []string{"3fa201"}, nil},
		"longer than any serial is":    {strings.Repeat("ab", 100), []string{strings.Repeat("ab", 100)}, nil},
		"a serial and a caller of all": {"1\nspiffe://console.exto/worker\n2\n", []string{"1", "2"}, []spiffeid.ID{worker}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, err := authz.ParseRevoked([]byte(tt.file))
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range tt.serials {
				if !r.HasSerial(serial(t, s)) {
					t.Errorf("%s is not revoked", s)
				}
			}
			for _, id := range tt.callers {
				if !r.HasCaller(id) {
					t.Errorf("%s is not revoked", id)
				}
			}
			for _, other := range []string{"3fa2", "3fa2010", "a"} {
				if r.HasSerial(other) {
					t.Errorf("%s is revoked", other)
				}
			}
			for _, other := range []string{"spiffe://console.exto", "spiffe://console.exto/worker/x", "spiffe://other.exto/worker"} {
				if r.HasCaller(spiffeid.RequireFromString(other)) {
					t.Errorf("%s is revoked", other)
				}
			}
		})
	}
	var zero authz.Revoked
	if zero.HasSerial("0") || zero.HasCaller(spiffeid.ID{}) {
		t.Error("the zero value revokes something")
	}
}

func TestParseRevokedRefuses(t *testing.T) {
	t.Parallel()
	for name, line := range map[string]string{
		"a word":              "laptop",
		"two on a line":       "3fa201 3fa202",
		"commas":              "3fa201,3fa202",
		"0x":                  "0x3fa201",
		"a minus":             "-3fa201",
		"a plus":              "+3fa201",
		"a colon alone":       ":",
		"a colon too many":    "3f::a2",
		"a colon behind":      "7f:b2:",
		"underscores":         "3f_a2",
		"other digits":        "３f",
		"another URI":         "https://console.exto/worker",
		"a pattern":           "spiffe://console.exto/instance/{instance_id}",
		"a star":              "spiffe://console.exto/*",
		"a scheme in capital": "SPIFFE://console.exto/worker",
		"over 512 bytes":      "spiffe://console.exto/" + strings.Repeat("x", 512),
		"a key":               "-----BEGIN PRIVATE KEY-----",
		"a NUL":               "3fa201\x00",
	} {
		_, err := authz.ParseRevoked([]byte("# a list\n1\n\n" + line + "\n2\n"))
		if err == nil || !strings.HasPrefix(err.Error(), "line 4: ") {
			t.Errorf("%s: got %v, want an error that names line 4", name, err)
		} else if len(line) > 1 && strings.Contains(err.Error(), line) {
			t.Errorf("%s: got %q, which repeats the line", name, err)
		}
	}
}

// FuzzParseRevoked looks that what is read is what a small model of a line reads, and
// that errors name a line of the file.
func FuzzParseRevoked(f *testing.F) {
	for _, s := range []string{"", "3f:a2:01 # x\n", "spiffe://console.exto/worker\r\n00ff", "#\n\n", "0x1", "a:\n", "ff\x00"} {
		f.Add([]byte(s))
	}
	named := regexp.MustCompile(`^line ([1-9][0-9]*): [ -~]{1,200}$`)
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := authz.ParseRevoked(data)
		if err != nil {
			if m := named.FindStringSubmatch(err.Error()); m == nil || r != nil {
				t.Fatalf("got %v, %q, want an error alone that names a line", r, err)
			}
			return
		}
		for _, line := range strings.Split(string(data), "\n") {
			text := strings.TrimSpace(strings.SplitN(line, "#", 2)[0])
			if text == "" {
				continue
			}
			if id, err := spiffeid.FromString(text); err == nil {
				if !r.HasCaller(id) {
					t.Fatalf("%q is not revoked", text)
				}
				continue
			}
			digits := strings.TrimLeft(strings.ToLower(strings.ReplaceAll(text, ":", "")), "0")
			if digits == "" {
				digits = "0"
			}
			if !r.HasSerial(digits) {
				t.Fatalf("%q is not revoked", text)
			}
		}
	})
}
