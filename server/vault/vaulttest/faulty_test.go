package vaulttest_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/noop"
	"github.com/exto/secrets-broker/server/vault/vaulttest"
)

func newFaulty() *vaulttest.Faulty {
	return vaulttest.NewFaulty(noop.New(slog.New(slog.DiscardHandler)))
}

func TestFaultyConforms(t *testing.T) {
	t.Parallel()
	vaulttest.Run(t, func(*testing.T) vault.Vault { return newFaulty() })
}

func TestFaultyHooks(t *testing.T) {
	t.Parallel()
	f, ctx := newFaulty(), t.Context()
	id, err := secret.ParseInstanceID("abc")
	if err != nil {
		t.Fatal(err)
	}
	key, err := secret.NewKey(id, secret.RegistrationToken)
	if err != nil {
		t.Fatal(err)
	}
	refused, lost := errors.New("refused"), errors.New("lost")

	var ended []error
	f.SetAfter(func(_ context.Context, op string, k secret.Key, err error) error {
		ended = append(ended, err)
		if op == "Set" && k == key {
			return lost
		}
		return err
	})
	if p, err := f.Set(ctx, key, vault.NewVersion{}); !errors.Is(err, lost) || p.Version != "" {
		t.Errorf("Set: got %v, %v, want the hook's error alone", p, err)
	}
	f.SetBefore(func(context.Context, string, secret.Key) error { return refused })
	if _, err := f.Delete(ctx, key); !errors.Is(err, refused) {
		t.Errorf("Delete: got %v, want the hook's error", err)
	}
	if len(ended) != 1 || ended[0] != nil {
		t.Errorf("got calls ended with %v, want the Set alone, with nil", ended)
	}
	f.SetBefore(nil)
	f.SetAfter(nil)
	if _, err := f.List(ctx, "", 1); err != nil {
		t.Errorf("List without hooks: %v", err)
	}
	if got, want := f.Calls(), []string{"Set instance-abc", "Delete instance-abc", "List"}; !slices.Equal(got, want) {
		t.Errorf("got calls %q, want %q", got, want)
	}
}
