package broker

import (
	"context"
	"slices"

	"github.com/google/uuid"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// A vault may commit a write long after it was given up: after a later one, or
// after a restart. It cannot be fenced, so it is put down: what counts is written
// again on top, and the late version disabled.

// putDown puts down the late version of s, under the lock of the secret.
func (b *Broker) putDown(ctx context.Context, op *operation, s *snapshot) error {
	if s.current.Format > versions.CurrentFormat {
		return refuse(op.key, secret.KeyMismatch, "a newer release wrote this secret in a format that this one cannot write; upgrade the broker")
	}
	b.log.Warn("a version of the secret was committed late and is put down", "key", op.key.String(), "audit_id", op.AuditID,
		"late_version", s.late.Version, "late_generation", s.late.Generation, "generation", s.current.Generation)
	if s.state == Active {
		b.raiseEpoch(s.current.Epoch)
		r := s.current.Record
		r.Generation = max(r.Generation, b.highestOf(op.key, "", false)) + 1
		r.Epoch, r.AuditID = b.epoch.Load(), op.AuditID
		r.Made = done{Letter: versions.LetterPut, ID: uuid.NewString()}
		r.Others = slices.Clone(s.history(s.current))
		r.Others = r.Others[:min(len(r.Others), versions.Remembered)]
		after, err := b.set(ctx, op, s, s.value, r)
		if vault.IsUncertain(err) {
			b.pend(op.key, pendingWrite{value: s.value, record: r})
		}
		if err != nil {
			return err
		}
		b.see(op.key, after)
	}
	return b.disable(ctx, op, *s.late)
}

// disable disables a late version; its tags stay.
func (b *Broker) disable(ctx context.Context, op *operation, late version) error {
	if !late.Enabled {
		return nil
	}
	return b.settle(ctx, op, func(ctx context.Context) error {
		_, err := b.vault.Update(ctx, op.key, late.Version, vault.Patch{Tags: late.Tags})
		return err
	}, func(ctx context.Context) (bool, error) {
		all, err := b.vault.Versions(ctx, op.key)
		at := slices.IndexFunc(all, func(p vault.Properties) bool { return p.Version == late.Version })
		return err == nil && at >= 0 && !all[at].Enabled, err
	})
}

// repair puts down a late version that a read came upon, in the background.
func (b *Broker) repair(key secret.Key) {
	b.mu.Lock()
	if b.closing || b.repairing[key] {
		b.mu.Unlock()
		return
	}
	b.repairing[key] = true
	b.writes.Add(1)
	b.mu.Unlock()
	go func() {
		defer b.writes.Done()
		defer func() {
			b.mu.Lock()
			delete(b.repairing, key)
			b.mu.Unlock()
		}()
		ctx, cancel := context.WithTimeout(context.Background(), carryOn)
		defer cancel()
		op := newOperation(b.own(), key, versions.LetterPut, "")
		op.found.Action = ActionRepair
		_, err := do(b, ctx, op, func(ctx context.Context) (struct{}, error) {
			_, _, _, err := b.prepare(ctx, op)
			return struct{}{}, err
		})
		if err != nil {
			b.log.Warn("a late version is not put down yet; the next call for the secret tries again", "key", key.String(), "audit_id", op.AuditID, "error", err)
		}
	}()
}

// raiseEpoch makes the broker's own epoch greater than one that it found.
func (b *Broker) raiseEpoch(found int64) {
	for own := b.epoch.Load(); found > own; own = b.epoch.Load() {
		b.epoch.CompareAndSwap(own, found+1)
	}
}
