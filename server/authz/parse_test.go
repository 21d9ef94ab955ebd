package authz_test

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/authz"
)

func TestParsePolicyRefuses(t *testing.T) {
	t.Parallel()
	// rule is a policy with one rule, which begins on line 3.
	rule := func(lines ...string) string {
		return "trust_domain: a.b\nrules:\n- " + strings.Join(lines, "\n  ") + "\n"
	}
	const identity, template = "identity: spiffe://a.b/x", "identity: spiffe://a.b/{instance_id}"
	tests := []struct {
		name   string
		policy string
		line   int
		holds  []string // parts of the error: the offending word, and what is accepted
	}{
		{"empty file", "", 1, []string{"empty", "trust_domain", "rules"}},
		{"comments only", "# nothing\n\n", 1, []string{"empty", "trust_domain", "rules"}},
		{"empty document", "---\n", 1, []string{"empty", "trust_domain", "rules"}},
		{"empty document without line feed", "---", 1, []string{"empty"}},
		{"null document", "--- ~", 1, []string{"mapping"}},
		{"a list", "- x\n", 1, []string{"mapping", "trust_domain", "rules"}},
		{"a word", "x\n", 1, []string{"mapping", "trust_domain", "rules"}},
		{"tagged mapping", "!policy\ntrust_domain: a.b\nrules: []\n", 1, []string{"mapping"}},
		{"second document", "trust_domain: a.b\nrules: []\n---\nrules: []\n", 3, []string{"second document", "one"}},
		{"second empty document", "trust_domain: a.b\nrules: []\n---\n", 3, []string{"second document"}},
		{"broken second document", "trust_domain: a.b\nrules: []\n---\n}\n", 4, []string{"no YAML"}},

		{"no trust_domain", "\nrules: []\n", 2, []string{"trust_domain is missing"}},
		{"no rules", "trust_domain: a.b\n", 1, []string{"rules is missing"}},
		{"null trust_domain", "rules: []\ntrust_domain:\n", 2, []string{"not a string", "console.exto"}},
		{"number as trust_domain", "trust_domain: 12\nrules: []\n", 1, []string{"not a string"}},
		{"empty trust_domain", "trust_domain: ''\nrules: []\n", 1, []string{"trust domain", "console.exto"}},
		{"trust_domain in upper case", "trust_domain: A.b\nrules: []\n", 1, []string{`"A.b"`, "lower case"}},
		{"trust_domain as a SPIFFE ID", "rules: []\ntrust_domain: spiffe://a.b\n", 2, []string{"spiffe://a.b", "without spiffe://"}},
		{"null rules", "trust_domain: a.b\nrules:\n", 2, []string{"not a list", "[]"}},
		{"rules are a mapping", "trust_domain: a.b\nrules: {}\n", 2, []string{"not a list"}},
		{"rules are a word", "trust_domain: a.b\nrules: none\n", 2, []string{"not a list"}},
		{"unknown key", "trust_domain: a.b\nrules: []\nrule: []\n", 3, []string{`"rule"`, "trust_domain, rules"}},
		{"unknown key in another case", "Trust_domain: a.b\nrules: []\n", 1, []string{`"Trust_domain"`}},
		{"duplicate key", "trust_domain: a.b\nrules: []\ntrust_domain: a.b\n", 3, []string{`"trust_domain"`, "once"}},
		{"key of another type", "trust_domain: a.b\nrules: []\n7: x\n", 3, []string{"not a string", "trust_domain, rules"}},
		{"mapping as key", "trust_domain: a.b\nrules: []\n? {a: b}\n: x\n", 3, []string{"not a string"}},

		{"rule is a word", "trust_domain: a.b\nrules:\n- x\n", 3, []string{"a rule is a mapping", "identity, allow, kinds, instances"}},
		{"rule is null", "trust_domain: a.b\nrules:\n- {identity: spiffe://a.b/x, allow: [get]}\n-\n", 4, []string{"a rule is a mapping"}},
		{"rule is empty", "trust_domain: a.b\nrules:\n- {}\n", 3, []string{"identity is missing"}},
		{"no identity", rule("allow: [get]"), 3, []string{"identity is missing"}},
		{"no allow", rule(identity), 3, []string{"allow is missing"}},
		{"unknown key in a rule", rule(identity, "allow: [get]", "deny: [put]"), 5, []string{`"deny"`, "identity, allow, kinds, instances"}},
		{"duplicate key in a rule", rule(identity, "allow: [get]", "allow: [put]"), 5, []string{`"allow"`, "once"}},

		{"identity is a list", rule("identity: [spiffe://a.b/x]", "allow: [get]"), 3, []string{"not a string", "SPIFFE ID"}},
		{"identity is null", rule("identity:", "allow: [get]"), 3, []string{"not a string", "SPIFFE ID"}},
		{"identity is a name", rule("allow: [get]", "identity: worker"), 4, []string{`"worker"`, "SPIFFE ID"}},
		{"identity of another trust domain", rule("allow: [get]", "identity: spiffe://b.a/x"), 4, []string{`"spiffe://b.a/x"`, "outside the trust domain", "spiffe://a.b"}},
		{"template of another trust domain", rule("allow: [get]", "identity: spiffe://b.a/{instance_id}"), 4, []string{"outside the trust domain"}},
		{"trust domain that only begins alike", rule("allow: [get]", "identity: spiffe://a.bc/x"), 4, []string{"outside the trust domain"}},
		{"identity with a wildcard", rule("allow: [get]", "identity: spiffe://a.b/*"), 4, []string{"no identity"}},
		{"identity with a trailing slash", rule("allow: [get]", "identity: spiffe://a.b/x/"), 4, []string{"no identity"}},
		{"identity with upper-case scheme", rule("allow: [get]", "identity: SPIFFE://a.b/x"), 4, []string{"no identity"}},
		{"identity with another template", rule("allow: [get]", "identity: spiffe://a.b/{id}"), 4, []string{"no identity", "{instance_id}"}},
		{"identity that no caller can have", rule("allow: [get]", "identity: spiffe://a.b/"+strings.Repeat("x", 600)), 4, []string{"512"}},
		{"template twice", rule("allow: [get]", "identity: spiffe://a.b/{instance_id}/{instance_id}"), 4, []string{"at most one"}},
		{"template begins in a segment", rule("allow: [get]", "identity: spiffe://a.b/x-{instance_id}"), 4, []string{"whole segment"}},
		{"template ends in a segment", rule("allow: [get]", "identity: spiffe://a.b/{instance_id}-x"), 4, []string{"whole segment"}},
		{"template for the trust domain", rule("allow: [get]", "identity: spiffe://{instance_id}"), 4, []string{"no identity"}},
		{"template for the trust domain, with a path", rule("allow: [get]", "identity: spiffe://{instance_id}/x"), 4, []string{"no identity"}},

		{"allow is a word", rule(identity, "allow: get"), 4, []string{"not a list", "put, get, rotate, delete, recover, verify, describe, list, watch, debug"}},
		{"allow is null", rule(identity, "allow:"), 4, []string{"not a list"}},
		{"allow is empty", rule(identity, "allow: []"), 4, []string{"an empty list", "put, get"}},
		{"unknown permission", rule(identity, "allow:", "- get", "- purge"), 6, []string{`"purge"`, "put, get, rotate, delete, recover, verify, describe, list, watch, debug"}},
		{"permission in upper case", rule(identity, "allow: [GET]"), 4, []string{`"GET"`}},
		{"empty permission", rule(identity, "allow: ['']"), 4, []string{`""`}},
		{"permission is a bool", rule(identity, "allow: [true]"), 4, []string{"not a string"}},
		{"permission is a list", rule(identity, "allow: [[get]]"), 4, []string{"not a string"}},

		{"kinds is a word", rule(identity, "allow: [get]", "kinds: DATABASE_URI"), 5, []string{"not a list"}},
		{"kinds is null", rule(identity, "allow: [get]", "kinds:"), 5, []string{"not a list", "without it all"}},
		{"kinds is empty", rule(identity, "allow: [get]", "kinds: []"), 5, []string{"an empty list", "without it all"}},
		{"unknown kind", rule(identity, "allow: [get]", "kinds: [PASSWORD]"), 5, []string{`"PASSWORD"`, "REGISTRATION_TOKEN, DATABASE_URI, OIDC_CLIENT_SECRET"}},
		{"kind in mixed case", rule(identity, "allow: [get]", "kinds: [Database_uri]"), 5, []string{`"Database_uri"`}},
		{"kind with a dotless i", rule(identity, "allow: [get]", "kinds: [database_urı]"), 5, []string{"DATABASE_URI"}},
		{"kind's enum name", rule(identity, "allow: [get]", "kinds: [SECRET_KIND_DATABASE_URI]"), 5, []string{"DATABASE_URI"}},
		{"kind's number", rule(identity, "allow: [get]", "kinds: [2]"), 5, []string{"not a string"}},

		{"instances is a word", rule(identity, "allow: [get]", "instances: demo"), 5, []string{"not a list"}},
		{"instances is null", rule(identity, "allow: [get]", "instances:"), 5, []string{"not a list", "without it all"}},
		{"instances is empty", rule(identity, "allow: [get]", "instances: []"), 5, []string{"an empty list", "without it all"}},
		{"malformed instance id", rule(identity, "allow: [get]", "instances:", "- demo", "- Demo"), 7, []string{`"Demo"`, "lower-case letters"}},
		{"instance id with a key's ending", rule(identity, "allow: [get]", "instances: [abc-dburi]"), 5, []string{`"abc-dburi"`}},
		{"instance id looks like a number", rule(identity, "allow: [get]", "instances: [0123]"), 5, []string{"not a string", "quotes"}},
		{"wildcard instance", rule(identity, "allow: [get]", "instances: ['*']"), 5, []string{`"*"`, "lower-case letters"}},
		{"own instance without identity's", rule(identity, "allow: [get]", `instances: ["{instance_id}"]`), 5, []string{"{instance_id}", "identity"}},
		{"own instance among others", rule(identity, "allow: [get]", `instances: [demo, "{instance_id}"]`), 5, []string{"{instance_id}", "identity"}},
		{"own instance without quotes", rule(template, "allow: [get]", "instances: [{instance_id}]"), 5, []string{`["{instance_id}"], in quotes`}},
		{"template with another instance", rule(template, "allow: [get]", "instances: [demo]"), 5, []string{`"demo"`, `["{instance_id}"]`}},
		{"template with one more instance", rule(template, "allow: [get]", "instances:", `- "{instance_id}"`, "- demo"), 7, []string{`"demo"`, `["{instance_id}"]`}},
		{"template with own instance twice", rule(template, "allow: [get]", `instances: ["{instance_id}", "{instance_id}"]`), 5, []string{`["{instance_id}"]`}},
		{"template with empty instances", rule(template, "allow: [get]", "instances: []"), 5, []string{"an empty list"}},

		{"anchor", "trust_domain: a.b\nrules: &r []\n", 2, []string{"anchors"}},
		{"anchor on a word", rule("identity: &i spiffe://a.b/x", "allow: [get]"), 3, []string{"anchors"}},
		{"alias", rule(identity, "allow: &a [get]", "kinds: *a"), 4, []string{"anchors"}},
		{"unknown alias", rule(identity, "allow: *a"), 4, []string{"anchor"}},
		{"merge key", rule(identity, "allow: [get]", "<<: {kinds: [DATABASE_URI]}"), 5, []string{"the keys of a rule"}},

		{"bad indentation", rule(identity, " allow: [get]"), 4, []string{"no YAML"}},
		{"tab", "trust_domain: a.b\nrules:\n\t- x\n\n# more\n", 3, []string{"no YAML"}},
		{"missing colon", rule("identity spiffe://a.b/x", "allow: [get]"), 4, []string{"no YAML"}},
		{"open bracket", "trust_domain: a.b\n\nrules: [\n", 3, []string{"no YAML"}},
		{"open quote", "trust_domain: a.b\nrules: []\n\n\"x\n", 4, []string{"no YAML"}},
		{"stray brace on the first line", "}\n\n# more\n", 1, []string{"no YAML"}},
		{"control character", "trust_domain: a.b\nrules: \x01\n\n", 2, []string{"no YAML", "control characters"}},
		{"not UTF-8", "trust_domain: a.b\nrules: \xff\n\n", 2, []string{"no YAML", "UTF-8"}},
		{"NUL bytes", "\x00", 1, []string{"no YAML"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p, err := authz.ParsePolicy([]byte(tt.policy))
			if err == nil || p != nil {
				t.Fatalf("got %v, %v, want an error and no policy", p, err)
			}
			if want := "line " + strconv.Itoa(tt.line) + ": "; !strings.HasPrefix(err.Error(), want) {
				t.Errorf("got %q, want it to begin with %q", err, want)
			}
			for _, part := range tt.holds {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("got %q, want it to hold %q", err, part)
				}
			}
		})
	}
}

// A policy file is pointed at by a path, which may be that of another file: what
// stands in that must not get into the log.
func TestParsePolicyErrorsRepeatNothingElse(t *testing.T) {
	t.Parallel()
	const confidential = "hunter2hunter2"
	for _, file := range []string{
		"trust_domain: a.b\nrules: []\npassword: " + confidential + "\n",
		"- " + confidential + "\n",
		confidential,
		"password=" + confidential + "\n}",
		"-----BEGIN PRIVATE KEY-----\n" + confidential + "\n",
		"trust_domain: a.b\nrules: " + confidential + "\n",
		"trust_domain: a.b\nrules: {" + confidential + ": x}\n",
		"trust_domain: a.b\nrules:\n- identity: spiffe://a.b/x\n  allow: [purge]\n  instances: [" + confidential + "]\n",
		"trust_domain: " + strings.Repeat("X", 100) + confidential + "\nrules: []\n",
		strings.Repeat("x", 100) + confidential + ": y\n",
	} {
		_, err := authz.ParsePolicy([]byte(file))
		if err == nil {
			t.Errorf("%q: got no error", file)
		} else if strings.Contains(err.Error(), confidential) {
			t.Errorf("got %q, which repeats the file", err)
		}
	}
}

func TestParsePolicyAccepts(t *testing.T) {
	t.Parallel()
	for name, policy := range map[string]string{
		"sample":             samplePolicy,
		"rules first":        "rules: []\ntrust_domain: a.b\n",
		"no final line feed": "trust_domain: a.b\nrules: []",
		"CRLF":               strings.ReplaceAll(samplePolicy, "\n", "\r\n"),
		"byte order mark":    "\uFEFF" + samplePolicy,
		"document marks":     "---\n" + samplePolicy + "...\n",
		"comments":           "# ours\n" + strings.ReplaceAll(samplePolicy, "\n", " # here\n"),
		"all permissions":    "trust_domain: a.b\nrules: [{identity: spiffe://a.b/x, allow: [put, get, rotate, delete, recover, verify, describe, list, watch, debug]}]",
		"kinds in lower case": "trust_domain: a.b\nrules: [{identity: spiffe://a.b/x, allow: [get]," +
			" kinds: [registration_token, database_uri, oidc_client_secret]}]",
		"number in quotes":       `{trust_domain: a.b, rules: [{identity: spiffe://a.b/x, allow: [get], instances: ["0123"]}]}`,
		"the trust domain's own": `{trust_domain: a.b, rules: [{identity: spiffe://a.b, allow: [get]}]}`,
		"a rule twice":           "trust_domain: a.b\nrules:\n- {identity: spiffe://a.b/x, allow: [get, get]}\n- {identity: spiffe://a.b/x, allow: [get]}\n",
	} {
		if _, err := authz.ParsePolicy([]byte(policy)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzParsePolicy looks that nothing panics, that errors name a line of the
// file, and that what parses decides like a model that knows no maps and bits.
func FuzzParsePolicy(f *testing.F) {
	for _, seed := range []string{
		samplePolicy, "", "trust_domain: a.b\nrules: []\n",
		"trust_domain: a.b\nrules:\n- identity: spiffe://a.b/{instance_id}/x\n  allow: [get]\n  kinds: [database_uri]\n",
		"trust_domain: a.b\nrules:\n- identity: spiffe://a.b/x\n  allow: [put, debug]\n  kinds: [OIDC_CLIENT_SECRET]\n  instances: [x, \"1\"]\n",
		"{trust_domain: a.b, rules: [{identity: spiffe://a.b/i/x, allow: [get]}, {identity: 'spiffe://a.b/i/{instance_id}', allow: [put]}]}",
		"a: &a [*a]\n", "? {a: b}\n: - c\n", "a: !!binary x\n---\n%YAML 1.1\n", "\"\\x41\": |\n  x\n", "<<: {a: b}\n",
	} {
		f.Add([]byte(seed))
	}
	errorForm := regexp.MustCompile(`^line ([1-9][0-9]*): `)
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := authz.ParsePolicy(data)
		if err != nil {
			m := errorForm.FindStringSubmatch(err.Error())
			if m == nil || p != nil {
				t.Fatalf("got %v, %v", p, err)
			}
			// YAML counts other line breaks too.
			lines := len(regexp.MustCompile(`\r\n|[\n\r\x{85}\x{2028}\x{2029}]`).FindAllIndex(data, -1)) + 1
			if line, _ := strconv.Atoi(m[1]); line > lines && !isUTF16(data) {
				t.Fatalf("got %q for a file of %d lines", err, lines)
			}
			return
		}
		var m model
		if err := yaml.Unmarshal(data, &m); err != nil {
			t.Fatalf("parsed although yaml says %v", err)
		}
		m.compare(t, p)
	})
}

func isUTF16(data []byte) bool {
	return len(data) > 1 && (data[0] == 0xff && data[1] == 0xfe || data[0] == 0xfe && data[1] == 0xff)
}

type model struct {
	TrustDomain string `yaml:"trust_domain"`
	Rules       []struct {
		Identity                string
		Allow, Kinds, Instances []string
	}
}

var modelID = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,98}[a-z0-9])?$`)

// some reports whether a rule allows it; the empty word stands for any.
func (m *model) some(caller, permission, kind, instance string) bool {
	for _, r := range m.Rules {
		own := ""
		is, want := strings.Split(caller, "/"), strings.Split(r.Identity, "/")
		matches := len(is) == len(want)
		for i := 0; matches && i < len(is); i++ {
			if want[i] == "{instance_id}" && modelID.MatchString(is[i]) && !strings.HasSuffix(is[i], "-dburi") && !strings.HasSuffix(is[i], "-oidc-secret") {
				own = is[i]
			} else if want[i] != is[i] {
				matches = false
			}
		}
		if matches &&
			(permission == "" || slices.Contains(r.Allow, permission)) &&
			(kind == "" || r.Kinds == nil || slices.Contains(r.Kinds, kind) || slices.Contains(r.Kinds, strings.ToLower(kind))) &&
			(instance == "" || own == instance || own == "" && (r.Instances == nil || slices.Contains(r.Instances, instance))) {
			return true
		}
	}
	return false
}

func (m *model) compare(t *testing.T, p *authz.Policy) {
	callers := []string{"spiffe://" + m.TrustDomain + "/x", "spiffe://other.domain/x"}
	ids := []string{"x", "1"}
	for _, r := range m.Rules[:min(len(m.Rules), 4)] {
		for _, own := range []string{"x", "X", "abc-dburi"} {
			callers = append(callers, strings.ReplaceAll(r.Identity, "{instance_id}", own))
		}
		for _, id := range r.Instances[:min(len(r.Instances), 4)] {
			if id != "{instance_id}" {
				ids = append(ids, id)
			}
		}
	}
	for _, name := range callers {
		caller := callerID(t, name)
		if got, want := p.Knows(caller), m.some(name, "", "", ""); got != want {
			t.Fatalf("Knows %s: got %v, want %v", name, got, want)
		}
		for _, permission := range allPermissions {
			if got, want := p.Permits(caller, permission), m.some(name, string(permission), "", ""); got != want {
				t.Fatalf("Permits %s %s: got %v, want %v", name, permission, got, want)
			}
			for _, id := range ids {
				if got, want := p.AllowsInstance(caller, permission, instanceID(t, id)), m.some(name, string(permission), "", id); got != want {
					t.Fatalf("AllowsInstance %s %s %s: got %v, want %v", name, permission, id, got, want)
				}
				for _, kind := range secret.Kinds() {
					if got, want := p.Allows(caller, permission, secretKey(t, id, kind)), m.some(name, string(permission), kind.String(), id); got != want {
						t.Fatalf("Allows %s %s %s %s: got %v, want %v", name, permission, kind, id, got, want)
					}
				}
			}
		}
	}
}
