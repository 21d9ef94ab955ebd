package keyvault_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/keyvault"
)

var reads = []struct {
	op keyvaultfake.Op
	do func(context.Context, *keyvault.Vault, secret.Key) error
}{
	{keyvaultfake.OpGet, func(ctx context.Context, v *keyvault.Vault, key secret.Key) error {
		_, _, err := v.Get(ctx, key, "")
		return err
	}},
	{keyvaultfake.OpVersions, func(ctx context.Context, v *keyvault.Vault, key secret.Key) error {
		_, err := v.Versions(ctx, key)
		return err
	}},
	{keyvaultfake.OpGetDeleted, func(ctx context.Context, v *keyvault.Vault, key secret.Key) error {
		_, err := v.GetDeleted(ctx, key)
		if errors.Is(err, vault.ErrNotFound) {
			err = nil // it was answered
		}
		return err
	}},
	{keyvaultfake.OpList, func(ctx context.Context, v *keyvault.Vault, _ secret.Key) error {
		_, err := v.List(ctx, "", 5)
		return err
	}},
	{keyvaultfake.OpListDeleted, func(ctx context.Context, v *keyvault.Vault, _ secret.Key) error {
		_, err := v.ListDeleted(ctx, "", 5)
		return err
	}},
}

// TestReadIsRepeated twice, and no more.
func TestReadIsRepeated(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]keyvaultfake.Fault{
		"cut": {Cut: true},
		"500": {Status: 500},
		"503": {Status: 503},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, atOnce())
			cfg := config(f, c, f.Broker())
			cfg.Transport.DisableKeepAlives = true // net/http repeats a GET on a kept connection by itself
			v := open(t, cfg)
			key := newKey(t)
			f.PersonSet(key.String(), "one", nil)
			for _, r := range reads {
				on(f, r.op, 2, fault)
				f.ResetJournal()
				if err := r.do(t.Context(), v, key); err != nil {
					t.Errorf("%s: got %v, want the third answer", r.op, err)
				}
				wantSent(t, f, r.op, 3)
				on(f, r.op, always, fault)
				f.ResetJournal()
				wantError(t, string(r.op), r.do(t.Context(), v, key), vault.ErrUnavailable)
				wantSent(t, f, r.op, 3)
			}
		})
	}
}

// TestReadIsNotRepeated where the answer would be the same.
func TestReadIsNotRepeated(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	for want, fault := range map[error]keyvaultfake.Fault{
		vault.ErrNotFound: {Status: 404},
		vault.ErrRefused:  {Status: 403, Inner: "AccessDenied"},
		vault.ErrDisabled: {Status: 403, Inner: "SecretDisabled"},
	} {
		on(f, keyvaultfake.OpGet, always, fault)
		f.ResetJournal()
		_, _, err := v.Get(t.Context(), newKey(t), "")
		wantError(t, "Get", err, want)
		wantSent(t, f, keyvaultfake.OpGet, 1)
	}
}

// TestThrottledReadWaits as long as the vault says, by the clock that it is given,
// and goes on.
func TestThrottledReadWaits(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	cfg := config(f, c, f.Broker())
	var mu sync.Mutex
	var waits []time.Duration
	cfg.Wait = func(ctx context.Context, d time.Duration) error {
		mu.Lock()
		defer mu.Unlock()
		waits = append(waits, d)
		return ctx.Err()
	}
	v := open(t, cfg)
	key := newKey(t)
	f.PersonSet(key.String(), "one", nil)
	on(f, keyvaultfake.OpGet, 1, keyvaultfake.Fault{Status: 429, RetryAfter: time.Second})
	if _, _, err := v.Get(t.Context(), key, ""); err != nil {
		t.Fatal(err)
	}
	wantSent(t, f, keyvaultfake.OpGet, 2)
	if len(waits) != 1 || waits[0] < time.Second {
		t.Errorf("got waits %v, want one of at least 1 s", waits)
	}
}

// TestThrottledReadGivesUpInTime: a Retry-After beyond the deadline is not waited
// for.
func TestThrottledReadGivesUpInTime(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	on(f, keyvaultfake.OpGet, always, keyvaultfake.Fault{Status: 429, RetryAfter: 30 * time.Second})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, _, err := v.Get(ctx, newKey(t), "")
	wantError(t, "Get", err, vault.ErrThrottled)
	if got := vault.RetryAfter(err); got != 30*time.Second {
		t.Errorf("got Retry-After %v, want 30s", got)
	}
	if ctx.Err() != nil {
		t.Error("it came after the deadline")
	}
	wantSent(t, f, keyvaultfake.OpGet, 1)
}
