package keyvault_test

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"

	"github.com/exto/secrets-broker/server/vault/keyvault"
)

// aToken is a credential that always has one.
type aToken struct{}

func (aToken) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: "token", ExpiresOn: time.Now().Add(time.Hour)}, nil
}

// openOn is a vault whose answers to all but the start are the test's own: those
// that no vault gives.
func openOn(t *testing.T, answer http.HandlerFunc) *keyvault.Vault {
	t.Helper()
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Authorization") == "":
			w.Header().Set("WWW-Authenticate", `Bearer authorization="https://login.microsoftonline.com/tenant", resource="https://vault.azure.net"`)
			w.WriteHeader(http.StatusUnauthorized)
		case strings.HasPrefix(r.URL.Path, "/secrets/"+keyvault.Probed):
			http.NotFound(w, r)
		case r.URL.Path == "/secrets" && r.URL.Query().Get("maxresults") == "1" && !r.URL.Query().Has("$skiptoken"):
			_, _ = w.Write([]byte(`{"value":[]}`))
		default:
			answer(w, r)
		}
	}))
	t.Cleanup(server.Close)
	var d net.Dialer
	return open(t, keyvault.Config{
		URL:        "https://exto-test.vault.azure.net/",
		Logger:     quiet,
		Credential: func() (azcore.TokenCredential, error) { return aToken{}, nil },
		Wait:       newClock().wait,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				if address != "exto-test.vault.azure.net:443" {
					t.Errorf("got a connection to %s, want none but to the vault", address)
				}
				return d.DialContext(ctx, network, server.Listener.Addr().String())
			},
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // its certificate is for another host
		},
	})
}
