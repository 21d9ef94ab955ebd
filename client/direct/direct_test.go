package direct_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	azlog "github.com/Azure/azure-sdk-for-go/sdk/azcore/log"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/client/direct"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
)

// noCanary checks that err tells nothing of a value, whoever prints it.
func noCanary(t *testing.T, what string, err error) {
	t.Helper()
	for ; err != nil; err = errors.Unwrap(err) {
		if text := fmt.Sprintf("%v %+v %#v", err, err, err); strings.Contains(text, canary) {
			t.Errorf("%s: got an error with a value in it: %s", what, text)
		}
	}
}

// hears is a credential that would give its token to any vault.
type hears struct{ asked atomic.Int64 }

func (h *hears) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	h.asked.Add(1)
	return azcore.AccessToken{Token: canary, ExpiresOn: time.Now().Add(time.Hour)}, nil
}

func TestURLs(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"", "http://acme.vault.azure.net/", "https://evil.example/", "https://acme.vault.azure.net.evil.example:8443/",
		"https://acme.vault.azure.net/secrets", "https://user@acme.vault.azure.net/", "https://acme.managedhsm.azure.net/"} {
		if _, err := direct.New(url, direct.Config{Credential: new(hears)}); err == nil || !strings.Contains(err.Error(), "https://NAME.vault.azure.net/") {
			t.Errorf("%q: got %v, want it refused with what is accepted", url, err)
		}
	}
}

// server answers as the vault acme, whatever the request.
func server(t *testing.T, handler http.HandlerFunc) (direct.Config, *hears) {
	t.Helper()
	s := httptest.NewTLSServer(handler)
	t.Cleanup(s.Close)
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	credential := new(hears)
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "example.com"}, // whom its certificate is for
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if address != "acme.vault.azure.net:443" && address != "acme.vault.evil.example:443" {
				t.Errorf("got a connection to %s, want none but to the vault", address)
			}
			return new(net.Dialer).DialContext(ctx, network, s.Listener.Addr().String())
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return direct.Config{Credential: credential, Transport: transport, Retry: policy.RetryOptions{RetryDelay: time.Millisecond}}, credential
}

const challenge = `Bearer authorization="https://login.microsoftonline.com/tenant", resource="https://vault.azure.net"`

// TestForgedHost: who calls itself a vault gets no token for a real one.
func TestForgedHost(t *testing.T) {
	t.Parallel()
	cfg, credential := server(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("it got a token")
		}
		w.Header().Set("WWW-Authenticate", challenge)
		w.WriteHeader(http.StatusUnauthorized)
	})
	v, err := direct.New("https://acme.vault.evil.example/", cfg)
	if err != nil {
		t.Fatal(err)
	}
	_, err = v.Get(t.Context(), keyOf(t, "instance-acme"), client.GetOptions{})
	wantReason(t, "Get", err, secret.VaultRefused)
	if got := credential.asked.Load(); got != 0 {
		t.Errorf("got %d questions for a token, want none", got)
	}
}

// TestAnswersOfNoVault: none of them is followed, believed or repeated, and none ends
// the process.
func TestAnswersOfNoVault(t *testing.T) {
	t.Parallel()
	body := func(code int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			_, _ = w.Write([]byte(text))
		}
	}
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		want   secret.Reason
		unread bool // and nothing of what the SDK says of it is told
	}{
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://elsewhere.example/", http.StatusTemporaryRedirect)
		}, secret.VaultUnavailable, false},
		"no JSON":         {body(200, canary), secret.VaultUnavailable, true},
		"another type":    {body(200, `{"value":["`+canary+`"]}`), secret.VaultUnavailable, true},
		"no attributes":   {body(200, `{"value":"`+canary+`"}`), secret.VaultUnavailable, true},
		"no value":        {body(200, `{"id":"https://acme.vault.azure.net/secrets/instance-acme/0123","attributes":{"created":1}}`), secret.VaultUnavailable, true},
		"no version":      {body(200, `{"value":"`+canary+`","id":"https://acme.vault.azure.net/secrets/instance-acme","attributes":{"created":1}}`), secret.VaultUnavailable, true},
		"an error's body": {body(400, `{"error":{"code":"`+canary+" "+canary+`","message":"`+canary+`"}}`), secret.VaultUnavailable, false},
		"no tenant": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer authorization="x", resource="https://vault.azure.net"`)
			w.WriteHeader(http.StatusUnauthorized)
		}, secret.VaultRefused, false},
		"a link that leads away": {func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.Header.Get("Authorization") == "":
				w.Header().Set("WWW-Authenticate", challenge)
				w.WriteHeader(http.StatusUnauthorized)
			case strings.HasSuffix(r.URL.Path, "/versions"):
				body(200, `{"value":[],"nextLink":"https://elsewhere.example/secrets"}`)(w, r)
			default:
				body(403, `{"error":{"code":"Forbidden","innererror":{"code":"SecretDisabled"}}}`)(w, r)
			}
		}, secret.VaultUnavailable, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg, _ := server(t, tt.answer)
			v, err := direct.New("https://acme.vault.azure.net/", cfg)
			if err != nil {
				t.Fatal(err)
			}
			_, err = v.Get(t.Context(), keyOf(t, "instance-acme"), client.GetOptions{})
			e := wantReason(t, "Get", err, tt.want)
			if unread := strings.Contains(e.Message, "an answer that cannot be read"); unread != tt.unread {
				t.Errorf("got %q, want it to say that the answer cannot be read: %v", e.Message, tt.unread)
			}
		})
	}
}

func TestInvalid(t *testing.T) {
	t.Parallel()
	f := start(t)
	v := open(t, f, config(t, f, f.Broker()))
	key := keyOf(t, "instance-acme")
	_, err := v.Get(t.Context(), secret.Key{}, client.GetOptions{})
	wantReason(t, "no key", err, secret.InvalidRequest)
	for what, o := range map[string]client.GetOptions{
		"version and generation": {Version: "1", MinGeneration: 1},
		"negative generation":    {MinGeneration: -1},
		"negative staleness":     {MaxStaleness: new(-time.Second)},
	} {
		_, err := v.Get(t.Context(), key, o)
		wantReason(t, what, err, secret.InvalidRequest)
		if !errors.Is(err, client.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", what, err)
		}
	}
	if got := len(f.Journal()); got != 0 {
		t.Errorf("got %d requests, want none", got)
	}
}

// TestFaults: what a vault or a token service in trouble comes to, and how often it is
// asked.
func TestFaults(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		op    keyvaultfake.Op
		fault keyvaultfake.Fault
		want  secret.Reason
		is    error
		asked int
	}{
		"cut":                    {keyvaultfake.OpGet, keyvaultfake.Fault{Cut: true}, secret.VaultUnavailable, client.ErrUnavailable, 0},
		"500":                    {keyvaultfake.OpGet, keyvaultfake.Fault{Status: 500}, secret.VaultUnavailable, client.ErrUnavailable, 4},
		"503":                    {keyvaultfake.OpGet, keyvaultfake.Fault{Status: 503}, secret.VaultUnavailable, client.ErrUnavailable, 4},
		"409":                    {keyvaultfake.OpGet, keyvaultfake.Fault{Status: 409}, secret.VaultUnavailable, client.ErrUnavailable, 1},
		"429":                    {keyvaultfake.OpGet, keyvaultfake.Fault{Status: 429}, secret.VaultThrottled, client.ErrUnavailable, 4},
		"403":                    {keyvaultfake.OpGet, keyvaultfake.Fault{Status: 403, Inner: "ForbiddenByRbac"}, secret.VaultRefused, client.ErrVaultRefused, 1},
		"token service refuses":  {keyvaultfake.OpToken, keyvaultfake.Fault{Status: 401, Inner: "invalid_client"}, secret.VaultRefused, client.ErrVaultRefused, 0},
		"token service in pains": {keyvaultfake.OpToken, keyvaultfake.Fault{Status: 503}, secret.VaultUnavailable, client.ErrUnavailable, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := start(t)
			key := keyOf(t, "instance-acme")
			f.PersonSet(key.String(), canary, nil)
			v := open(t, f, config(t, f, f.Broker()))
			if tt.asked > 0 {
				if _, err := v.Get(t.Context(), key, client.GetOptions{}); err != nil { // the token
					t.Fatal(err)
				}
			}
			f.ResetJournal()
			on(f, tt.op, tt.fault)
			_, err := v.Get(t.Context(), key, client.GetOptions{})
			e := wantReason(t, "Get", err, tt.want)
			if !errors.Is(err, tt.is) || status.Code(err) != codes.Unavailable || !strings.HasPrefix(e.Message, string(tt.want)+": ") {
				t.Errorf("got %v, want it to be %v with its reason first", err, tt.is)
			}
			if got := count(f, keyvaultfake.OpGet); tt.asked > 0 && got != tt.asked {
				t.Errorf("got %d requests, want %d", got, tt.asked)
			}
		})
	}
}

// TestThrottled: a Retry-After that is too long to be waited for is told.
func TestThrottled(t *testing.T) {
	t.Parallel()
	f := start(t)
	v := open(t, f, config(t, f, f.Broker()))
	for after, want := range map[time.Duration]time.Duration{0: 2 * time.Second, 37 * time.Second: 37 * time.Second} {
		on(f, keyvaultfake.OpGet, keyvaultfake.Fault{Status: 429, RetryAfter: after})
		_, err := v.Get(t.Context(), keyOf(t, "instance-acme"), client.GetOptions{})
		if e := wantReason(t, "Get", err, secret.VaultThrottled); e.RetryAfter != want {
			t.Errorf("got RetryAfter %v, want %v", e.RetryAfter, want)
		}
	}
}

// TestRights: an instance has the right to read, and no other.
func TestRights(t *testing.T) {
	t.Parallel()
	f := start(t)
	key := keyOf(t, "instance-acme")
	f.PersonSet(key.String(), canary, nil)
	f.Revoke(f.Broker())
	v := open(t, f, config(t, f, f.Broker()))
	_, err := v.Get(t.Context(), key, client.GetOptions{})
	wantReason(t, "without a role", err, secret.VaultRefused)
	f.Grant(f.Broker(), keyvaultfake.OpGet)
	got, err := v.Get(t.Context(), key, client.GetOptions{})
	if err != nil || got.Value.Reveal() != canary {
		t.Errorf("with the right to get: got %v, want the value", err)
	}
	// Why it is disabled can't be told then, but that it is.
	f.PersonUpdate(key.String(), "", false, nil)
	_, err = v.Get(t.Context(), key, client.GetOptions{})
	wantReason(t, "disabled, without the right to list", err, secret.SecretDisabled)
	f.Grant(f.Broker(), keyvaultfake.OpVersions)
	f.PersonUpdate(key.String(), "", false, map[string]string{"exto-deleted": "2026-01-01T00:00:00.000Z enabled x"})
	_, err = v.Get(t.Context(), key, client.GetOptions{})
	wantReason(t, "deleted by the mark", err, secret.SecretNotFound)
}

// TestContextEnds: neither a vault nor a token service that says nothing keeps anybody
// beyond his deadline, nor another's wait for the token.
func TestContextEnds(t *testing.T) {
	t.Parallel()
	for _, op := range []keyvaultfake.Op{keyvaultfake.OpGet, keyvaultfake.OpToken} {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			f := start(t)
			v := open(t, f, config(t, f, f.Broker()))
			asked, hold := make(chan struct{}, 10), make(chan struct{})
			f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
				if r.Op != op {
					return keyvaultfake.Fault{}
				}
				asked <- struct{}{}
				return keyvaultfake.Fault{Hold: hold}
			})
			key := keyOf(t, "instance-acme")
			first, leave := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				_, err := v.Get(first, key, client.GetOptions{})
				ended <- err
			}()
			<-asked
			hasty, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			_, err := v.Get(hasty, key, client.GetOptions{})
			if e := wantReason(t, "Get", err, ""); !errors.Is(err, context.DeadlineExceeded) || e.Code != codes.DeadlineExceeded {
				t.Errorf("got %v, want DeadlineExceeded", err)
			}
			select {
			case err := <-ended:
				t.Errorf("the other one ended too: %v", err)
			default:
			}
			leave()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want Canceled", err)
			}
			close(hold)
		})
	}
}

// TestNothingIsLogged: also with all of the SDK's log on. It is not parallel, since
// there is one log in a process.
func TestNothingIsLogged(t *testing.T) {
	var mu sync.Mutex
	var text strings.Builder
	listener := func(event azlog.Event, line string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintln(&text, event, line)
	}
	heard.Store(&listener)
	defer heard.Store(nil)
	f := start(t)
	key := keyOf(t, "instance-acme")
	f.PersonSet(key.String(), canary, nil)
	v := open(t, f, config(t, f, f.Broker()))
	got, err := v.Get(t.Context(), key, client.GetOptions{})
	if err != nil || got.Value.Reveal() != canary {
		t.Fatalf("got %v, want the value", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if text.Len() == 0 || strings.Contains(text.String(), canary) {
		t.Errorf("got a log of %d bytes, want one without the value", text.Len())
	}
}

// TestDefaultCredential: a machine's managed identity is found by itself. It is not
// parallel, since it is about the environment of the process.
func TestDefaultCredential(t *testing.T) {
	f := start(t)
	for _, variable := range append(f.IdentityEnv(), "AZURE_CLIENT_ID="+f.Broker().ClientID, "AZURE_TOKEN_CREDENTIALS=ManagedIdentityCredential") {
		name, value, _ := strings.Cut(variable, "=")
		t.Setenv(name, value)
	}
	key := keyOf(t, "instance-acme")
	f.PersonSet(key.String(), canary, nil)
	transport := f.Transport()
	defer transport.CloseIdleConnections()
	v := open(t, f, direct.Config{Transport: transport})
	if _, err := v.Get(t.Context(), key, client.GetOptions{}); err != nil {
		t.Errorf("got %v, want the value", err)
	}
	t.Setenv("AZURE_TOKEN_CREDENTIALS", "nothing that there is")
	if _, err := direct.New(f.URL(), direct.Config{}); err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v, want one line that there is no credential", err)
	}
}

// TestCertificate: what shows another's certificate is no vault, and is told nothing.
func TestCertificate(t *testing.T) {
	t.Parallel()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("it got a request") }))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()
	v, err := direct.New("https://acme.vault.azure.net/", direct.Config{
		Credential: new(hears),
		Retry:      policy.RetryOptions{MaxRetries: -1},
		Transport: &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, s.Listener.Addr().String())
		}, TLSClientConfig: &tls.Config{RootCAs: x509.NewCertPool()}},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = v.Get(t.Context(), keyOf(t, "instance-acme"), client.GetOptions{})
	if e := wantReason(t, "Get", err, secret.VaultUnavailable); !strings.Contains(e.Message, "certificate") {
		t.Errorf("got %v, want it to say that the certificate is at fault", err)
	}
}
