package brokertest

import (
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// Person is somebody with rights in the vault, who uses it without the broker and
// is hindered by none of its switches. The broker sees what a Person did within
// CacheTTL. What can't be done fails the test.
type Person struct{ b *Broker }

// Person is somebody with rights in this broker's vault.
func (b *Broker) Person() Person { return Person{b} }

// Set stores a value, checked by nobody: it is of generation 0. A deleted secret
// has to be recovered before.
func (p Person) Set(key secret.Key, value secret.Value) {
	p.b.t.Helper()
	_, err := p.b.store.Set(p.b.t.Context(), key, vault.NewVersion{Value: value})
	p.check("sets", key, err)
}

// Disable disables the current version.
func (p Person) Disable(key secret.Key) {
	p.b.t.Helper()
	now, _, err := p.b.store.Get(p.b.t.Context(), key, "")
	if err == nil {
		_, err = p.b.store.Update(p.b.t.Context(), key, now.Version, vault.Patch{Tags: now.Tags})
	}
	p.check("disables", key, err)
}

// Delete soft-deletes a secret.
func (p Person) Delete(key secret.Key) {
	p.b.t.Helper()
	_, err := p.b.store.Delete(p.b.t.Context(), key)
	p.check("deletes", key, err)
}

// Recover undoes a Delete. One of the broker's leaves the secret deleted for
// callers, until its newest version is enabled.
func (p Person) Recover(key secret.Key) {
	p.b.t.Helper()
	p.check("recovers", key, p.b.store.Recover(p.b.t.Context(), key))
}

func (p Person) check(what string, key secret.Key, err error) {
	p.b.t.Helper()
	if err != nil {
		p.b.t.Fatalf("brokertest: a person %s %s: %v", what, key, err)
	}
}
