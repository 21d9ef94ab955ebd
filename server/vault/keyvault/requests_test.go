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
)

// counts are how many requests the vault and the token service got, and how many
// of those to the vault were without a token.
func counts(f *keyvaultfake.Fake) (vaults, challenges, tokens int) {
	for _, r := range f.Journal() {
		switch {
		case r.Op == keyvaultfake.OpToken:
			tokens++
		case r.Op == keyvaultfake.OpDiscovery:
		case r.Challenge:
			challenges++
			vaults++
		default:
			vaults++
		}
	}
	return vaults, challenges, tokens
}

func TestStartAsksLittle(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	if vaults, challenges, tokens := counts(f); vaults > 3 || challenges != 1 || tokens != 1 {
		t.Errorf("got %d requests, %d of them without a token, and %d for tokens, want at most 3, 1, 1", vaults, challenges, tokens)
	}
	key := newKey(t)
	f.PersonSet(key.String(), "one", nil)
	f.ResetJournal()
	if _, _, err := v.Get(t.Context(), key, ""); err != nil {
		t.Fatal(err)
	}
	if vaults, challenges, tokens := counts(f); vaults != 1 || challenges != 0 || tokens != 0 {
		t.Errorf("Get: got %d requests, %d of them without a token, and %d for tokens, want 1, 0, 0", vaults, challenges, tokens)
	}
}

// TestFirstCallsTogether: the vault was down at the start.
func TestFirstCallsTogether(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	f.SetDown(true)
	v := wantNotReady(t, config(f, c, f.Broker()))
	f.SetDown(false)
	key := newKey(t)
	f.PersonSet(key.String(), "one", nil)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, _, err := v.Get(t.Context(), key, ""); err != nil {
				t.Errorf("Get: got %v, want nil", err)
			}
		})
	}
	wg.Wait()
	if _, challenges, tokens := counts(f); challenges != 1 || tokens != 1 {
		t.Errorf("got %d requests without a token and %d for tokens, want 1 and 1", challenges, tokens)
	}
	wantSent(t, f, keyvaultfake.OpGet, 50)
}

// TestRequestID: the vault's own log shows whose request it was.
func TestRequestID(t *testing.T) {
	t.Parallel()
	const id = "0f8fad5b-d9cb-469f-a165-70867728950e"
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	ctx := vault.WithOrigin(t.Context(), vault.Origin{RequestID: id})
	key := newKey(t)
	f.ResetJournal()
	p, err := v.Set(ctx, key, vault.NewVersion{Value: secret.NewValue("one")})
	errs := []error{err}
	_, _, err = v.Get(ctx, key, "")
	errs = append(errs, err)
	_, err = v.Versions(ctx, key)
	errs = append(errs, err)
	_, err = v.Update(ctx, key, p.Version, vault.Patch{Enabled: true})
	errs = append(errs, err)
	_, err = v.List(ctx, "", 1)
	errs = append(errs, err, v.Settle(ctx, key))
	_, err = v.Delete(ctx, key)
	errs = append(errs, err)
	_, err = v.GetDeleted(ctx, key)
	errs = append(errs, err)
	_, err = v.ListDeleted(ctx, "", 1)
	errs = append(errs, err, v.Recover(ctx, key))
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	ops := map[keyvaultfake.Op]bool{}
	for _, r := range f.Journal() {
		ops[r.Op] = true
		if r.ClientRequestID != id {
			t.Errorf("%s: got x-ms-client-request-id %q, want %q", r.Op, r.ClientRequestID, id)
		}
	}
	if len(ops) != 9 {
		t.Errorf("got the operations %v, want all nine", ops)
	}
}

// TestSpentBudget: nothing is sent, no effect begins, and the caller hears it in
// time.
func TestSpentBudget(t *testing.T) {
	t.Parallel()
	eachWrite(t, func(t *testing.T, w write) {
		f, c := start(t, atOnce())
		cfg := config(f, c, f.Broker())
		cfg.WritesPerSecond = 0.01
		v := open(t, cfg)
		if err := v.Settle(t.Context(), newKey(t)); !errors.Is(err, vault.ErrNotFound) { // takes the one that there is
			t.Fatal(err)
		}
		key, version := w.prepare(t, f)
		ctx, effects := counted(t.Context())
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		err := w.do(ctx, v, key, version)
		wantError(t, string(w.op), err, vault.ErrThrottled)
		wantSent(t, f, w.op, 0)
		if got := effects.Load(); got != 0 {
			t.Errorf("got %d calls of Effect, want none", got)
		}
		if ctx.Err() != nil {
			t.Error("it came after the deadline")
		}
		if _, _, err := v.Get(t.Context(), key, ""); err != nil && w.op != keyvaultfake.OpRecover {
			t.Errorf("Get: got %v, want nil: reads have a budget of their own", err)
		}
	})
}

// TestSends: each request is told of, when nothing keeps it back any more.
func TestSends(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	cfg := config(f, c, f.Broker())
	cfg.WritesPerSecond = 0.01
	v := open(t, cfg)
	var waits, sends, effects int
	ctx := vault.WithOrigin(t.Context(), vault.Origin{
		Waits: func() { waits++ },
		Sends: func() { sends++ },
		Effect: func() error {
			if effects++; sends > 0 {
				t.Error("it was sent before the effect began")
			}
			return nil
		},
	})
	want := func(what string, w, s int) {
		t.Helper()
		if waits != w || sends != s {
			t.Errorf("%s: got %d calls of Waits and %d of Sends, want %d and %d", what, waits, sends, w, s)
		}
		waits, sends = 0, 0
	}
	key := newKey(t)
	if _, err := v.Set(ctx, key, vault.NewVersion{Value: secret.NewValue("one")}); err != nil || effects != 1 {
		t.Fatalf("got %v, %d effects, want nil and one", err, effects)
	}
	want("Set", 0, 1)
	on(f, keyvaultfake.OpGet, 1, keyvaultfake.Fault{Status: 503})
	if _, _, err := v.Get(ctx, key, ""); err != nil {
		t.Fatal(err)
	}
	want("Get, again after a 503", 0, 2)
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	_, err := v.Set(short, key, vault.NewVersion{Value: secret.NewValue("two")})
	wantError(t, "Set", err, vault.ErrThrottled)
	want("Set, when the budget is spent", 1, 0)
}

// TestThrottledSlowsDown reads or writes, whichever the vault refused.
func TestThrottledSlowsDown(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	wantRates := func(reads, writes float64) {
		t.Helper()
		if r, w := v.Rates(); r != reads || w != writes {
			t.Errorf("got %v reads and %v writes a second, want %v and %v", r, w, reads, writes)
		}
	}
	wantRates(100_000, 100_000)
	key := newKey(t)
	on(f, keyvaultfake.OpSet, 1, keyvaultfake.Fault{Status: 429})
	_, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("x")})
	wantError(t, "Set", err, vault.ErrThrottled)
	wantRates(100_000, 50_000)
	on(f, keyvaultfake.OpGet, 1, keyvaultfake.Fault{Status: 429, RetryAfter: time.Minute})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // less than it would have to wait
	defer cancel()
	_, _, err = v.Get(ctx, key, "")
	wantError(t, "Get", err, vault.ErrThrottled)
	wantRates(50_000, 50_000)
}
