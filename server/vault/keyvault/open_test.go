package keyvault_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/keyvault"
)

// wantNoStart opens a vault that cannot be opened: the error is one line with all
// of the words, and without the principal's secret.
func wantNoStart(t *testing.T, cfg keyvault.Config, p keyvaultfake.Principal, words ...string) {
	t.Helper()
	v, err := keyvault.Open(t.Context(), cfg)
	if err == nil {
		_ = v.Close()
		t.Fatal("got a vault, want an error")
	}
	if strings.ContainsAny(err.Error(), "\n\r") {
		t.Errorf("got several lines: %q", err)
	}
	if p.ClientSecret != "" && strings.Contains(err.Error(), p.ClientSecret) {
		t.Errorf("got the client secret in %q", err)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("got %q, want %q in it", err, word)
		}
	}
}

// wantNotReady opens a vault that cannot be used now.
func wantNotReady(t *testing.T, cfg keyvault.Config) *keyvault.Vault {
	t.Helper()
	v := open(t, cfg)
	if err := v.Check(t.Context()); err == nil {
		t.Error("Check: got nil, want an error")
	}
	return v
}

func TestBadURL(t *testing.T) {
	t.Parallel()
	const set = "set it to https://NAME.vault.azure.net/"
	for name, tt := range map[string]struct{ url, word string }{
		"empty":           {"", "not the URL"},
		"no URL":          {"exto-test", "not the URL"},
		"no scheme":       {"exto-test.vault.azure.net", "not the URL"},
		"control":         {"https://exto-test.vault.azure.net/\x00", "not the URL"},
		"http":            {"http://exto-test.vault.azure.net/", "https://"},
		"other host":      {"https://example.com/", "host"},
		"no vault":        {"https://vault.azure.net/", "host"},
		"address":         {"https://127.0.0.1/", "host"},
		"blob store":      {"https://exto-test.blob.core.windows.net/", "host"},
		"short name":      {"https://ab.vault.azure.net/", "host"},
		"name with a dot": {"https://a.b.vault.azure.net/", "host"},
		"path":            {"https://exto-test.vault.azure.net/secrets/x", "path"},
		"query":           {"https://exto-test.vault.azure.net/?a=b", "query"},
		"user":            {"https://me:hunter2@exto-test.vault.azure.net/", "user"},
		"port":            {"https://exto-test.vault.azure.net:8443/", "host"},
		"managed HSM":     {"https://exto-test.managedhsm.azure.net/", "managed HSM"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := keyvault.Config{URL: tt.url, Logger: quiet, Credential: func() (azcore.TokenCredential, error) {
				return nil, errors.New("asked for a credential")
			}}
			wantNoStart(t, cfg, keyvaultfake.Principal{ClientSecret: "hunter2"}, set, tt.word)
		})
	}
}

func TestGoodURL(t *testing.T) {
	t.Parallel()
	refused := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}}
	for given, want := range map[string]string{
		"https://exto-test.vault.azure.net/":        "https://exto-test.vault.azure.net/",
		"https://exto-test.vault.azure.net":         "https://exto-test.vault.azure.net/",
		"https://exto-test.vault.azure.net:443/":    "https://exto-test.vault.azure.net/",
		"https://EXTO-test.Vault.azure.net/":        "https://exto-test.vault.azure.net/",
		"https://exto-test.vault.azure.cn/":         "https://exto-test.vault.azure.cn/",
		"https://exto-test.vault.usgovcloudapi.net": "https://exto-test.vault.usgovcloudapi.net/",
	} {
		t.Run(given, func(t *testing.T) {
			t.Parallel()
			v := wantNotReady(t, keyvault.Config{URL: given, Logger: quiet, Transport: refused, Credential: none})
			info := v.Info()
			if got := info.Location.Value.String(); got != want || info.Location.Key != "vault" || info.Name != "azure key vault" {
				t.Errorf("got %q at %v, want azure key vault at vault=%s", info.Name, info.Location, want)
			}
		})
	}
}

// none is a chain of credentials none of which has what it takes.
func none() (azcore.TokenCredential, error) { return noCredential{}, nil }

type noCredential struct{}

func (noCredential) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{}, azidentity.NewCredentialUnavailableError("DefaultAzureCredential: failed to acquire a token.\nAttempted credentials:\n\tEnvironmentCredential: missing environment variable AZURE_TENANT_ID")
}

func TestNoPermission(t *testing.T) {
	t.Parallel()
	for _, op := range []keyvaultfake.Op{keyvaultfake.OpGet, keyvaultfake.OpList} {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			f, c := start(t, atOnce())
			f.Revoke(f.Broker(), op)
			wantNoStart(t, config(f, c, f.Broker()), f.Broker(), "az role assignment create", "Key Vault Secrets Officer", "exto-test", "ForbiddenByRbac")
		})
	}
}

func TestFirewall(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	on(f, keyvaultfake.OpGet, always, keyvaultfake.Fault{Status: 403, Inner: "ForbiddenByFirewall"})
	wantNoStart(t, config(f, c, f.Broker()), f.Broker(), "az keyvault network-rule add")
}

func TestNoSuchVault(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	cfg := config(f, c, f.Broker())
	cfg.Transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "exto-test.vault.azure.net", IsNotFound: true}}
	}
	wantNoStart(t, cfg, f.Broker(), "there is no vault at https://exto-test.vault.azure.net/", "az keyvault list")
}

func TestNoCredential(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		credential func() (azcore.TokenCredential, error)
		want       []string
	}{
		"none of the chain": {none, []string{"az login", "AZURE_CLIENT_ID", "workload identity", "AZURE_T"}},
		"none at all": {func() (azcore.TokenCredential, error) {
			return (*azidentity.DefaultAzureCredential)(nil), errors.New("invalid AZURE_TOKEN_CREDENTIALS value\nValid values are others")
		}, []string{"unset AZURE_TOKEN_CREDENTIALS, or set it to prod"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, atOnce())
			cfg := config(f, c, f.Broker())
			cfg.Credential = test.credential
			wantNoStart(t, cfg, f.Broker(), test.want...)
		})
	}
}

func TestRefusedCredential(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change func(p *keyvaultfake.Principal)
		want   string
	}{
		"wrong secret":   {func(p *keyvaultfake.Principal) { p.ClientSecret = "wrong-secret" }, "AZURE_CLIENT_SECRET"},
		"no such client": {func(p *keyvaultfake.Principal) { p.ClientID = "00000000-0000-0000-0000-000000000000" }, "AZURE_CLIENT_ID"},
		"wrong tenant":   {func(p *keyvaultfake.Principal) { p.TenantID = "00000000-0000-0000-0000-000000000000" }, "set AZURE_TENANT_ID to the tenant of the vault"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, atOnce())
			p := f.Broker()
			test.change(&p)
			wantNoStart(t, config(f, c, p), p, test.want)
		})
	}
}

func TestProxyRefuses(t *testing.T) {
	t.Parallel()
	for status, starts := range map[int]bool{http.StatusForbidden: false, http.StatusProxyAuthRequired: false, http.StatusBadGateway: true, http.StatusServiceUnavailable: true} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			t.Parallel()
			proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
			t.Cleanup(proxy.Close)
			f, c := start(t, atOnce())
			cfg := config(f, c, f.Broker())
			cfg.Transport = proxied(f)
			cfg.Transport.Proxy = func(*http.Request) (*url.URL, error) { return url.Parse(proxy.URL) }
			if starts {
				wantNotReady(t, cfg)
			} else {
				wantNoStart(t, cfg, f.Broker(), "HTTPS_PROXY", http.StatusText(status))
			}
		})
	}
}

// TestNoVault: what answers is something else.
func TestNoVault(t *testing.T) {
	t.Parallel()
	challenge := func(c string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", c)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		words  []string // none: the vault may yet come
	}{
		"401 without a challenge":  {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) }, []string{"401"}},
		"another resource":         {challenge(`Bearer authorization="https://login.microsoftonline.com/tenant", resource="https://elsewhere.example"`), []string{"no vault", "elsewhere.example"}},
		"no resource":              {challenge(`Bearer realm="x"`), []string{"no vault"}},
		"authorization, no tenant": {challenge(`Bearer authorization="https://login.microsoftonline.com", resource="https://vault.azure.net"`), []string{"no vault"}},
		"404":                      {http.NotFound, []string{"no vault", "no token"}},
		"redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://elsewhere.example/", http.StatusFound)
		}, []string{"no vault", "302"}},
		"a page":          {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>please log in</html>")) }, nil},
		"an empty object": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("{}")) }, []string{"no vault", "no token"}},
		"500":             {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewTLSServer(tt.answer)
			t.Cleanup(server.Close)
			var d net.Dialer
			var asked []string
			cfg := keyvault.Config{URL: "https://exto-test.vault.azure.net/", Logger: quiet, Credential: none, Transport: &http.Transport{
				DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
					asked = append(asked, address)
					return d.DialContext(ctx, network, server.Listener.Addr().String())
				},
				TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // its certificate is for another host
				MaxConnsPerHost: 1,                                     // so that the dials come one after the other
			}}
			if tt.words == nil {
				_ = wantNotReady(t, cfg).Close()
			} else {
				wantNoStart(t, cfg, keyvaultfake.Principal{}, tt.words...)
			}
			if slices.ContainsFunc(asked, func(address string) bool { return address != "exto-test.vault.azure.net:443" }) {
				t.Errorf("got connections to %v, want none but to the vault", asked)
			}
		})
	}
}

// TestNotYet: what mends itself is waited for, and noticed. All of them wait at
// the same time.
func TestNotYet(t *testing.T) {
	t.Parallel()
	type outage struct {
		end func()
		v   *keyvault.Vault
		log *heard
	}
	outages := map[string]*outage{}
	for name, down := range map[string]func(f *keyvaultfake.Fake, down bool){
		"vault down":            (*keyvaultfake.Fake).SetDown,
		"vault answers 503":     failing(keyvaultfake.OpGet, 503),
		"vault throttled":       failing(keyvaultfake.OpGet, 429),
		"token service down":    (*keyvaultfake.Fake).SetTokenServiceDown,
		"token service 500":     failing(keyvaultfake.OpToken, 500),
		"token service 429":     failing(keyvaultfake.OpToken, 429),
		"token discovery fails": failing(keyvaultfake.OpDiscovery, 500),
	} {
		f, c := start(t, atOnce())
		cfg, log := config(f, c, f.Broker()), newHeard()
		cfg.Logger = log.logger()
		down(f, true)
		outages[name] = &outage{func() { down(f, false) }, wantNotReady(t, cfg), log}
	}
	for _, o := range outages {
		o.end()
	}
	for name, o := range outages {
		o.log.wait("the vault can be used again")
		if err := o.v.Check(t.Context()); err != nil {
			t.Errorf("%s: Check: got %v, want nil", name, err)
		}
		if _, err := o.v.List(t.Context(), "", 1); err != nil {
			t.Errorf("%s: List: got %v, want nil", name, err)
		}
	}
}

func failing(op keyvaultfake.Op, status int) func(*keyvaultfake.Fake, bool) {
	return func(f *keyvaultfake.Fake, down bool) {
		if down {
			on(f, op, always, keyvaultfake.Fault{Status: status})
		} else {
			f.OnRequest(nil)
		}
	}
}

// TestDownAndUpAgain: an outage while the broker runs.
func TestDownAndUpAgain(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	cfg := config(f, c, f.Broker())
	log := newHeard()
	cfg.Logger = log.logger()
	v := open(t, cfg)
	f.SetDown(true)
	_, _, err := v.Get(t.Context(), newKey(t), "")
	wantError(t, "Get", err, vault.ErrUnavailable)
	log.wait("the vault cannot be used")
	wantError(t, "Check", v.Check(t.Context()), vault.ErrUnavailable)
	f.SetDown(false)
	log.wait("the vault can be used again")
	if err := v.Check(t.Context()); err != nil {
		t.Errorf("Check: got %v, want nil", err)
	}
}

// TestThrottledIsNotDown: a vault that takes no more requests now is busy, and the
// broker stays ready.
func TestThrottledIsNotDown(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	cfg := config(f, c, f.Broker())
	log := newHeard()
	cfg.Logger = log.logger()
	v := open(t, cfg)
	probes := make(chan struct{}, 10)
	f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		switch {
		case r.Op == keyvaultfake.OpSet:
			return keyvaultfake.Fault{Status: 503}
		case r.Name == keyvault.Probed:
			probes <- struct{}{}
			return keyvaultfake.Fault{Status: 429}
		}
		return keyvaultfake.Fault{}
	})
	for range 2 { // the second probe is sent when the first one has been judged
		err := writes[0].do(t.Context(), v, newKey(t), "")
		if !errors.Is(err, vault.ErrUnavailable) {
			t.Fatalf("Set: got %v, want ErrUnavailable", err)
		}
		<-probes
	}
	if err := v.Check(t.Context()); err != nil {
		t.Errorf("Check: got %v, want nil", err)
	}
	if strings.Contains(log.String(), "the vault cannot be used") {
		t.Errorf("got %s, want nothing of an outage", log)
	}
	f.OnRequest(nil)
}
