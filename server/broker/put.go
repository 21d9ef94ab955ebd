package broker

import (
	"context"
	"time"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
)

// PutRequest asks for a secret to hold a value, which is judged already.
type PutRequest struct {
	Key   secret.Key
	Value secret.Value
	// MustNotExist refuses to overwrite; MustMatchVersion, unless empty,
	// overwrites that version alone. At most one of them.
	MustNotExist     bool
	MustMatchVersion string
	// RequestID makes a retry safe; empty: this call has no retry.
	RequestID string
}

// PutResult is the version that holds the value, and whether it did already.
type PutResult struct {
	Metadata
	Unchanged bool
}

// Put creates or overwrites. A value equal to the current one makes no new
// version. Over a deleted secret it first recovers the name, where the mark of
// the broker's own delete keeps the old value from coming back to life, and then
// writes the first version that is served from then on.
func (b *Broker) Put(ctx context.Context, call Call, req PutRequest) (PutResult, error) {
	op := newOperation(call, req.Key, versions.LetterPut, req.RequestID)
	op.depth = b.depthFor(req.Key, req.MustMatchVersion == "")
	return do(b, ctx, op, func(ctx context.Context) (PutResult, error) {
		s, base, replay, err := b.prepare(ctx, op)
		if err != nil {
			return PutResult{}, err
		}
		if replay != nil {
			v, err := b.redo(ctx, s, *replay, req.Value)
			if err != nil {
				return PutResult{}, err
			}
			return PutResult{Metadata: s.metadata(v)}, nil
		}
		if op.again != nil && !op.again.value.Equal(req.Value) {
			return PutResult{}, errRequestIDReused(op.key)
		}
		switch {
		case req.MustNotExist && (s.state == Active || s.state == Disabled):
			return PutResult{}, refuse(op.key, secret.SecretExists, "the secret exists, and must_not_exist was set; leave it out to overwrite")
		case s.state == Disabled && req.MustMatchVersion == "":
			return PutResult{}, errDisabled(op.key)
		}
		if err := b.matches(ctx, s, req.MustMatchVersion); err != nil {
			return PutResult{}, err
		}
		if s.state == Active && s.value.Equal(req.Value) {
			return PutResult{Metadata: s.metadata(s.current), Unchanged: true}, nil
		}
		after, err := b.store(ctx, op, s, base, req.Value, record{})
		if err != nil {
			return PutResult{}, err
		}
		return PutResult{Metadata: after.metadata(after.current)}, nil
	})
}

// depthFor is how far a put looks. Over what is absent and over what is deleted it
// does the same, and the vault says so itself when a name is deleted. But a
// precondition is to be judged after the request id, which a deleted secret may
// know; and what was there a moment ago has generations to go on from.
func (b *Broker) depthFor(key secret.Key, alike bool) depth {
	_, known := b.knownOf(key)
	return depth(alike && !known)
}

// RotateRequest asks for a new value.
type RotateRequest struct {
	Key secret.Key
	// NewValue is judged already. Empty for a registration token, which Rotate
	// makes.
	NewValue secret.Value
	// Grace is how long the replaced version stays readable.
	Grace time.Duration
	// MustMatchVersion, unless empty, replaces that version alone.
	MustMatchVersion string
	// AllowMissing creates what is absent and overwrites what is deleted.
	AllowMissing bool
	// RequestID makes a retry safe; empty: this call has no retry.
	RequestID string
}

// RotateResult is the new version.
type RotateResult struct {
	Metadata
	// Previous is the version that was replaced; nil when there was none.
	Previous *Metadata
	// Token is the token that was made; empty for the other kinds.
	Token secret.Value
}

// Rotate replaces the value of an existing secret. The end of the replaced
// version's grace is written with the new version, so that nothing is left to be
// done afterwards.
func (b *Broker) Rotate(ctx context.Context, call Call, req RotateRequest) (RotateResult, error) {
	op := newOperation(call, req.Key, versions.LetterRotate, req.RequestID)
	op.depth = b.depthFor(req.Key, req.MustMatchVersion == "" && req.AllowMissing)
	return do(b, ctx, op, func(ctx context.Context) (RotateResult, error) {
		s, base, replay, err := b.prepare(ctx, op)
		if err != nil {
			return RotateResult{}, err
		}
		if replay != nil {
			return b.redoRotate(ctx, s, *replay, req.NewValue)
		}
		if op.again != nil && !req.NewValue.IsEmpty() && !op.again.value.Equal(req.NewValue) {
			return RotateResult{}, errRequestIDReused(op.key)
		}
		// A vault that discards has nothing to rotate, and the contract lets it.
		missing := req.AllowMissing || b.discards
		if !missing {
			if err := b.surelyAbsent(ctx, s); err != nil {
				return RotateResult{}, err
			}
		}
		switch {
		case s.state == Absent && !missing:
			return RotateResult{}, errNotFound(op.key)
		case s.state == Deleted && !missing:
			return RotateResult{}, refuse(op.key, secret.SecretDeleted, "the secret is deleted; recover it, or set allow_missing to overwrite it")
		case s.state == Disabled && req.MustMatchVersion == "":
			return RotateResult{}, errDisabled(op.key)
		}
		if err := b.matches(ctx, s, req.MustMatchVersion); err != nil {
			return RotateResult{}, err
		}
		var made secret.Value
		value := req.NewValue
		if op.key.Kind() == secret.RegistrationToken {
			// One token for one operation, however often it is judged or sent.
			switch {
			case op.again != nil:
				op.minted = op.again.value
			case op.minted.IsEmpty():
				op.minted = secret.MintToken()
			}
			made = op.minted
			value = made
		}
		if s.state == Active && s.value.Equal(value) {
			return RotateResult{}, refuse(op.key, secret.ValueUnchanged, "new_value is the current value; a rotation needs another one")
		}
		var r record
		replaces := s.state == Active || s.state == Disabled
		if replaces {
			r.Previous, r.GraceEnd = s.current.Version, b.now().Add(req.Grace)
		}
		after, err := b.store(ctx, op, s, base, value, r)
		if err != nil {
			return RotateResult{}, err
		}
		result := RotateResult{Metadata: after.metadata(after.current), Token: made}
		if replaces {
			previous := s.metadata(s.current)
			// As the tag has it, so that a repeated call says the same.
			previous.ExpireTime = after.current.GraceEnd
			result.Previous = &previous
		}
		return result, nil
	})
}

// redoRotate gives the result of a rotate that was done already. A token comes
// with it only while Get would give it.
func (b *Broker) redoRotate(ctx context.Context, s *snapshot, d done, value secret.Value) (RotateResult, error) {
	v, err := b.redo(ctx, s, d, value)
	if err != nil {
		return RotateResult{}, err
	}
	var result RotateResult
	if s.key.Kind() == secret.RegistrationToken {
		if _, result.Token, err = b.valueOf(ctx, s, v.Version); err != nil {
			return RotateResult{}, withCommit(vaultError(ctx, s.key, err), secret.Applied)
		}
	}
	result.Metadata = s.metadata(v)
	if v.Previous != "" {
		previous, ok, err := b.find(ctx, s, v.Previous)
		if err != nil {
			return RotateResult{}, withCommit(vaultError(ctx, s.key, err), secret.Applied)
		}
		if ok {
			m := s.metadata(previous)
			result.Previous = &m
		}
	}
	return result, nil
}
