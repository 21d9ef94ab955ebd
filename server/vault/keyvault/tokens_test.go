package keyvault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/exto/secrets-broker/server/vault"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// service is a token service: what it answers is sent to it.
type service struct {
	asked   chan policy.TokenRequestOptions
	answers chan answer
}

type answer struct {
	token azcore.AccessToken
	err   error
}

func (s *service) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	s.asked <- o
	select {
	case a := <-s.answers:
		return a.token, a.err
	case <-ctx.Done():
		return azcore.AccessToken{}, ctx.Err()
	}
}

// give answers one request.
func (s *service) give(token string, life time.Duration) {
	s.answers <- answer{token: azcore.AccessToken{Token: token, ExpiresOn: time.Now().Add(life)}}
}

var wanted = policy.TokenRequestOptions{Scopes: []string{"https://vault.azure.net/.default"}, TenantID: "tenant", EnableCAE: true}

// inBubble runs a test of tokens in fake time. made counts the credentials that
// were made.
func inBubble(t *testing.T, test func(t *testing.T, ts *tokens, s *service, made *int)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &service{asked: make(chan policy.TokenRequestOptions, 100), answers: make(chan answer, 100)}
		made := 0
		ctx, cancel := context.WithCancel(t.Context())
		ts := newTokens(ctx, func() (azcore.TokenCredential, error) { made++; return s, nil }, quiet)
		defer ts.wait()
		defer cancel()
		test(t, ts, s, &made)
	})
}

func wantToken(t *testing.T, ts *tokens, want string) {
	t.Helper()
	got, err := ts.GetToken(t.Context(), wanted)
	if err != nil || got.Token != want {
		t.Errorf("got %q, %v, want %q", got.Token, err, want)
	}
}

func wantAsked(t *testing.T, s *service, want int) {
	t.Helper()
	synctest.Wait()
	if got := len(s.asked); got != want {
		t.Errorf("got %d requests for a token, want %d", got, want)
	}
}

// first gets the first token, as the handshake does.
func first(t *testing.T, ts *tokens, s *service, token string, life time.Duration) {
	t.Helper()
	s.give(token, life)
	if _, err := ts.GetToken(t.Context(), wanted); !errors.Is(err, errNoToken) {
		t.Fatalf("before there is a token: got %v, want errNoToken", err)
	}
	if err := ts.ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantToken(t, ts, token)
	<-s.asked
}

func TestNoTokenIsAskedForBeforeTheChallenge(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, made *int) {
		if err := ts.ready(t.Context()); err != nil || *made > 0 {
			t.Errorf("got %v and %d credentials, want nil and none", err, *made)
		}
	})
}

func TestTokenIsRenewedBeforeItsEnd(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		first(t, ts, s, "one", time.Hour)
		time.Sleep(55*time.Minute - time.Second)
		wantToken(t, ts, "one")
		wantAsked(t, s, 0)
		time.Sleep(time.Second)
		wantToken(t, ts, "one") // nobody waits
		wantToken(t, ts, "one")
		wantAsked(t, s, 1)
		s.give("two", time.Hour)
		synctest.Wait()
		wantToken(t, ts, "two")
		wantAsked(t, s, 1)
	})
}

func TestTokenIsRenewedWhenItsServiceSays(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		s.answers <- answer{token: azcore.AccessToken{Token: "one", ExpiresOn: time.Now().Add(24 * time.Hour), RefreshOn: time.Now().Add(12 * time.Hour)}}
		_, _ = ts.GetToken(t.Context(), wanted)
		if err := ts.ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-s.asked
		time.Sleep(12*time.Hour - time.Second)
		wantToken(t, ts, "one")
		wantAsked(t, s, 0)
		time.Sleep(time.Second)
		wantToken(t, ts, "one")
		wantAsked(t, s, 1)
	})
}

// TestRenewalThatFails: the token that is there is used to its end, and the
// service is asked every 30 s.
func TestRenewalThatFails(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		first(t, ts, s, "one", time.Hour)
		time.Sleep(55 * time.Minute)
		for range 10 {
			s.answers <- answer{err: errors.New("down")}
		}
		for range 4*60 + 59 {
			wantToken(t, ts, "one")
			time.Sleep(time.Second)
		}
		wantAsked(t, s, 10)
		time.Sleep(time.Second) // its end
		s.give("two", time.Hour)
		if err := ts.ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantToken(t, ts, "two")
	})
}

func TestAllWaitForOneRequest(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		_, _ = ts.GetToken(t.Context(), wanted)
		errs := make(chan error, 50)
		for range cap(errs) {
			go func() { errs <- ts.ready(t.Context()) }()
		}
		wantAsked(t, s, 1)
		s.give("one", time.Hour)
		for range cap(errs) {
			if err := <-errs; err != nil {
				t.Errorf("got %v, want nil", err)
			}
		}
		wantAsked(t, s, 1)
	})
}

// TestWaiterLeavesInTime: his own deadline holds, whoever else waits.
func TestWaiterLeavesInTime(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		began := time.Now()
		_, _ = ts.GetToken(t.Context(), wanted)
		patient := make(chan error, 1)
		go func() { patient <- ts.ready(t.Context()) }()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := ts.ready(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want DeadlineExceeded", err)
		}
		if waited := time.Since(began); waited != 50*time.Millisecond {
			t.Errorf("waited %v, want 50ms", waited)
		}
		if err := <-patient; !errors.Is(err, vault.ErrUnavailable) {
			t.Errorf("got %v, want ErrUnavailable", err)
		}
		if waited := time.Since(began); waited != tokenTimeout {
			t.Errorf("a request that is not answered took %v, want %v", waited, tokenTimeout)
		}
	})
}

// TestServiceIsNotFlooded: after a failure it is left alone for half a second.
func TestServiceIsNotFlooded(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		_, _ = ts.GetToken(t.Context(), wanted)
		s.answers <- answer{err: errors.New("no")}
		for range 100 {
			if err := ts.ready(t.Context()); err == nil {
				t.Fatal("got nil, want an error")
			}
		}
		wantAsked(t, s, 1)
		time.Sleep(retryToken)
		s.give("one", time.Hour)
		if err := ts.ready(t.Context()); err != nil {
			t.Error(err)
		}
		wantAsked(t, s, 2)
	})
}

// TestNobodyWaitsLongWhileTheServiceIsOut: who comes after a failure hears of it,
// though the next try is not answered.
func TestNobodyWaitsLongWhileTheServiceIsOut(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		_, _ = ts.GetToken(t.Context(), wanted)
		s.answers <- answer{err: context.DeadlineExceeded}
		if err := ts.ready(t.Context()); !errors.Is(err, vault.ErrUnavailable) {
			t.Fatalf("got %v, want ErrUnavailable", err)
		}
		time.Sleep(retryToken)
		began := time.Now()
		if err := ts.ready(t.Context()); !errors.Is(err, vault.ErrUnavailable) || time.Since(began) != waitAfterError {
			t.Errorf("got %v after %v, want ErrUnavailable after %v", err, time.Since(began), waitAfterError)
		}
	})
}

func TestRejectedToken(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, made *int) {
		first(t, ts, s, "one", time.Hour)
		for range 50 { // who were sent together are refused together
			ts.reject("Bearer one")
		}
		s.give("two", time.Hour)
		if err := ts.ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		ts.reject("Bearer one") // and one comes late
		wantToken(t, ts, "two")
		wantAsked(t, s, 1)
		if *made != 2 {
			t.Errorf("got %d credentials, want a second one, which has no old token in its cache", *made)
		}
	})
}

// TestVaultThatRefusesEveryToken does not make the broker ask for as many.
func TestVaultThatRefusesEveryToken(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		for range cap(s.answers) {
			s.give("one", time.Hour)
		}
		_, _ = ts.GetToken(t.Context(), wanted)
		for range 1000 {
			if err := ts.ready(t.Context()); err != nil && !errors.Is(err, vault.ErrRefused) {
				t.Fatalf("got %v, want ErrRefused", err)
			}
			ts.reject("Bearer one")
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait()
		if got, most := len(s.asked), int(10*time.Second/retryToken)*2; got > most {
			t.Errorf("got %d requests for a token in 10 s, want at most %d", got, most)
		}
	})
}

func TestClaims(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		first(t, ts, s, "one", time.Hour)
		ts.reject("Bearer one")
		claims := wanted
		claims.Claims = "claims"
		s.answers <- answer{err: errors.New("down")}
		if _, err := ts.GetToken(t.Context(), claims); !errors.Is(err, errNoToken) {
			t.Fatalf("got %v, want errNoToken", err)
		}
		synctest.Wait()
		time.Sleep(retryToken)
		s.give("two", time.Hour)
		if _, err := ts.GetToken(t.Context(), wanted); !errors.Is(err, errNoToken) { // somebody else, who knows nothing of it
			t.Fatalf("got %v, want errNoToken", err)
		}
		if err := ts.ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		for n := range 2 {
			if o := <-s.asked; o.Claims != "claims" {
				t.Errorf("request %d: got claims %q, want those of the vault", n, o.Claims)
			}
		}
		wantToken(t, ts, "two")
		ts.reject("Bearer two")
		s.give("three", time.Hour)
		if err := ts.ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		if o := <-s.asked; o.Claims != "" {
			t.Errorf("got claims %q, want none: they were met", o.Claims)
		}
	})
}

// TestAnotherResource: a token for one is not used for another.
func TestAnotherResource(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		first(t, ts, s, "one", time.Hour)
		other := policy.TokenRequestOptions{Scopes: []string{"https://vault.azure.cn/.default"}, TenantID: "other"}
		if got, err := ts.GetToken(t.Context(), other); !errors.Is(err, errNoToken) {
			t.Errorf("got %q, %v, want errNoToken", got.Token, err)
		}
		s.give("two", time.Hour)
		if err := ts.ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		if o := <-s.asked; o.TenantID != "other" || o.Scopes[0] != other.Scopes[0] {
			t.Errorf("got a request for %v, want %v", o, other)
		}
	})
}

// TestCredentialThatFailsOnce: neither an error nor a panic of the SDK's ends
// more than one request for a token.
func TestCredentialThatFailsOnce(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func() (azcore.TokenCredential, error){
		"error": func() (azcore.TokenCredential, error) {
			return (*azidentity.DefaultAzureCredential)(nil), errors.New("not now")
		},
		"panic": func() (azcore.TokenCredential, error) { panic("secret") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
				works := ts.credential
				ts.credential = fail
				_, _ = ts.GetToken(t.Context(), wanted)
				if err := ts.ready(t.Context()); err == nil || strings.Contains(err.Error(), "secret") {
					t.Fatalf("got %v, want an error without the panic's value", err)
				}
				ts.credential = works
				time.Sleep(retryToken)
				s.give("one", time.Hour)
				if err := ts.ready(t.Context()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestFailureWithoutARequestIsNoticed: without a token nothing is sent to the
// vault, and yet Check has to learn that it cannot be used.
func TestFailureWithoutARequestIsNoticed(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, ts *tokens, s *service, _ *int) {
		first(t, ts, s, "one", time.Hour)
		v := &Vault{tokens: ts, wake: make(chan struct{}, 1)}
		v.warm.Store(true)
		time.Sleep(time.Hour)
		s.answers <- answer{err: context.DeadlineExceeded}
		err := v.do(t.Context(), &call{}, func(context.Context) error {
			t.Error("a request was sent")
			return nil
		})
		if !errors.Is(err, vault.ErrUnavailable) || len(v.wake) != 1 {
			t.Errorf("got %v and %d probes, want ErrUnavailable and one", err, len(v.wake))
		}
	})
}

func TestTokenErrors(t *testing.T) {
	t.Parallel()
	answered := func(status int) error {
		return fmt.Errorf("wrapped: %w", &azidentity.AuthenticationFailedError{RawResponse: &http.Response{StatusCode: status, Body: http.NoBody}})
	}
	for name, tt := range map[string]struct{ err, want error }{
		"400":         {answered(400), vault.ErrRefused},
		"401":         {answered(401), vault.ErrRefused},
		"403":         {answered(403), vault.ErrRefused},
		"408":         {answered(408), vault.ErrUnavailable},
		"429":         {answered(429), vault.ErrUnavailable},
		"500":         {answered(500), vault.ErrUnavailable},
		"503":         {answered(503), vault.ErrUnavailable},
		"no answer":   {&azidentity.AuthenticationFailedError{}, vault.ErrUnavailable},
		"deadline":    {context.DeadlineExceeded, vault.ErrUnavailable},
		"cancelled":   {context.Canceled, vault.ErrUnavailable},
		"unavailable": {azidentity.NewCredentialUnavailableError("none"), vault.ErrRefused},
	} {
		if got := newTokenError(tt.err); !errors.Is(got, tt.want) {
			t.Errorf("%s: got %v, want %v", name, got, tt.want)
		}
	}
}

// TestAnotherTenant: DefaultAzureCredential says so in the words of a token service
// that did not answer, and yet no waiting helps.
func TestAnotherTenant(t *testing.T) {
	t.Parallel()
	one, err := azidentity.NewClientSecretCredential("00000000-0000-0000-0000-000000000001", "client", "secret", nil)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := azidentity.NewChainedTokenCredential([]azcore.TokenCredential{one}, nil)
	if err != nil {
		t.Fatal(err)
	}
	o := wanted
	o.TenantID = "00000000-0000-0000-0000-000000000002"
	_, err = chain.GetToken(t.Context(), o)
	if got := newTokenError(err); !errors.Is(got, vault.ErrRefused) || !strings.Contains(got.Error(), "AZURE_TENANT_ID") {
		t.Errorf("got %v, want ErrRefused and a word about AZURE_TENANT_ID", got)
	}
}
