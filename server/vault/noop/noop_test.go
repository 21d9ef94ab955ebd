package noop_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/noop"
	"github.com/exto/secrets-broker/server/vault/vaulttest"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	vaulttest.Run(t, func(*testing.T) vault.Vault { return noop.New(slog.New(slog.DiscardHandler)) })
}

// TestWarns: every operation warns with its name and key, and with nothing of
// the value.
func TestWarns(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	v := noop.New(slog.New(slog.NewTextHandler(&log, nil)))
	id, err := secret.ParseInstanceID("abc")
	if err != nil {
		t.Fatal(err)
	}
	key, err := secret.NewKey(id, secret.DatabaseURI)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	_, _ = v.Set(ctx, key, vault.NewVersion{Value: secret.NewValue("canary")})
	_, _, _ = v.Get(ctx, key, "")
	_, _ = v.Versions(ctx, key)
	_, _ = v.Update(ctx, key, "", vault.Patch{})
	_, _ = v.Delete(ctx, key)
	_, _ = v.GetDeleted(ctx, key)
	_ = v.Recover(ctx, key)
	_, _ = v.List(ctx, "", 1)
	_, _ = v.ListDeleted(ctx, "", 1)

	for _, op := range []string{"Set", "Get", "Versions", "Update", "Delete", "GetDeleted", "Recover"} {
		if want := "operation=" + op + " key=instance-abc-dburi\n"; !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q", want)
		}
	}
	if got := strings.Count(log.String(), "level=WARN"); got != 9 {
		t.Errorf("got %d warnings, want 9", got)
	}
	if strings.Contains(log.String(), "canary") {
		t.Error("the log holds the value")
	}
}
