package vaulttest

import (
	"context"
	"slices"
	"strings"
	"sync"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// Before is asked before a call is made; op is the method's name, such as "Set".
// After an error from it the call is not made and ends with that error. It may
// block. The key of List, ListDeleted and Check is the zero Key.
type Before func(ctx context.Context, op string, key secret.Key) error

// After is told how a call that was made ended, and says how it shall end: an
// error instead of nil is an answer that was lost on its way.
type After func(ctx context.Context, op string, key secret.Key, err error) error

// Faulty is a vault whose calls can be made to fail, before or after they took
// effect. It is safe for concurrent use.
type Faulty struct {
	vault.Vault

	mu     sync.Mutex
	before Before
	after  After
	calls  []string
}

var _ vault.Vault = (*Faulty)(nil)

// NewFaulty wraps v; until a hook is set it does what v does.
func NewFaulty(v vault.Vault) *Faulty { return &Faulty{Vault: v} }

// SetBefore sets the hook for all calls that begin from now on; nil is none.
func (f *Faulty) SetBefore(hook Before) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before = hook
}

// SetAfter sets the hook for all calls that end from now on; nil is none.
func (f *Faulty) SetAfter(hook After) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.after = hook
}

// Calls lists the calls so far in the order in which they began, each as "Op key":
// those too that a hook refused, but not Info and Close.
func (f *Faulty) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

var changes = map[string]bool{"Set": true, "Update": true, "Delete": true, "Recover": true}

// around makes one call with the hooks about it. The hooks run unlocked, so that
// one may block while other calls go on.
func around[T any](ctx context.Context, f *Faulty, op string, key secret.Key, call func() (T, error)) (T, error) {
	var zero T
	f.mu.Lock()
	f.calls = append(f.calls, strings.TrimSpace(op+" "+key.String()))
	before := f.before
	f.mu.Unlock()
	if changes[op] { // the hooks stand for the way to the vault: it was sent
		if err := vault.BeginEffect(ctx); err != nil {
			return zero, err
		}
	}
	if before != nil {
		if err := before(ctx, op, key); err != nil {
			return zero, err
		}
	}
	result, err := call()
	f.mu.Lock()
	after := f.after
	f.mu.Unlock()
	if after != nil {
		err = after(ctx, op, key, err)
	}
	if err != nil {
		return zero, err
	}
	return result, nil
}

// Set is the wrapped Set between the hooks, as are the methods below.
func (f *Faulty) Set(ctx context.Context, key secret.Key, v vault.NewVersion) (vault.Properties, error) {
	return around(ctx, f, "Set", key, func() (vault.Properties, error) { return f.Vault.Set(ctx, key, v) })
}

func (f *Faulty) Get(ctx context.Context, key secret.Key, version string) (vault.Properties, secret.Value, error) {
	type result struct {
		p vault.Properties
		v secret.Value
	}
	r, err := around(ctx, f, "Get", key, func() (result, error) {
		p, v, err := f.Vault.Get(ctx, key, version)
		return result{p, v}, err
	})
	return r.p, r.v, err
}

func (f *Faulty) Versions(ctx context.Context, key secret.Key) ([]vault.Properties, error) {
	return around(ctx, f, "Versions", key, func() ([]vault.Properties, error) { return f.Vault.Versions(ctx, key) })
}

func (f *Faulty) Update(ctx context.Context, key secret.Key, version string, p vault.Patch) (vault.Properties, error) {
	return around(ctx, f, "Update", key, func() (vault.Properties, error) { return f.Vault.Update(ctx, key, version, p) })
}

func (f *Faulty) Delete(ctx context.Context, key secret.Key) (vault.Deleted, error) {
	return around(ctx, f, "Delete", key, func() (vault.Deleted, error) { return f.Vault.Delete(ctx, key) })
}

func (f *Faulty) GetDeleted(ctx context.Context, key secret.Key) (vault.Deleted, error) {
	return around(ctx, f, "GetDeleted", key, func() (vault.Deleted, error) { return f.Vault.GetDeleted(ctx, key) })
}

func (f *Faulty) Recover(ctx context.Context, key secret.Key) error {
	_, err := around(ctx, f, "Recover", key, func() (struct{}, error) { return struct{}{}, f.Vault.Recover(ctx, key) })
	return err
}

func (f *Faulty) Settle(ctx context.Context, key secret.Key) error {
	_, err := around(ctx, f, "Settle", key, func() (struct{}, error) { return struct{}{}, f.Vault.Settle(ctx, key) })
	return err
}

func (f *Faulty) List(ctx context.Context, skip string, max int) (vault.Page, error) {
	return around(ctx, f, "List", secret.Key{}, func() (vault.Page, error) { return f.Vault.List(ctx, skip, max) })
}

func (f *Faulty) ListDeleted(ctx context.Context, skip string, max int) (vault.Page, error) {
	return around(ctx, f, "ListDeleted", secret.Key{}, func() (vault.Page, error) { return f.Vault.ListDeleted(ctx, skip, max) })
}

func (f *Faulty) Check(ctx context.Context) error {
	_, err := around(ctx, f, "Check", secret.Key{}, func() (struct{}, error) { return struct{}{}, f.Vault.Check(ctx) })
	return err
}
