package keyvault_test

import (
	"testing"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/keyvault"
	"github.com/exto/secrets-broker/server/vault/vaulttest"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	f, c := start(t, keyvaultfake.Config{Limits: &keyvaultfake.Limits{}})
	vaulttest.Run(t, func(t *testing.T) vault.Vault {
		v, err := keyvault.Open(t.Context(), config(f, c, f.Broker()))
		if err != nil {
			t.Fatal(err)
		}
		return v
	})
}
