package authz_test

import (
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/authz"
)

// samplePolicy is the policy of the contract.
const samplePolicy = `trust_domain: console.exto
rules:
  - identity: spiffe://console.exto/console-api
    allow: [put, get, rotate, delete, recover, verify, describe, list, watch]
  - identity: spiffe://console.exto/worker
    allow: [put, get, rotate, delete, recover, describe, list, watch]
  - identity: spiffe://console.exto/instance/{instance_id}
    allow: [get, watch]
    instances: ["{instance_id}"]
  - identity: spiffe://console.exto/operator
    allow: [describe, list, watch, debug]
`

var allPermissions = []authz.Permission{
	authz.Put, authz.Get, authz.Rotate, authz.Delete, authz.Recover,
	authz.Verify, authz.Describe, authz.List, authz.Watch, authz.Debug,
}

func TestSamplePolicy(t *testing.T) {
	t.Parallel()
	p := mustParse(t, samplePolicy)
	tests := []struct {
		caller  string
		known   bool
		allowed string // for every kind of the instances
		on      []string
		notOn   []string
	}{
		{"spiffe://console.exto/console-api", true, "put get rotate delete recover verify describe list watch", []string{"demo", "other"}, nil},
		{"spiffe://console.exto/worker", true, "put get rotate delete recover describe list watch", []string{"demo", "other"}, nil},
		{"spiffe://console.exto/operator", true, "describe list watch debug", []string{"demo", "other"}, nil},
		{"spiffe://console.exto/instance/demo", true, "get watch", []string{"demo"}, []string{"other", "dem", "demo-2", "1"}},
		{"spiffe://console.exto/instance/1", true, "get watch", []string{"1"}, []string{"demo", "11"}},

		{caller: "spiffe://console.exto/broker", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto/instance", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto/instance/demo/more", notOn: []string{"demo", "more"}},
		{caller: "spiffe://console.exto/more/instance/demo", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto/instance/Demo", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto/instance/abc-dburi", notOn: []string{"abc", "demo"}},
		{caller: "spiffe://console.exto/instance/abc-oidc-secret", notOn: []string{"abc", "demo"}},
		{caller: "spiffe://console.exto/instance/-demo", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto/instance/demo-", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto/instance/de.mo", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto/instance/" + strings.Repeat("a", 101), notOn: []string{"demo"}},
		{caller: "spiffe://console.exto/Console-api", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto/console-api/x", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto/console-ap", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto", notOn: []string{"demo"}},
		{caller: "spiffe://console.exto.evil/console-api", notOn: []string{"demo"}},
		{caller: "spiffe://evil/console-api", notOn: []string{"demo"}},
		{caller: "spiffe://evil/instance/demo", notOn: []string{"demo"}},
		{caller: "", notOn: []string{"demo"}},
	}
	for _, tt := range tests {
		t.Run(tt.caller, func(t *testing.T) {
			t.Parallel()
			caller := callerID(t, tt.caller)
			if got := p.Knows(caller); got != tt.known {
				t.Errorf("Knows: got %v, want %v", got, tt.known)
			}
			for _, permission := range append(allPermissions, "", "GET", "everything") {
				want := slices.Contains(strings.Fields(tt.allowed), string(permission))
				if got := p.Permits(caller, permission); got != want {
					t.Errorf("Permits %q: got %v, want %v", permission, got, want)
				}
				for _, id := range tt.on {
					checkInstance(t, p, caller, permission, id, want)
				}
				for _, id := range tt.notOn {
					checkInstance(t, p, caller, permission, id, false)
				}
			}
		})
	}
}

func checkInstance(t *testing.T, p *authz.Policy, caller spiffeid.ID, permission authz.Permission, id string, want bool) {
	t.Helper()
	instance := instanceID(t, id)
	if got := p.AllowsInstance(caller, permission, instance); got != want {
		t.Errorf("AllowsInstance %q %s: got %v, want %v", permission, id, got, want)
	}
	for _, kind := range secret.Kinds() {
		if got := p.Allows(caller, permission, secretKey(t, id, kind)); got != want {
			t.Errorf("Allows %q %s %s: got %v, want %v", permission, id, kind, got, want)
		}
	}
}

// Permission, kind and instance must come from one and the same rule.
func TestRulesAddUpButDoNotMix(t *testing.T) {
	t.Parallel()
	p := mustParse(t, `trust_domain: a.b
rules:
  - identity: spiffe://a.b/x
    allow: [get]
    kinds: [DATABASE_URI]
    instances: [one]
  - identity: spiffe://a.b/x
    allow: [put]
    kinds: [OIDC_CLIENT_SECRET]
    instances: [two]
  - identity: spiffe://a.b/x
    allow: [list, debug]
    kinds: [registration_token, oidc_client_secret]
  - identity: spiffe://a.b/{instance_id}
    allow: [watch]
    kinds: [DATABASE_URI]
  - identity: spiffe://a.b/{instance_id}
    allow: [describe]
    kinds: [REGISTRATION_TOKEN]
`)
	x := callerID(t, "spiffe://a.b/x")
	const token, uri, oidc = secret.RegistrationToken, secret.DatabaseURI, secret.OIDCClientSecret
	allowed := map[authz.Permission]map[string][]secret.Kind{
		authz.Get:      {"one": {uri}},
		authz.Put:      {"two": {oidc}},
		authz.List:     {"one": {token, oidc}, "two": {token, oidc}, "x": {token, oidc}},
		authz.Debug:    {"one": {token, oidc}, "two": {token, oidc}, "x": {token, oidc}},
		authz.Watch:    {"x": {uri}},
		authz.Describe: {"x": {token}},
	}
	for _, permission := range allPermissions {
		if got, want := p.Permits(x, permission), allowed[permission] != nil; got != want {
			t.Errorf("Permits %s: got %v, want %v", permission, got, want)
		}
		for _, id := range []string{"one", "two", "x"} {
			if got, want := p.AllowsInstance(x, permission, instanceID(t, id)), allowed[permission][id] != nil; got != want {
				t.Errorf("AllowsInstance %s %s: got %v, want %v", permission, id, got, want)
			}
			for _, kind := range secret.Kinds() {
				if got, want := p.Allows(x, permission, secretKey(t, id, kind)), slices.Contains(allowed[permission][id], kind); got != want {
					t.Errorf("Allows %s %s %s: got %v, want %v", permission, id, kind, got, want)
				}
			}
		}
	}
}

func TestTemplates(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		identity string
		caller   string
		reaches  string // empty: not known
	}{
		{"spiffe://a.b/{instance_id}", "spiffe://a.b/x1", "x1"},
		{"spiffe://a.b/{instance_id}", "spiffe://a.b/x1/x2", ""},
		{"spiffe://a.b/{instance_id}", "spiffe://a.b", ""},
		{"spiffe://a.b/{instance_id}/agent", "spiffe://a.b/x1/agent", "x1"},
		{"spiffe://a.b/{instance_id}/agent", "spiffe://a.b/x1/agents", ""},
		{"spiffe://a.b/{instance_id}/agent", "spiffe://a.b/x1", ""},
		{"spiffe://a.b/{instance_id}/agent", "spiffe://a.b/agent", ""},
		{"spiffe://a.b/{instance_id}/agent", "spiffe://a.b/x1/x2/agent", ""},
		{"spiffe://a.b/ns/{instance_id}/sa/agent", "spiffe://a.b/ns/x1/sa/agent", "x1"},
		{"spiffe://a.b/ns/{instance_id}/sa/agent", "spiffe://a.b/ns/sa/agent", ""},
	} {
		p := mustParse(t, "trust_domain: a.b\nrules:\n- identity: "+tt.identity+"\n  allow: [get]\n")
		caller := callerID(t, tt.caller)
		if got, want := p.Knows(caller), tt.reaches != ""; got != want {
			t.Errorf("%s for %s: got known %v, want %v", tt.identity, tt.caller, got, want)
		}
		for _, id := range []string{"x1", "x2", "agent"} {
			if got, want := p.Allows(caller, authz.Get, secretKey(t, id, secret.DatabaseURI)), tt.reaches == id; got != want {
				t.Errorf("%s for %s: got %s allowed %v, want %v", tt.identity, tt.caller, id, got, want)
			}
		}
	}
}

// A name may be in the policy by itself and by a template.
func TestExactAndTemplateAddUp(t *testing.T) {
	t.Parallel()
	p := mustParse(t, `trust_domain: a.b
rules:
  - {identity: "spiffe://a.b/i/{instance_id}", allow: [get]}
  - {identity: spiffe://a.b/i/demo, allow: [put], instances: [other]}
`)
	demo := callerID(t, "spiffe://a.b/i/demo")
	for _, tt := range []struct {
		permission authz.Permission
		id         string
		want       bool
	}{
		{authz.Get, "demo", true}, {authz.Get, "other", false},
		{authz.Put, "demo", false}, {authz.Put, "other", true},
	} {
		if got := p.Allows(demo, tt.permission, secretKey(t, tt.id, secret.DatabaseURI)); got != tt.want {
			t.Errorf("%s %s: got %v, want %v", tt.permission, tt.id, got, tt.want)
		}
	}
}

func TestZeroValuesAreRefused(t *testing.T) {
	t.Parallel()
	p := mustParse(t, samplePolicy)
	api := callerID(t, "spiffe://console.exto/console-api")
	if p.Allows(api, authz.Get, secret.Key{}) {
		t.Error("the zero Key is allowed")
	}
	if p.AllowsInstance(api, authz.List, secret.InstanceID{}) {
		t.Error("the zero InstanceID is allowed")
	}
	var zero authz.Policy
	if zero.Knows(api) || zero.Permits(api, authz.Get) || zero.Allows(api, authz.Get, secretKey(t, "demo", secret.DatabaseURI)) || zero.AllowsInstance(api, authz.Get, instanceID(t, "demo")) {
		t.Error("the zero Policy allows something")
	}
	nobody := mustParse(t, "trust_domain: console.exto\nrules: []\n")
	if nobody.Knows(api) {
		t.Error("a policy without rules knows a caller")
	}
}

func TestPolicyIsSafeForConcurrentUse(t *testing.T) {
	t.Parallel()
	p := mustParse(t, samplePolicy)
	caller, key := callerID(t, "spiffe://console.exto/instance/demo"), secretKey(t, "demo", secret.DatabaseURI)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				if !p.Allows(caller, authz.Get, key) || p.Allows(caller, authz.Put, key) {
					t.Error("decided otherwise than alone")
				}
			}
		})
	}
	wg.Wait()
}

// decide is all that one read asks of a policy.
func decide(p *authz.Policy, caller spiffeid.ID, key secret.Key) bool {
	return p.Knows(caller) && p.Permits(caller, authz.Get) && p.Allows(caller, authz.Get, key) && p.AllowsInstance(caller, authz.Get, key.InstanceID())
}

// Not parallel: AllocsPerRun counts those of all goroutines.
func TestDecisionsDoNotAllocate(t *testing.T) {
	p := mustParse(t, samplePolicy)
	key := secretKey(t, "demo", secret.DatabaseURI)
	for _, name := range []string{"console-api", "instance/demo", "instance/other", "operator", "unknown"} {
		caller := callerID(t, "spiffe://console.exto/"+name)
		if got := testing.AllocsPerRun(100, func() { decide(p, caller, key) }); got != 0 {
			t.Errorf("%s: got %v allocations, want none", name, got)
		}
	}
}

func BenchmarkDecision(b *testing.B) {
	p := mustParse(b, samplePolicy)
	key := secretKey(b, "demo", secret.DatabaseURI)
	for _, name := range []string{"console-api", "instance/demo"} {
		caller := callerID(b, "spiffe://console.exto/"+name)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !decide(p, caller, key) {
					b.Fatal("refused")
				}
			}
		})
	}
}

func mustParse(t testing.TB, policy string) *authz.Policy {
	t.Helper()
	p, err := authz.ParsePolicy([]byte(policy))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// callerID is the zero ID for the empty name.
func callerID(t testing.TB, name string) spiffeid.ID {
	t.Helper()
	if name == "" {
		return spiffeid.ID{}
	}
	id, err := spiffeid.FromString(name)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func instanceID(t testing.TB, s string) secret.InstanceID {
	t.Helper()
	id, err := secret.ParseInstanceID(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func secretKey(t testing.TB, id string, kind secret.Kind) secret.Key {
	t.Helper()
	key, err := secret.NewKey(instanceID(t, id), kind)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
