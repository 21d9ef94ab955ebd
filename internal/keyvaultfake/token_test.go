package keyvaultfake_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

// tokenRequest is what the SDK asks a credential for.
var tokenRequest = policy.TokenRequestOptions{Scopes: []string{"https://vault.azure.net/.default"}}

func responseHeader(err error, name string) string {
	var refused *azcore.ResponseError
	if !errors.As(err, &refused) {
		return "no answer"
	}
	return refused.RawResponse.Header.Get(name)
}

// throughProxy is how another process reaches the fake.
func throughProxy(t *testing.T, f *keyvaultfake.Fake) *http.Client {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(f.CAPEM()) {
		t.Fatal("CAPEM: no certificate")
	}
	proxy, err := url.Parse(f.ProxyURL())
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{Proxy: http.ProxyURL(proxy), TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func TestRights(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{Transitions: &keyvaultfake.Transitions{}})
	c := connect(t, f, secretOf(t, f, f.Broker()), once)
	all := []string{"set", "get", "update", "versions", "list", "delete", "deleted", "list deleted", "recover"}
	for _, what := range all {
		if got := call(t, c, what, "name"); !strings.HasPrefix(got, "ok") {
			t.Errorf("%s: got %s, want ok", what, got)
		}
	}
	expect(t, "purge", call(t, c, "purge", "name"), "403 ForbiddenByRbac")

	f.Revoke(f.Broker(), keyvaultfake.OpGet)
	expect(t, "get", call(t, c, "get", "name"), "403 ForbiddenByRbac")
	expect(t, "set", call(t, c, "set", "name"), "ok")
	expect(t, "get of another principal", call(t, person(t, f), "get", "name"), "ok")
	f.Revoke(f.Broker())
	for _, what := range all {
		if got := call(t, c, what, "name"); !strings.HasPrefix(got, "403 ForbiddenByRbac") {
			t.Errorf("%s: got %s, want 403 ForbiddenByRbac", what, got)
		}
	}
	f.Grant(f.Broker(), keyvaultfake.OpGet, keyvaultfake.OpPurge)
	expect(t, "get", call(t, c, "get", "name"), "ok")
	expect(t, "purge", call(t, c, "purge", "name"), "404 SecretNotFound")
}

func TestTokens(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	f.PersonSet("name", "v", nil)
	c := connect(t, f, secretOf(t, f, f.Broker()), once)
	expect(t, "get", call(t, c, "get", "name"), "ok")
	for what, end := range map[string]func(){
		"revoked": f.RevokeTokens,
		"too old": func() { f.Advance(time.Hour) },
	} {
		f.ResetJournal()
		end()
		expect(t, what, call(t, c, "get", "name"), "ok")
		if got, want := ops(f), []string{"Get 401", "Token 200", "Get 200"}; !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
	}

	f.ExpireTokens()
	_, err := c.GetSecret(t.Context(), "name", "", nil)
	if got := responseHeader(err, "WWW-Authenticate"); !strings.Contains(got, `error="invalid_token"`) {
		t.Errorf("expired: got %v with challenge %s, want invalid_token", err, got)
	}
	expect(t, "with a new credential", call(t, connect(t, f, secretOf(t, f, f.Broker()), once), "get", "name"), "ok")
}

func TestWorkloadIdentity(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	f.PersonSet("name", "v", nil)
	p := f.Broker()
	for token, want := range map[string]string{p.FederatedToken: "ok", "forged": "AADSTS700213"} {
		file := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		credential, err := azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
			ClientOptions: options(t, f, once), ClientID: p.ClientID, TenantID: p.TenantID, TokenFilePath: file})
		if err != nil {
			t.Fatal(err)
		}
		_, err = connect(t, f, credential, once).GetSecret(t.Context(), "name", "", nil)
		if got := result(err); got != want && !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestRefusedCredentials(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	good := f.Broker()
	for want, change := range map[string]func(p *keyvaultfake.Principal){
		"AADSTS7000215": func(p *keyvaultfake.Principal) { p.ClientSecret = "wrong" },
		"AADSTS700016":  func(p *keyvaultfake.Principal) { p.ClientID = "wrong" },
		"AADSTS90002":   func(p *keyvaultfake.Principal) { p.TenantID = "wrong" },
	} {
		p := good
		change(&p)
		credential, err := azidentity.NewClientSecretCredential(p.TenantID, p.ClientID, p.ClientSecret, &azidentity.ClientSecretCredentialOptions{
			ClientOptions: options(t, f, once), AdditionallyAllowedTenants: []string{"*"}})
		if err != nil {
			t.Fatal(err)
		}
		if p.TenantID == good.TenantID {
			_, err = connect(t, f, credential, once).GetSecret(t.Context(), "name", "", nil)
		} else { // with the vault's challenge the SDK would ask the right tenant
			_, err = credential.GetToken(t.Context(), tokenRequest)
		}
		var failed *azidentity.AuthenticationFailedError
		if !errors.As(err, &failed) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an authentication failure with %s", err, want)
		}
	}

	on(f, keyvaultfake.OpToken, 1, keyvaultfake.Fault{Status: 503})
	_, err := secretOf(t, f, good).GetToken(t.Context(), tokenRequest)
	if err == nil || !strings.Contains(err.Error(), "temporarily_unavailable") {
		t.Errorf("injected: got %v, want temporarily_unavailable", err)
	}
}

// TestEnvironment is not parallel: it is about the environment of the process.
func TestEnvironment(t *testing.T) {
	f := start(t, keyvaultfake.Config{})
	f.PersonSet("name", "v", nil)
	for _, variable := range append(f.Broker().Env(), f.IdentityEnv()...) {
		name, value, _ := strings.Cut(variable, "=")
		t.Setenv(name, value)
	}
	environment, err := azidentity.NewEnvironmentCredential(&azidentity.EnvironmentCredentialOptions{ClientOptions: options(t, f, once)})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "environment", call(t, connect(t, f, environment, once), "get", "name"), "ok")

	f.ResetJournal()
	// The id keeps this token apart from others in the cache of the process.
	identity, err := azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{
		ClientOptions: options(t, f, once), ID: azidentity.ClientID(f.Broker().ClientID)})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "identity", call(t, connect(t, f, identity, once), "get", "name"), "ok")
	if got, want := ops(f), []string{"Get 401", "Identity 200", "Get 200"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	expect(t, "principal", f.Journal()[2].Principal, f.Broker().ClientID)
	if got := f.Refused(); len(got) != 0 {
		t.Errorf("refused: got %v, want none", got)
	}
	if got, want := f.Env(), []string{"HTTPS_PROXY=" + f.ProxyURL(), "AZURE_KEY_VAULT_URL=https://exto-test.vault.azure.net/", "SECRET_STORE_PROVIDER=azure-keyvault"}; !slices.Equal(got, want) {
		t.Errorf("Env: got %v, want %v", got, want)
	}
}
