package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

// cloud is a vault with what a broker in front of it needs to run.
type cloud struct {
	*keyvaultfake.Fake
	t   *testing.T
	dir string
	env map[string]string // without credentials
}

// devFolder is a folder in which dev ran, for the certificates and the policy.
func devFolder(t *testing.T) string {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("SSL_CERT_FILE leads to the fake's CA on Linux alone")
	}
	dir := t.TempDir()
	devIn(t, dir).kill()
	return dir
}

// newCloud runs a vault for brokers with the certificates of a devFolder.
func newCloud(t *testing.T, dir string, cfg keyvaultfake.Config) *cloud {
	t.Helper()
	c := &cloud{t: t, dir: dir, env: settings(dir)}
	if cfg.Transitions == nil {
		cfg.Transitions = &keyvaultfake.Transitions{}
	}
	c.Fake = must2(keyvaultfake.Start(cfg))(t)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	ca := filepath.Join(t.TempDir(), "vault-ca.pem")
	if err := os.WriteFile(ca, c.CAPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	c.env["SSL_CERT_FILE"] = ca
	delete(c.env, "BROKER_DATA_DIR")
	c.set(c.Env())
	return c
}

// set takes variables in the form of os.Environ.
func (c *cloud) set(env []string) {
	for _, variable := range env {
		name, value, _ := strings.Cut(variable, "=")
		c.env[name] = value
	}
}

// secretCloud is newCloud with the broker's client secret.
func secretCloud(t *testing.T, dir string, cfg keyvaultfake.Config) *cloud {
	t.Helper()
	c := newCloud(t, dir, cfg)
	c.set(c.Broker().Env())
	return c
}

// start runs a broker until it listens.
func (c *cloud) start(changes ...string) *process {
	c.t.Helper()
	p := launch(c.t, c.dir, environ(c.env, changes...), binary, "serve")
	p.listen()
	return p
}

// asked are the requests in the journal, by operation; those to the vault bear no
// other name.
func (c *cloud) asked() (vault, tokens []keyvaultfake.Request) {
	for _, r := range c.Journal() {
		switch r.Op {
		case keyvaultfake.OpToken, keyvaultfake.OpIdentity:
			tokens = append(tokens, r)
		case keyvaultfake.OpDiscovery:
		default:
			vault = append(vault, r)
		}
	}
	return vault, tokens
}

func lines(requests []keyvaultfake.Request) string {
	var b strings.Builder
	for _, r := range requests {
		fmt.Fprintf(&b, "\n%s %s %s %d %s", r.Op, r.Method, r.Path, r.Status, r.Inner)
	}
	return b.String()
}

func TestKeyVaultRequests(t *testing.T) {
	t.Parallel()
	c := secretCloud(t, devFolder(t), keyvaultfake.Config{})
	p := c.start()
	if want := `level=INFO msg="secret store: azure key vault" vault=` + c.URL() + "\n"; !strings.Contains(p.err.String(), want) {
		t.Errorf("got log %s, want %s", p.err, want)
	}
	vault, tokens := c.asked()
	challenges := 0
	for _, r := range vault {
		if r.Challenge {
			challenges++
		}
	}
	if len(vault) > 3 || challenges != 1 || len(tokens) != 1 {
		t.Errorf("start: got %d requests to the vault, %d challenges and %d for tokens, want at most 3, 1 and 1:%s", len(vault), challenges, len(tokens), lines(c.Journal()))
	}

	api, ctx := p.as("console-api"), callContext(t)
	within := func(what string, most int, call func() error) {
		t.Helper()
		c.ResetJournal()
		if err := call(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if vault, tokens := c.asked(); len(vault) > most || len(tokens) > 0 {
			t.Errorf("%s: got %d requests to the vault, want at most %d:%s", what, len(vault), most, lines(c.Journal()))
		}
	}
	put := func(value string) func() error {
		return func() error {
			_, err := api.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", oidcKind), Value: value, RequestId: uuid.NewString()})
			return err
		}
	}
	get := func() error {
		_, err := api.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", oidcKind), MaxStaleness: durationpb.New(0)})
		return err
	}
	within("put over nothing", 2, put("one"))
	within("put over a version of ours", 2, put("two"))
	within("get", 1, get)
	p.kill()
	p = c.start()
	api = p.as("console-api")
	within("get by another process", 1, get)
	within("put by another process", 2, put("three"))
	if refused := c.Refused(); len(refused) > 0 {
		t.Errorf("the broker asked for hosts that are none of the vault's: %v", refused)
	}
}

// TestKeyVaultCredentials has the broker find out who it is in each of the ways
// that need no cloud around it.
func TestKeyVaultCredentials(t *testing.T) {
	t.Parallel()
	dir := devFolder(t)
	for name, test := range map[string]struct {
		env  func(*testing.T, *cloud) []string
		want keyvaultfake.Op
	}{
		"client secret": {func(_ *testing.T, c *cloud) []string { return c.Broker().Env() }, keyvaultfake.OpToken},
		"workload identity": {func(t *testing.T, c *cloud) []string {
			file := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(file, []byte(c.Broker().FederatedToken), 0o600); err != nil {
				t.Fatal(err)
			}
			return []string{
				"AZURE_TENANT_ID=" + c.Broker().TenantID, "AZURE_CLIENT_ID=" + c.Broker().ClientID,
				"AZURE_AUTHORITY_HOST=https://login.microsoftonline.com/", "AZURE_FEDERATED_TOKEN_FILE=" + file,
			}
		}, keyvaultfake.OpToken},
		"managed identity": {func(_ *testing.T, c *cloud) []string { return c.IdentityEnv() }, keyvaultfake.OpIdentity},
		"managed identity with a client id": {func(_ *testing.T, c *cloud) []string {
			return append(c.IdentityEnv(), "AZURE_CLIENT_ID="+c.Broker().ClientID)
		}, keyvaultfake.OpIdentity},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCloud(t, dir, keyvaultfake.Config{})
			c.set(test.env(t, c))
			p := c.start()
			api, ctx := p.as("console-api"), callContext(t)
			must2(api.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", oidcKind), Value: "abc"}))(t)
			if out := must2(api.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", oidcKind), MaxStaleness: durationpb.New(0)}))(t); out.GetValue() != "abc" {
				t.Errorf("got %v without the value", out.GetMetadata())
			}
			vault, tokens := c.asked()
			if len(tokens) != 1 || tokens[0].Op != test.want || tokens[0].Status != http.StatusOK {
				t.Errorf("got %v, want one %s", lines(tokens), test.want)
			}
			for _, r := range vault {
				if r.Principal != c.Broker().ClientID && !r.Challenge {
					t.Errorf("got %s %s by %q, want the broker", r.Op, r.Path, r.Principal)
				}
			}
		})
	}
}

// TestKeyVaultStartEndsWithOneLine: what no waiting mends ends the start.
func TestKeyVaultStartEndsWithOneLine(t *testing.T) {
	t.Parallel()
	dir := devFolder(t)
	for name, test := range map[string]struct {
		before  func(*cloud)
		changes []string
		want    []string
	}{
		"no URL":          {changes: []string{"AZURE_KEY_VAULT_URL", ""}, want: []string{"AZURE_KEY_VAULT_URL", "https://NAME.vault.azure.net/"}},
		"no URL at all":   {changes: []string{"AZURE_KEY_VAULT_URL", "exto-test"}, want: []string{"AZURE_KEY_VAULT_URL", "https://NAME.vault.azure.net/"}},
		"no https":        {changes: []string{"AZURE_KEY_VAULT_URL", "http://exto-test.vault.azure.net/"}, want: []string{"AZURE_KEY_VAULT_URL", "https://"}},
		"with a path":     {changes: []string{"AZURE_KEY_VAULT_URL", "https://exto-test.vault.azure.net/secrets/"}, want: []string{"AZURE_KEY_VAULT_URL", "path"}},
		"another port":    {changes: []string{"AZURE_KEY_VAULT_URL", "https://exto-test.vault.azure.net:8443/"}, want: []string{"AZURE_KEY_VAULT_URL"}},
		"not a vault":     {changes: []string{"AZURE_KEY_VAULT_URL", "https://example.com/"}, want: []string{"AZURE_KEY_VAULT_URL", "https://NAME.vault.azure.net/"}},
		"a managed HSM":   {changes: []string{"AZURE_KEY_VAULT_URL", "https://exto-test.managedhsm.azure.net/"}, want: []string{"AZURE_KEY_VAULT_URL", "managed HSM"}},
		"another vault":   {changes: []string{"AZURE_KEY_VAULT_URL", "https://another.vault.azure.net/"}, want: []string{"AZURE_KEY_VAULT_URL", "HTTPS_PROXY", "403"}},
		"no permission":   {before: func(c *cloud) { c.Revoke(c.Broker()) }, want: []string{"exto-test", "az role assignment create"}},
		"may not list":    {before: func(c *cloud) { c.Revoke(c.Broker(), keyvaultfake.OpList) }, want: []string{"exto-test", "az role assignment create"}},
		"no credential":   {changes: []string{"AZURE_TENANT_ID", "", "AZURE_CLIENT_ID", "", "AZURE_CLIENT_SECRET", "", "AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential"}, want: []string{"AZURE_CLIENT_SECRET", "az login"}},
		"wrong secret":    {changes: []string{"AZURE_CLIENT_SECRET", "wrong"}, want: []string{"AADSTS7000215", "AZURE_CLIENT_SECRET"}},
		"unknown client":  {changes: []string{"AZURE_CLIENT_ID", uuid.NewString()}, want: []string{"AADSTS700016", "AZURE_CLIENT_ID"}},
		"unknown tenant":  {changes: []string{"AZURE_TENANT_ID", uuid.NewString()}, want: []string{"AZURE_TENANT_ID"}},
		"no reads":        {changes: []string{"BROKER_VAULT_READS_PER_SECOND", "0"}, want: []string{"BROKER_VAULT_READS_PER_SECOND", "320"}},
		"too many reads":  {changes: []string{"BROKER_VAULT_READS_PER_SECOND", "4001"}, want: []string{"BROKER_VAULT_READS_PER_SECOND", "320"}},
		"reads in words":  {changes: []string{"BROKER_VAULT_READS_PER_SECOND", "many"}, want: []string{"BROKER_VAULT_READS_PER_SECOND", "320"}},
		"reads no number": {changes: []string{"BROKER_VAULT_READS_PER_SECOND", "NaN"}, want: []string{"BROKER_VAULT_READS_PER_SECOND", "320"}},
		"negative writes": {changes: []string{"BROKER_VAULT_WRITES_PER_SECOND", "-1"}, want: []string{"BROKER_VAULT_WRITES_PER_SECOND", "24"}},
		"endless writes":  {changes: []string{"BROKER_VAULT_WRITES_PER_SECOND", "Inf"}, want: []string{"BROKER_VAULT_WRITES_PER_SECOND", "24"}},
		"writes in words": {changes: []string{"BROKER_VAULT_WRITES_PER_SECOND", "24/s"}, want: []string{"BROKER_VAULT_WRITES_PER_SECOND", "24"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := secretCloud(t, dir, keyvaultfake.Config{})
			if test.before != nil {
				test.before(c)
			}
			p := launch(t, dir, environ(c.env, test.changes...), binary, "serve")
			if p.err.await(listeningLine) != nil {
				t.Fatalf("the broker started: %s", p.err)
			}
			<-p.exited
			code, stdout, stderr := p.cmd.ProcessState.ExitCode(), p.out.String(), p.err.String()
			var said []string
			for line := range strings.Lines(stderr) {
				if !strings.HasPrefix(line, "time=") { // the log
					said = append(said, line)
				}
			}
			if code != 1 || len(said) != 1 || !strings.HasPrefix(said[0], "broker: ") || stdout != "" {
				t.Fatalf("got exit code %d, standard output %q and standard error %q, want 1 and one line", code, stdout, stderr)
			}
			for _, want := range test.want {
				if !strings.Contains(said[0], want) {
					t.Errorf("got %q, want it to name %s", said[0], want)
				}
			}
			if strings.Contains(stderr, c.Broker().ClientSecret) {
				t.Error("the client secret stands on standard error")
			}
		})
	}
}

var usableAgain = regexp.MustCompile(`msg="the vault can be used again"`)

// TestKeyVaultOutAtStart: the broker starts without a vault, says that it is not
// ready, and becomes so by itself.
func TestKeyVaultOutAtStart(t *testing.T) {
	t.Parallel()
	dir := devFolder(t)
	for name, test := range map[string]struct {
		down    func(*cloud, bool)
		changes []string
	}{
		"the vault":                {down: func(c *cloud, down bool) { c.SetDown(down) }},
		"the token service":        {down: func(c *cloud, down bool) { c.SetTokenServiceDown(down) }},
		"the vault is throttled":   {down: func(c *cloud, down bool) { c.answer(down, http.StatusTooManyRequests) }},
		"the vault answers errors": {down: func(c *cloud, down bool) { c.answer(down, http.StatusServiceUnavailable) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := secretCloud(t, dir, keyvaultfake.Config{})
			test.down(c, true)
			p := c.start()
			if want := `level=INFO msg="secret store: azure key vault" vault=` + c.URL(); !strings.Contains(p.err.String(), want) {
				t.Errorf("got log %s, want %s", p.err, want)
			}
			healthcheck := func(args ...string) int {
				code, _, _ := runBroker(t, dir, []string{"BROKER_METRICS_ADDRESS=" + p.metrics}, append([]string{"healthcheck"}, args...)...)
				return code
			}
			if ready, live := healthcheck(), healthcheck("--live"); ready != 1 || live != 0 {
				t.Errorf("without a vault: got healthcheck %d and --live %d, want 1 and 0", ready, live)
			}
			short, cancel := context.WithTimeout(callContext(t), 3*time.Second)
			defer cancel()
			_, err := p.as("console-api").PutSecret(short, &secretsv1.PutSecretRequest{Ref: ref("demo", oidcKind), Value: "lost"})
			// The client's own clock may be the first to say so.
			if reason, commit := told(err); commit != "NOT_APPLIED" && (reason != "" || status.Code(err) != codes.DeadlineExceeded) {
				t.Errorf("Put without a vault: got %v, want NOT_APPLIED", err)
			}
			test.down(c, false)
			if p.err.await(usableAgain) == nil {
				t.Fatalf("the broker ended: %s", p.err)
			}
			if ready := healthcheck(); ready != 0 {
				t.Errorf("with the vault: got healthcheck %d, want 0", ready)
			}
			api, ctx := p.as("console-api"), callContext(t)
			must2(api.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", oidcKind), Value: "abc", RequestId: uuid.NewString()}))(t)
			if out := must2(api.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", oidcKind), MaxStaleness: durationpb.New(0)}))(t); out.GetValue() != "abc" || out.GetMetadata().GetGeneration() != 1 {
				t.Errorf("got %v, want the value as generation 1", out.GetMetadata())
			}
		})
	}
}

// answer has the requests to the vault answered with an error; or no more.
func (c *cloud) answer(so bool, code int) {
	if !so {
		c.OnRequest(nil)
		return
	}
	c.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op == keyvaultfake.OpToken || r.Op == keyvaultfake.OpDiscovery || r.Challenge {
			return keyvaultfake.Fault{}
		}
		return keyvaultfake.Fault{Status: code}
	})
}

// changes reports whether a request may change the vault.
func changes(op keyvaultfake.Op) bool {
	switch op {
	case keyvaultfake.OpSet, keyvaultfake.OpUpdate, keyvaultfake.OpDelete, keyvaultfake.OpRecover:
		return true
	}
	return false
}

// written is a write of a tenant, and what became of it.
type written struct {
	request *secretsv1.PutSecretRequest
	outcome string // a commit state; empty while it is under way
}

// tenant is an instance with one writer and one reader.
type tenant struct {
	t  *testing.T
	id string

	mu     sync.Mutex
	writes []*written // number n has the value ID-n
	acked  int        // number of the last that was applied
}

func (n *tenant) ref() *secretsv1.SecretRef { return ref(n.id, oidcKind) }

// put makes the next write, or an earlier one again.
func (n *tenant) put(ctx context.Context, api secretsv1.SecretsBrokerServiceClient, again *written) error {
	w := again
	n.mu.Lock()
	if w == nil {
		w = &written{request: &secretsv1.PutSecretRequest{Ref: n.ref(), Value: fmt.Sprintf("%s-%d", n.id, len(n.writes)), RequestId: uuid.NewString()}}
		n.writes = append(n.writes, w)
	}
	w.outcome = ""
	n.mu.Unlock()
	_, err := api.PutSecret(ctx, w.request)
	reason, commit := told(err)
	switch {
	case err == nil:
		commit = "APPLIED"
	case reason == "":
		commit = "UNKNOWN" // by the client's own stack
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	w.outcome = commit
	if commit == "APPLIED" {
		n.acked = slices.Index(n.writes, w)
	}
	if !slices.Contains([]string{"APPLIED", "NOT_APPLIED", "UNKNOWN"}, commit) {
		n.t.Errorf("got commit state %q with %v", commit, err)
	}
	return err
}

// get reads once, without a bound from memory too. It gives the number of the write
// whose value it was, and where it came from; seen is that of the read before.
func (n *tenant) get(ctx context.Context, api secretsv1.SecretsBrokerServiceClient, bound *durationpb.Duration, seen int) (int, secretsv1.FreshnessSource, error) {
	n.mu.Lock()
	acked := n.acked
	n.mu.Unlock()
	out, err := api.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: n.ref(), MaxStaleness: bound})
	if err != nil {
		return seen, 0, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	got := slices.IndexFunc(n.writes, func(w *written) bool { return w.request.Value == out.GetValue() })
	switch {
	case got < acked:
		n.t.Errorf("%s: got write %d, but %d was acknowledged before the read began", n.id, got, acked)
	case got < seen:
		n.t.Errorf("%s: got write %d after %d", n.id, got, seen)
	case n.writes[got].outcome == "NOT_APPLIED":
		n.t.Errorf("%s: got write %d, which is said not to be applied", n.id, got)
	}
	return got, out.GetFreshness().GetSource(), nil
}

// TestKeyVaultOutages: whatever ails the vault or the token service, no read gives a
// wrong value, every failed write says truly what became of it, and all is well
// again without a restart.
func TestKeyVaultOutages(t *testing.T) {
	t.Parallel()
	const (
		tenants = 4 // each with a writer and a reader
		reads   = 80
		writes  = 40
	)
	c := secretCloud(t, devFolder(t), keyvaultfake.Config{})
	p := c.start("BROKER_VAULT_READS_PER_SECOND", fmt.Sprint(reads), "BROKER_VAULT_WRITES_PER_SECOND", fmt.Sprint(writes))
	api := p.as("console-api")
	var all []*tenant
	for i := range tenants {
		n := &tenant{t: t, id: fmt.Sprint("tenant-", i)}
		if err := n.put(callContext(t), api, nil); err != nil {
			t.Fatal(err)
		}
		all = append(all, n)
	}
	codesOf := map[string]codes.Code{
		"STALENESS_UNSATISFIABLE": codes.Unavailable, // what a read that wants no older answer is told of an outage
		"VAULT_UNAVAILABLE":       codes.Unavailable, "VAULT_THROTTLED": codes.Unavailable, "VAULT_REFUSED": codes.Unavailable,
		"DEADLINE_EXCEEDED": codes.DeadlineExceeded, "": codes.DeadlineExceeded, // the last by the client itself
	}
	set := func(on func(), off func()) func(bool) {
		return func(ill bool) {
			if ill {
				on()
			} else {
				off()
			}
		}
	}
	nothing := func() {}
	slow := []string{"DEADLINE_EXCEEDED", ""} // may come of any of them
	for _, phase := range []struct {
		name    string
		calls   int // of each writer and reader
		ill     func(bool)
		reads   []string // what reads may fail with, beside slow
		writes  []string
		allFail bool // or else all reads succeed
	}{
		{"nothing", 25, set(nothing, nothing), nil, nil, false},
		{"lost answers", 5, set(c.lose, func() { c.OnRequest(nil) }), nil, nil, false},
		{"the vault vanishes", 2, set(c.vanish, func() { c.OnRequest(nil) }), []string{"VAULT_UNAVAILABLE", "STALENESS_UNSATISFIABLE"}, []string{"VAULT_UNAVAILABLE"}, false},
		{"the vault is down", 5, c.SetDown, []string{"VAULT_UNAVAILABLE", "VAULT_THROTTLED", "STALENESS_UNSATISFIABLE"}, []string{"VAULT_UNAVAILABLE", "VAULT_THROTTLED"}, true},
		{"tokens revoked", 5, set(c.RevokeTokens, nothing), nil, nil, false},
		{"tokens expired", 5, set(c.ExpireTokens, nothing), nil, nil, false},
		{"no rights", 5, set(func() { c.Revoke(c.Broker()) }, func() { c.Grant(c.Broker()) }), []string{"VAULT_REFUSED"}, []string{"VAULT_REFUSED"}, true},
		{"read only", 5, c.SetReadOnly, nil, []string{"VAULT_UNAVAILABLE"}, false},
		{"errors", 3, set(func() { c.answer(true, http.StatusServiceUnavailable) }, func() { c.answer(false, 0) }), []string{"VAULT_UNAVAILABLE", "STALENESS_UNSATISFIABLE"}, []string{"VAULT_UNAVAILABLE"}, true},
		{"throttled", 2, set(func() { c.burst(40) }, func() { c.OnRequest(nil) }), []string{"VAULT_THROTTLED", "STALENESS_UNSATISFIABLE"}, []string{"VAULT_THROTTLED"}, false},
		{"the token service is down", 2, set(func() { c.SetTokenServiceDown(true); c.ExpireTokens() }, func() { c.SetTokenServiceDown(false) }), []string{"VAULT_UNAVAILABLE", "STALENESS_UNSATISFIABLE"}, []string{"VAULT_UNAVAILABLE"}, true},
	} {
		judge := func(what string, err error, may []string) {
			reason, _ := told(err)
			if err != nil && (status.Code(err) != codesOf[reason] || !slices.Contains(append(may, slow...), reason)) {
				t.Errorf("%s: %s: got %v, want one of %v", phase.name, what, err, may)
			}
			if err == nil && phase.allFail {
				t.Errorf("%s: %s: got success", phase.name, what)
			}
		}
		phase.ill(true)
		var workers sync.WaitGroup
		for _, n := range all {
			within := func(f func(context.Context)) {
				ctx, cancel := context.WithTimeout(callContext(t), time.Second)
				defer cancel()
				f(ctx)
			}
			workers.Go(func() {
				for range phase.calls {
					within(func(ctx context.Context) {
						judge("put", n.put(ctx, api, nil), phase.writes)
					})
				}
			})
			workers.Go(func() {
				seen := 0
				for range phase.calls {
					within(func(ctx context.Context) {
						var err error
						seen, _, err = n.get(ctx, api, durationpb.New(0), seen)
						judge("get", err, phase.reads)
					})
					// Without a bound memory goes on, but for what the vault refuses.
					within(func(ctx context.Context) {
						var source secretsv1.FreshnessSource
						var err error
						if seen, source, err = n.get(ctx, api, nil, seen); err != nil {
							judge("get from memory too", err, phase.reads)
						} else if unreachable := slices.Contains(phase.reads, "STALENESS_UNSATISFIABLE"); source == stale && !unreachable {
							t.Errorf("%s: got a stale answer from a vault that can be reached", phase.name)
						}
					})
				}
			})
		}
		workers.Wait()
		phase.ill(false)
		// Each tenant ends what it does not know, as the contract tells it to, and then
		// writes and reads.
		for _, n := range all {
			workers.Go(func() {
				ctx := callContext(t)
				n.mu.Lock()
				unknown := (*written)(nil) // the last one, if nothing was acknowledged since
				for _, w := range n.writes[n.acked:] {
					if w.outcome == "UNKNOWN" {
						unknown = w
					}
				}
				n.mu.Unlock()
				for _, again := range []*written{unknown, nil} {
					for err := n.put(ctx, api, again); err != nil; err = n.put(ctx, api, again) {
						if ctx.Err() != nil {
							t.Errorf("%s: no recovery: %v", phase.name, err)
							return
						}
						// Not more often than a process can be started.
						runBroker(t, c.dir, []string{"BROKER_METRICS_ADDRESS=" + p.metrics}, "healthcheck")
					}
				}
				if _, _, err := n.get(ctx, api, durationpb.New(0), 0); err != nil {
					t.Errorf("%s: a read after the recovery: %v", phase.name, err)
				}
			})
		}
		workers.Wait()
	}
	for _, n := range all {
		for _, v := range c.Versions("instance-" + n.id + "-oidc-secret") {
			for i, w := range n.writes {
				if w.request.Value == v.Value && w.outcome == "NOT_APPLIED" {
					t.Errorf("%s: write %d is in the vault, and was said not to be applied", n.id, i)
				}
			}
		}
	}
	var at [2][]time.Time // of reads and writes
	for _, r := range c.Journal() {
		switch r.Op {
		case keyvaultfake.OpToken, keyvaultfake.OpDiscovery:
		default:
			if changes(r.Op) {
				at[1] = append(at[1], r.At)
			} else {
				at[0] = append(at[0], r.At)
			}
		}
	}
	// In any second, and as if it were two: arrivals are not as even as what was sent.
	for kind, rate := range []int{reads, writes} {
		most := rate/4 + 2*rate
		for i, first := range at[kind] {
			if i+most < len(at[kind]) && at[kind][i+most].Sub(first) < time.Second {
				t.Fatalf("got over %d requests in a second, of the kind that may be sent %d times", most, rate)
			}
		}
	}
}

// lose has the answers of some requests lost, and some requests.
func (c *cloud) lose() {
	c.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		switch {
		case r.Op == keyvaultfake.OpSet && r.Seq%3 == 0:
			return keyvaultfake.Fault{CutAfter: true}
		case r.Op == keyvaultfake.OpSet && r.Seq%3 == 1, r.Op == keyvaultfake.OpGet && r.Seq%5 == 0:
			return keyvaultfake.Fault{Cut: true}
		}
		return keyvaultfake.Fault{}
	})
}

// vanish has nothing of a secret reachable any more once it was written to; of the
// writes themselves every other one is done.
func (c *cloud) vanish() {
	var (
		mu   sync.Mutex
		gone = map[string]bool{}
	)
	c.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		mu.Lock()
		defer mu.Unlock()
		if gone[r.Name] {
			return keyvaultfake.Fault{Cut: true}
		}
		if gone[r.Name] = r.Op == keyvaultfake.OpSet; gone[r.Name] {
			return keyvaultfake.Fault{CutAfter: len(gone)%2 == 0, Cut: len(gone)%2 == 1}
		}
		return keyvaultfake.Fault{}
	})
}

// burst has the next requests to the vault refused as too many.
func (c *cloud) burst(n int64) {
	var refused atomic.Int64
	c.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op == keyvaultfake.OpToken || r.Op == keyvaultfake.OpDiscovery || refused.Add(1) > n {
			return keyvaultfake.Fault{}
		}
		return keyvaultfake.Fault{Status: http.StatusTooManyRequests}
	})
}
