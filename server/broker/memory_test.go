package broker_test

import (
	"context"
	"testing"
	"time"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
)

// TestRefusedWriteBringsNothingBack: a write that came upon a deleted secret, and then
// to nothing, leaves no value from before that.
func TestRefusedWriteBringsNothingBack(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	x.put(key, "one")
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		switch op {
		case "Set":
			if _, err := x.vault.Vault.Delete(context.Background(), key); err != nil {
				t.Error(err)
			}
		case "Settle":
			return vault.ErrRefused
		}
		return nil
	})
	_, err := x.Put(t.Context(), another, broker.PutRequest{Key: key, Value: secret.NewValue("two")})
	wantError(t, err, secret.VaultRefused, secret.NotApplied)
	x.wantInOutage(key, "")
}

// TestHalfALookAtADisabledSecret: once the vault says that a secret is disabled, what
// the look saw before that is not kept, though the rest of it fails.
func TestHalfALookAtADisabledSecret(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	versions := []string{x.put(key, "one"), x.put(key, "two")}
	x.advance(time.Minute)
	gets, lists := 0, 0
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		switch op {
		case "Get":
			if gets++; gets != 2 { // that of the version's value
				return nil
			}
			for _, version := range versions {
				if _, err := x.vault.Vault.Update(context.Background(), key, version, vault.Patch{}); err != nil {
					t.Error(err)
				}
			}
		case "Versions":
			if lists++; lists > 1 {
				return vault.ErrUnavailable
			}
		}
		return nil
	})
	_, err := x.Get(t.Context(), another, broker.GetRequest{Key: key, Version: versions[0]})
	wantError(t, err, secret.VaultUnavailable, "")
	if gets < 3 || lists < 2 {
		t.Errorf("got %d reads and %d lists, want a second look", gets, lists)
	}
	x.wantInOutage(key, "")
}

// TestDescribeWhileOthersAreWritten: that many other secrets change takes nothing from
// what is remembered of the one that is described.
func TestDescribeWhileOthersAreWritten(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	x.put(key, "one")
	x.vault.SetBefore(func(_ context.Context, op string, k secret.Key) error {
		for i := 0; op == "Get" && k == key && i < 1000; i++ { // some that share its place
			if _, err := x.Delete(t.Context(), another, broker.DeleteRequest{Key: keyOf(t, secret.DatabaseURI, "other-%d", i), AllowMissing: true}); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	if _, err := x.Describe(t.Context(), another, key); err != nil {
		t.Error(err)
	}
	x.wantInOutage(key, "one")
}
