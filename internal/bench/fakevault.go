package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

// fakeVault is how a broker finds a Key Vault in memory.
type fakeVault struct {
	Env []string // in the form of os.Environ
	CA  []byte   // PEM
}

// runFake is the process of a Key Vault in memory: apart from the broker, so that
// what the vault costs is not counted. It takes as many requests as come. It ends
// with its standard input.
func runFake(ctx context.Context, out io.Writer) (err error) {
	fake, err := keyvaultfake.Start(keyvaultfake.Config{Limits: &keyvaultfake.Limits{}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fake.Close()) }()
	found := fakeVault{slices.Concat(fake.Env(), fake.Broker().Env()), fake.CAPEM()}
	if err := json.NewEncoder(out).Encode(found); err != nil {
		return err
	}
	untilReleased(ctx, os.Stdin)
	return nil
}
