package keyvault_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/keyvault"
)

// TestTokensThatTheVaultRefuses: the next calls get a new one, once for all.
func TestTokensThatTheVaultRefuses(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*keyvaultfake.Fake){
		"expired": (*keyvaultfake.Fake).ExpireTokens,
		"revoked": (*keyvaultfake.Fake).RevokeTokens,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, atOnce())
			v := open(t, config(f, c, f.Broker()))
			key := newKey(t)
			set(t, v, key, "one")
			end(f)
			f.ResetJournal()
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					if _, _, err := v.Get(t.Context(), key, ""); err != nil {
						t.Errorf("Get: got %v, want nil", err)
					}
				})
			}
			wg.Wait()
			set(t, v, key, "two")
			wantSent(t, f, keyvaultfake.OpToken, 1)
			wantSent(t, f, keyvaultfake.OpSet, 1)
			if got := len(f.Versions(key.String())); got != 2 {
				t.Errorf("got %d versions, want 2", got)
			}
		})
	}
}

// TestWriteWithARefusedToken has one effect, though it takes two requests.
func TestWriteWithARefusedToken(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*keyvaultfake.Fake){
		"expired": (*keyvaultfake.Fake).ExpireTokens,
		"revoked": (*keyvaultfake.Fake).RevokeTokens,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachWrite(t, func(t *testing.T, w write) {
				f, c := start(t, atOnce())
				v := open(t, config(f, c, f.Broker()))
				key, version := w.prepare(t, f)
				end(f)
				if err := w.do(t.Context(), v, key, version); err != nil {
					t.Fatal(err)
				}
				requests := sent(f, w.op)
				if len(requests) != 2 || requests[0].Status != 401 || requests[1].Status != 200 {
					t.Errorf("got %+v, want a 401 and a 200", requests)
				}
				if !w.done(f, key) {
					t.Error("it was not done")
				}
			})
		})
	}
}

// TestTokenServiceRefusesLater: the credential was taken away.
func TestTokenServiceRefusesLater(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	key := newKey(t)
	set(t, v, key, "one")
	on(f, keyvaultfake.OpToken, always, keyvaultfake.Fault{Status: 401, Inner: "invalid_client"})
	f.ExpireTokens()
	for range 2 {
		_, _, err := v.Get(t.Context(), key, "")
		wantError(t, "Get", err, vault.ErrRefused)
	}
}

// TestCachedTokenOutlivesTheTokenService: reads go on.
func TestCachedTokenOutlivesTheTokenService(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	key := newKey(t)
	set(t, v, key, "one")
	f.SetTokenServiceDown(true)
	for range 10 {
		if _, _, err := v.Get(t.Context(), key, ""); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDeadlineWhileAnotherWaits: the vault refuses the token of two, and the
// token service does not answer. Each leaves at its own deadline.
func TestDeadlineWhileAnotherWaits(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*keyvaultfake.Fake){
		"expired": (*keyvaultfake.Fake).ExpireTokens,
		"revoked": (*keyvaultfake.Fake).RevokeTokens,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, atOnce())
			v := open(t, config(f, c, f.Broker()))
			end(f)
			// Both have sent their requests before either is refused.
			const callers = 2
			var arrived sync.WaitGroup
			arrived.Add(callers)
			var once sync.Map
			service := make(chan struct{})
			t.Cleanup(func() { close(service) })
			f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
				switch r.Op {
				case keyvaultfake.OpToken, keyvaultfake.OpDiscovery:
					return keyvaultfake.Fault{Hold: service}
				case keyvaultfake.OpGetDeleted:
					if _, again := once.LoadOrStore(r.Name, true); !again {
						arrived.Done()
						arrived.Wait()
					}
				}
				return keyvaultfake.Fault{}
			})
			patient, leave := context.WithCancel(t.Context())
			hasty, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			waits := make(chan error, 1)
			go func() {
				_, err := v.GetDeleted(patient, newKey(t))
				waits <- err
			}()
			_, err := v.GetDeleted(hasty, newKey(t))
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want DeadlineExceeded", err)
			}
			select {
			case err := <-waits:
				t.Errorf("the other one ended too: %v", err)
			default:
			}
			leave()
			if err := <-waits; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want Canceled", err)
			}
		})
	}
}

// TestBlocked: neither a vault nor a token service that says nothing keeps anybody
// beyond his deadline.
func TestBlocked(t *testing.T) {
	t.Parallel()
	for name, ops := range map[string]map[keyvaultfake.Op]bool{
		"vault":         {keyvaultfake.OpGet: true},
		"token service": {keyvaultfake.OpToken: true, keyvaultfake.OpDiscovery: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, atOnce())
			v := open(t, config(f, c, f.Broker()))
			f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
				if ops[r.Op] {
					return keyvaultfake.Fault{Hold: make(chan struct{})}
				}
				return keyvaultfake.Fault{}
			})
			if name == "token service" {
				f.ExpireTokens()
			}
			for range 2 {
				ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
				_, _, err := v.Get(ctx, newKey(t), "")
				wantError(t, "Get", err, context.DeadlineExceeded)
				cancel()
			}
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			other, err := keyvault.Open(ctx, config(f, c, f.Broker()))
			if err != nil {
				t.Fatalf("Open: got %v, want a vault that is not ready", err)
			}
			defer func() { _ = other.Close() }()
			if err := other.Check(t.Context()); err == nil {
				t.Error("Check: got nil, want an error")
			}
			first, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			_, _, err = other.Get(first, newKey(t), "")
			wantError(t, "the first Get", err, context.DeadlineExceeded)
		})
	}
}

// TestRightsComeAndGo: without a restart.
func TestRightsComeAndGo(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	cfg := config(f, c, f.Broker())
	log := newHeard()
	cfg.Logger = log.logger()
	v := open(t, cfg)
	key := newKey(t)
	set(t, v, key, "one")
	f.Revoke(f.Broker())
	_, _, err := v.Get(t.Context(), key, "")
	wantError(t, "Get", err, vault.ErrRefused)
	log.wait("the vault cannot be used")
	wantError(t, "Check", v.Check(t.Context()), vault.ErrRefused)
	f.Grant(f.Broker())
	if _, _, err := v.Get(t.Context(), key, ""); err != nil {
		t.Errorf("Get: got %v, want nil", err)
	}
	log.wait("the vault can be used again")
	if err := v.Check(t.Context()); err != nil {
		t.Errorf("Check: got %v, want nil", err)
	}
}
