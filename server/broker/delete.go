package broker

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// DeleteRequest asks for a secret to be deleted.
type DeleteRequest struct {
	Key secret.Key
	// MustMatchVersion, unless empty, deletes only while that version is current.
	MustMatchVersion string
	// AllowMissing makes it a success that there is nothing to delete.
	AllowMissing bool
	// RequestID makes a retry safe; empty: this call has no retry.
	RequestID string
}

// Delete marks, then deletes. One Update disables the current version and writes
// the mark: from then on the secret is Deleted to every caller, and the value
// out of reach for those who read the vault directly. Then the vault's own
// delete. Whoever has the next operation on a secret that is marked but live
// goes on from there. The result is nil when there was nothing to delete.
func (b *Broker) Delete(ctx context.Context, call Call, req DeleteRequest) (*Metadata, error) {
	op := newOperation(call, req.Key, versions.LetterDelete, req.RequestID)
	return do(b, ctx, op, func(ctx context.Context) (*Metadata, error) {
		s, base, replay, err := b.prepare(ctx, op)
		if err != nil {
			return nil, err
		}
		if s.state == Deleted && s.live {
			// A delete that did not come to its end, this one or an earlier one.
			if err := b.finishDelete(ctx, op, s); err != nil {
				if replay != nil {
					err = withCommit(vaultError(ctx, op.key, err), secret.Applied)
				}
				return nil, err
			}
		}
		if replay != nil {
			return b.replayed(ctx, s, *replay)
		}
		if s.state == Absent && b.discards {
			return b.discardDelete(ctx, op, s, req.MustMatchVersion)
		}
		if err := b.surelyAbsent(ctx, s); err != nil {
			return nil, err
		}
		if s.state == Absent || s.state == Deleted {
			if !req.AllowMissing {
				return nil, errNotFound(op.key)
			}
			if s.state == Absent {
				return nil, nil
			}
			m := s.metadata(s.current)
			return &m, nil
		}
		if err := b.matches(ctx, s, req.MustMatchVersion); err != nil {
			return nil, err
		}

		now := b.now()
		r := b.carried(s, base)
		if s.current.Deleted != nil { // of a delete that a person undid by enabling
			r.Others = s.deletesAndOthers(base)
		}
		r.Deleted = &versions.Mark{At: now, WasEnabled: s.state == Active, ID: op.id}
		r.EndGrace(now)
		if err := b.update(ctx, op, s, r, false, func(landed version) bool {
			return landed.Deleted != nil && landed.Deleted.ID == op.id
		}); err != nil {
			return nil, err
		}
		s.state, s.deletedAt = Deleted, now
		if err := b.finishDelete(ctx, op, s); err != nil {
			e := vaultError(ctx, op.key, err)
			e.Message = "the secret is deleted for every caller of the broker, but the vault has yet to delete it: the same request ends that. " + e.Message
			return nil, withCommit(e, secret.Applied)
		}
		s.asOf = op.sentAt
		op.after = b.left(s)
		m := s.metadata(s.current)
		return &m, nil
	})
}

// surelyAbsent takes a name for absent only when the vault confirms it: one that
// is being deleted or recovered is found nowhere either. Otherwise the operation
// is to be judged again, by what has become of it.
func (b *Broker) surelyAbsent(ctx context.Context, s *snapshot) error {
	if s.state != Absent || b.discards {
		return nil
	}
	err := b.vault.Settle(ctx, s.key)
	switch {
	case errors.Is(err, vault.ErrNotFound):
		b.forget(s.key)
		return nil
	case err == nil:
		return errUnlike
	}
	return err
}

// finishDelete deletes a marked or hidden name in the vault.
func (b *Broker) finishDelete(ctx context.Context, op *operation, s *snapshot) error {
	var d vault.Deleted
	err := b.settle(ctx, op, func(ctx context.Context) (err error) {
		d, err = b.vault.Delete(ctx, op.key)
		return err
	}, func(ctx context.Context) (bool, error) {
		_, _, err := b.vault.Get(ctx, op.key, "")
		if errors.Is(err, vault.ErrDisabled) {
			return false, nil
		}
		return errors.Is(err, vault.ErrNotFound), ignore(err, vault.ErrNotFound)
	})
	if err = ignore(err, vault.ErrNotFound); err != nil {
		return err
	}
	b.unhide(op.key)
	s.live = false
	if d.DeletedAt.IsZero() {
		// Deleted by a request whose answer was lost. It may take the vault a while to
		// show it; what it would say is not worth that.
		d, _ = b.vault.GetDeleted(ctx, op.key)
	}
	if !d.DeletedAt.IsZero() {
		s.deletedAt, s.purgeAt = d.DeletedAt, d.PurgeAt
	}
	return nil
}

// ignore takes an error that means success for nil.
func ignore(err, harmless error) error {
	if errors.Is(err, harmless) && !vault.IsUncertain(err) {
		return nil
	}
	return err
}

// discardDelete is Delete in a vault that keeps nothing.
func (b *Broker) discardDelete(ctx context.Context, op *operation, s *snapshot, mustMatch string) (*Metadata, error) {
	if err := b.matches(ctx, s, mustMatch); err != nil {
		return nil, err
	}
	d, err := b.vault.Delete(ctx, op.key)
	if err != nil {
		return nil, err
	}
	return &Metadata{Key: op.key, Version: d.Version, Generation: 1, State: Deleted, CreateTime: d.Created, DeleteTime: d.DeletedAt}, nil
}

// RecoverRequest asks for a deleted secret to be brought back.
type RecoverRequest struct {
	Key secret.Key
	// RequestID makes a retry safe; empty: this call has no retry.
	RequestID string
}

// Recover undoes a delete: first the vault's own recover, then one Update that
// takes the mark away and restores what it says. Until that Update the secret
// is still Deleted, unless somebody else deleted it and there is no mark.
func (b *Broker) Recover(ctx context.Context, call Call, req RecoverRequest) (Metadata, error) {
	op := newOperation(call, req.Key, versions.LetterRecover, req.RequestID)
	return do(b, ctx, op, func(ctx context.Context) (Metadata, error) {
		s, base, replay, err := b.prepare(ctx, op)
		if err != nil {
			return Metadata{}, err
		}
		if replay != nil {
			m, err := b.replayed(ctx, s, *replay)
			if err != nil {
				return Metadata{}, err
			}
			return *m, nil
		}
		if err := b.surelyAbsent(ctx, s); err != nil {
			return Metadata{}, err
		}
		switch s.state {
		case Absent:
			return Metadata{}, errNotFound(op.key)
		case Active, Disabled:
			return Metadata{}, refuse(op.key, secret.SecretNotDeleted, "the secret is not deleted, so there is nothing to recover")
		}
		marked := s.current.Marked()
		if !s.live {
			if err := b.bringBack(ctx, op); err != nil {
				if vault.IsUncertain(err) && marked {
					err = withCommit(vaultError(ctx, op.key, err), secret.NotApplied) // by the mark
				}
				return Metadata{}, err
			}
			ctx = carried(ctx)
			if base, err = b.afterRecover(ctx, s); err != nil {
				return Metadata{}, b.recovered(ctx, op, marked, err)
			}
			marked = s.current.Marked()
		}
		enabled, err := b.unmark(ctx, op, s, base)
		if err != nil {
			return Metadata{}, b.recovered(ctx, op, marked, err)
		}
		b.unhide(op.key)
		s.state, s.deletedAt, s.purgeAt, s.asOf = Active, time.Time{}, time.Time{}, op.sentAt
		if !enabled {
			s.state = Disabled
		}
		op.after = b.left(s)
		op.after.partial = enabled // what was deleted was not read
		return s.metadata(s.current), nil
	})
}

// unmark makes the current version what it was before the delete, and names the
// recover on it. It reports whether the version is enabled.
func (b *Broker) unmark(ctx context.Context, op *operation, s *snapshot, base version) (enabled bool, err error) {
	r := b.carried(s, base)
	r.Others = append([]done{{Letter: versions.LetterRecover, ID: op.id, Version: s.current.Version}}, s.deletesAndOthers(base)...)
	r.Others = r.Others[:min(len(r.Others), s.room(base))]
	enabled = s.current.Enabled
	if s.current.Marked() {
		enabled = s.current.Deleted.WasEnabled
	}
	r.Deleted = nil
	r.EndGrace(b.now())
	return enabled, b.update(ctx, op, s, r, enabled, func(landed version) bool {
		return len(landed.Others) > 0 && landed.Others[0].ID == op.id
	})
}

// recovered says of a failure after the vault's recover whether the secret is
// back: by the mark it is not; without one it is.
func (b *Broker) recovered(ctx context.Context, op *operation, marked bool, err error) error {
	if marked {
		return err
	}
	return withCommit(vaultError(ctx, op.key, err), secret.Applied)
}

// carried is the record of the current version for an Update of it. Where the
// version is not the broker's own, it takes over what must not be lost from the
// last one that is.
func (b *Broker) carried(s *snapshot, base version) record {
	r := s.current.Record
	if base.Version != s.current.Version && len(r.Others) == 0 {
		r.Others = s.history(base)
		r.Others = r.Others[:min(len(r.Others), versions.Remembered)]
		r.First = base.First
	}
	return r
}

// deletesAndOthers is the history without the write that made the current
// version, which has a tag of its own.
func (s *snapshot) deletesAndOthers(base version) []done {
	var h []done
	for _, d := range s.history(base) {
		if d.ID != s.current.Made.ID {
			h = append(h, d)
		}
	}
	return h
}

// room is how many other operations a version without mark has to name. The
// write that made it has a tag of its own and counts, until so many deletes and
// recovers followed that it is forgotten; or there is none.
func (s *snapshot) room(base version) int {
	made := slices.IndexFunc(s.history(base), func(d done) bool { return d.ID == s.current.Made.ID })
	if made >= 0 && made < versions.Remembered { // one more operation is about to come before it
		return versions.Remembered
	}
	return versions.Remembered + 1
}

// update writes r and enabled onto the current version of s, and settles an
// unknown outcome by looking whether it landed.
func (b *Broker) update(ctx context.Context, op *operation, s *snapshot, r record, enabled bool, landed func(version) bool) error {
	var props vault.Properties
	err := b.settle(ctx, op, func(ctx context.Context) (err error) {
		props, err = b.vault.Update(ctx, op.key, s.current.Version, vault.Patch{Enabled: enabled, Tags: b.encode(r, s)})
		return err
	}, func(ctx context.Context) (bool, error) {
		now, err := b.load(ctx, op.key, whole)
		if err != nil {
			return false, err
		}
		props = now.current.Properties
		return landed(now.current), nil
	})
	if err != nil {
		return err
	}
	s.current = versions.New(props)
	s.listed = nil
	op.wrote = s.current
	b.see(op.key, s.current) // found again, where it was missing in between
	return nil
}

// replayed gives the result of a delete or recover that was done already.
func (b *Broker) replayed(ctx context.Context, s *snapshot, d done) (*Metadata, error) {
	v, err := b.redo(ctx, s, d, secret.Value{})
	if err != nil {
		return nil, err
	}
	m := s.metadata(v)
	return &m, nil
}
