package broker

import (
	"context"

	"github.com/exto/secrets-broker/secret"
)

// Description is all that is known of a secret but its value.
type Description struct {
	Metadata
	// Redacted is what may be shown of the value; empty unless Active.
	Redacted string
	// Versions are all versions, the current one first, then newest first; of a
	// deleted secret the current one alone.
	Versions []Metadata
}

// Describe reads what is known of a secret from the vault.
func (b *Broker) Describe(ctx context.Context, call Call, key secret.Key) (Description, error) {
	ctx = call.on(ctx)
	d, err := steady(func() (Description, error) { return b.describe(ctx, key) })
	if err != nil {
		return Description{}, vaultError(ctx, key, err)
	}
	return d, nil
}

func (b *Broker) describe(ctx context.Context, key secret.Key) (Description, error) {
	aside := b.cache.aside(key)
	defer b.cache.over(key, aside)
	s, err := b.load(ctx, key, whole)
	if err != nil {
		return Description{}, err
	}
	b.offer(s, aside)
	if s.hasLate() {
		b.repair(key)
	}
	d := Description{Metadata: s.metadata(s.current)}
	switch s.state {
	case Absent:
		return Description{}, errNotFound(key)
	case Deleted:
		d.Versions = []Metadata{d.Metadata}
		return d, nil
	case Active:
		d.Redacted = secret.Redact(key.Kind(), s.value)
	}
	if err := b.list(ctx, s); err != nil {
		return Description{}, err
	}
	for _, v := range s.listed {
		d.Versions = append(d.Versions, s.metadata(v))
	}
	return d, nil
}
