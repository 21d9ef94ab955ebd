package broker_test

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/exto/secrets-broker/internal/race"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
)

// everything is a vault that has every secret and keeps none in memory.
type everything struct {
	vault.Vault
	value string
}

func (v everything) Info() vault.Info { return vault.Info{Name: "everything"} }

func (v everything) Get(_ context.Context, key secret.Key, _ string) (vault.Properties, secret.Value, error) {
	id := strings.ReplaceAll(uuid.NewString(), "-", "")
	return vault.Properties{
		Key: key, Version: id, Enabled: true, Created: time.Unix(1_700_000_000, 0),
		Tags: vault.Tags{
			"exto-format": "1", "exto-key": key.String(), "exto-generation": "1", "exto-epoch": "1700000000000 " + uuid.NewString(),
			"exto-created-by": strings.Clone("spiffe://console.exto/console-api"), "exto-operation": "p:" + uuid.NewString(),
		},
	}, secret.NewValue(strings.Clone(v.value)), nil
}

// TestMemoryPerSecret: a secret in memory takes at most 1 KB more than its value. It
// is not parallel: it looks at the whole heap.
func TestMemoryPerSecret(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector's own memory would count")
	}
	const secrets, valueBytes, most = 20_000, 64, 1024
	b := broker.New(broker.Config{Vault: everything{value: strings.Repeat("x", valueBytes)}, Logger: slog.New(slog.DiscardHandler)})
	defer b.Close(t.Context())
	before := heap()
	for i := range secrets {
		id, err := secret.ParseInstanceID(fmt.Sprintf("instance-%08d-of-a-customer", i))
		if err != nil {
			t.Fatal(err)
		}
		key, err := secret.NewKey(id, secret.RegistrationToken)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.Get(t.Context(), broker.Call{Caller: "spiffe://console.exto/console-api"}, broker.GetRequest{Key: key}); err != nil {
			t.Fatal(err)
		}
	}
	each := (heap() - before) / secrets
	runtime.KeepAlive(b)
	t.Logf("%d bytes for a secret of %d", each, valueBytes)
	if each-valueBytes > most {
		t.Errorf("a secret of %d bytes takes %d, want at most %d more", valueBytes, each, most)
	}
}

func heap() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}
