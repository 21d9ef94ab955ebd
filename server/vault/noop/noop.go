// Package noop is the vault that keeps nothing: writes succeed and are
// forgotten, reads find nothing. It lets a program that needs a broker run where
// no secrets are wanted, and says so in the log at every call.
package noop

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// Vault implements vault.Vault and discards what it is given.
type Vault struct {
	log    *slog.Logger
	closed atomic.Bool
}

var _ vault.Vault = (*Vault)(nil)

// New makes a Vault that warns in logger; nil is slog.Default.
func New(logger *slog.Logger) *Vault {
	if logger == nil {
		logger = slog.Default()
	}
	return &Vault{log: logger}
}

// begin is what every call does first. The warning names the operation and the
// key, never a value.
func (v *Vault) begin(ctx context.Context, operation string, key secret.Key) error {
	if err := v.Check(ctx); err != nil {
		return err
	}
	v.log.LogAttrs(ctx, slog.LevelWarn, "the noop secret store keeps nothing",
		slog.String("operation", operation), slog.String("key", key.String()))
	return nil
}

// Set makes up a version and forgets it.
func (v *Vault) Set(ctx context.Context, key secret.Key, nv vault.NewVersion) (vault.Properties, error) {
	if err := v.begin(ctx, "Set", key); err != nil {
		return vault.Properties{}, err
	}
	if err := vault.BeginEffect(ctx); err != nil {
		return vault.Properties{}, err
	}
	if err := nv.Tags.Check(); err != nil {
		return vault.Properties{}, err
	}
	return vault.Properties{
		Key:         key,
		Version:     newVersion(),
		Enabled:     true,
		Created:     now(),
		ContentType: nv.ContentType,
		Tags:        nv.Tags.Clone(),
	}, nil
}

// Get finds nothing.
func (v *Vault) Get(ctx context.Context, key secret.Key, _ string) (vault.Properties, secret.Value, error) {
	return vault.Properties{}, secret.Value{}, v.nothing(ctx, "Get", key)
}

// Versions finds nothing.
func (v *Vault) Versions(ctx context.Context, key secret.Key) ([]vault.Properties, error) {
	return nil, v.nothing(ctx, "Versions", key)
}

// Update finds nothing.
func (v *Vault) Update(ctx context.Context, key secret.Key, _ string, _ vault.Patch) (vault.Properties, error) {
	return vault.Properties{}, v.nothing(ctx, "Update", key)
}

// Delete succeeds for every name. There is nothing to purge: PurgeAt is zero.
func (v *Vault) Delete(ctx context.Context, key secret.Key) (vault.Deleted, error) {
	if err := v.begin(ctx, "Delete", key); err != nil {
		return vault.Deleted{}, err
	}
	if err := vault.BeginEffect(ctx); err != nil {
		return vault.Deleted{}, err
	}
	return vault.Deleted{
		Properties: vault.Properties{Key: key, Version: newVersion(), Enabled: true, Created: now()},
		DeletedAt:  now(),
	}, nil
}

// GetDeleted finds nothing.
func (v *Vault) GetDeleted(ctx context.Context, key secret.Key) (vault.Deleted, error) {
	return vault.Deleted{}, v.nothing(ctx, "GetDeleted", key)
}

// Recover finds nothing.
func (v *Vault) Recover(ctx context.Context, key secret.Key) error {
	return v.nothing(ctx, "Recover", key)
}

// Settle finds nothing.
func (v *Vault) Settle(ctx context.Context, key secret.Key) error {
	return v.nothing(ctx, "Settle", key)
}

// List is empty.
func (v *Vault) List(ctx context.Context, skip string, _ int) (vault.Page, error) {
	return vault.Page{}, v.list(ctx, "List", skip)
}

// ListDeleted is empty.
func (v *Vault) ListDeleted(ctx context.Context, skip string, _ int) (vault.Page, error) {
	return vault.Page{}, v.list(ctx, "ListDeleted", skip)
}

// Check is nil until Close. It does not warn, since probes call it all the time.
func (v *Vault) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if v.closed.Load() {
		return fmt.Errorf("%w: closed", vault.ErrUnavailable)
	}
	return nil
}

// Info says that this vault discards.
func (v *Vault) Info() vault.Info { return vault.Info{Name: "noop", Discards: true} }

// Close makes all further calls ErrUnavailable. It may be called again.
func (v *Vault) Close() error {
	v.closed.Store(true)
	return nil
}

func (v *Vault) nothing(ctx context.Context, operation string, key secret.Key) error {
	if err := v.begin(ctx, operation, key); err != nil {
		return err
	}
	return vault.ErrNotFound
}

// list gives no page, and so takes no skip either.
func (v *Vault) list(ctx context.Context, operation, skip string) error {
	if err := v.begin(ctx, operation, secret.Key{}); err != nil {
		return err
	}
	if skip != "" {
		return vault.ErrSkip
	}
	return nil
}

func now() time.Time { return time.Now().UTC().Truncate(time.Second) }

func newVersion() string {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails: crypto/rand ends the process instead
	return hex.EncodeToString(id[:])
}
