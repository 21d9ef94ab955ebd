package broker

import (
	"context"
	"time"

	"github.com/exto/secrets-broker/secret"
)

// GetRequest asks for a value.
type GetRequest struct {
	Key secret.Key
	// Version is the wanted version; empty: the current one.
	Version string
	// MinGeneration is the lowest generation that will do, but that 0 always does.
	MinGeneration int64
	// KnownVersion, when it is the current version, is answered without value.
	KnownVersion string
}

// GetResult is a value, or that it is not modified.
type GetResult struct {
	Metadata
	Value       secret.Value
	NotModified bool
	// AsOf is when the vault was asked.
	AsOf time.Time
}

// Get reads a value from the vault.
func (b *Broker) Get(ctx context.Context, call Call, req GetRequest) (GetResult, error) {
	ctx = call.on(ctx)
	result, err := steady(func() (GetResult, error) { return b.get(ctx, req) })
	if err != nil {
		return GetResult{}, vaultError(ctx, req.Key, err)
	}
	return result, nil
}

func (b *Broker) get(ctx context.Context, req GetRequest) (GetResult, error) {
	s, err := b.load(ctx, req.Key, whole)
	if err != nil {
		return GetResult{}, err
	}
	if s.hasLate() {
		b.repair(req.Key)
	}
	want := req.Version
	if want == "" {
		want = s.current.Version
	}
	v, value, err := b.valueOf(ctx, s, want)
	if err != nil {
		return GetResult{}, err
	}
	if v.generation > 0 && v.generation < req.MinGeneration {
		return GetResult{}, refuse(req.Key, secret.StalenessUnsatisfiable, "the vault holds generation %d, which is below min_generation %d", v.generation, req.MinGeneration)
	}
	result := GetResult{Metadata: s.metadata(v), Value: value, AsOf: s.asOf}
	if v.Version == s.current.Version && v.Version == req.KnownVersion {
		result.Value, result.NotModified = secret.Value{}, true
	}
	return result, nil
}

// valueOf judges whether a version may be read, and reads it.
func (b *Broker) valueOf(ctx context.Context, s *snapshot, id string) (version, secret.Value, error) {
	if s.state == Absent || s.state == Deleted {
		return version{}, secret.Value{}, errNotFound(s.key)
	}
	if id == s.current.Version {
		if s.state == Disabled {
			return version{}, secret.Value{}, refuse(s.key, secret.SecretDisabled, "somebody disabled this secret in the vault; have it enabled there")
		}
		return s.current, s.value, nil
	}
	v, ok, err := b.find(ctx, s, id)
	switch {
	case err != nil:
		return version{}, secret.Value{}, err
	case !ok:
		return version{}, secret.Value{}, refuse(s.key, secret.VersionNotFound, "the secret has no such version; DescribeSecret lists those it has")
	case !s.served(v):
		return version{}, secret.Value{}, refuse(s.key, secret.VersionExpired, "this version is from before the secret was deleted and overwritten; read the current one")
	}
	if end := s.expiry(v); !end.IsZero() && !b.now().Before(end) {
		return version{}, secret.Value{}, refuse(s.key, secret.VersionExpired, "this version was replaced by a rotation and its grace is over; read the current one")
	}
	if !v.Enabled {
		return version{}, secret.Value{}, refuse(s.key, secret.SecretDisabled, "this version is disabled in the vault; read the current one")
	}
	props, value, err := b.vault.Get(ctx, s.key, id)
	if err != nil {
		return version{}, secret.Value{}, err
	}
	return newVersion(props), value, nil
}

func errNotFound(key secret.Key) error {
	return refuse(key, secret.SecretNotFound, "there is no such secret, or it is deleted")
}

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
	s, err := b.load(ctx, key, whole)
	if err != nil {
		return Description{}, err
	}
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
