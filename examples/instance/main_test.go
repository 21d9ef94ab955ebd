package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/client/brokertest"
	"github.com/exto/secrets-broker/secret"
)

// TestRefused: one call finds out by itself that there is another token, though
// nothing told the instance.
func TestRefused(t *testing.T) {
	t.Parallel()
	b := brokertest.New(t)
	api := b.Client("console-api")
	key := brokertest.MustKey(t, "demo", secret.RegistrationToken)
	first := brokertest.MustRotate(t, api, key, client.RotateOptions{AllowMissing: true})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := secret.NewValue(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
		result, err := api.Verify(r.Context(), key.InstanceID(), token)
		switch {
		case err != nil:
			w.WriteHeader(http.StatusServiceUnavailable)
		case !result.OK():
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	t.Cleanup(server.Close)
	b.Deny("instance/{instance_id}", "watch")
	token, err := client.NewSource(t.Context(), b.Instance("demo"), key, client.SourceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c := &console{address: server.URL, token: token, http: server.Client()}
	want := func(when string, calls, refused, failed int) {
		t.Helper()
		c.call(t.Context())
		if c.calls != calls || c.refused != refused || c.failed != failed {
			t.Errorf("%s: got %d calls, %d refused, %d failed, want %d, %d, %d", when, c.calls, c.refused, c.failed, calls, refused, failed)
		}
	}
	want("at first", 1, 0, 0)
	second := brokertest.MustRotate(t, api, key, client.RotateOptions{})
	want("after a rotation", 3, 1, 0)
	if got := token.Value(); got.Version != second.Version || got.Version == first.Version {
		t.Errorf("got version %s, want %s", got.Version, second.Version)
	}
	brokertest.MustDelete(t, api, key)
	want("without a token", 4, 2, 0)
	server.Close()
	want("without a Console", 5, 2, 1)
}
