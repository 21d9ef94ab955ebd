package broker

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// store writes a new version on top of s: that of a put or a rotate. previous
// and its grace are set by a rotate that replaces something.
func (b *Broker) store(ctx context.Context, op *operation, s *snapshot, base version, value secret.Value, r record) (*snapshot, error) {
	over := s.state == Deleted
	// Deleted by somebody else: once recovered it is live, and nothing but the
	// broker's memory keeps it from being read.
	recovered := over && !s.current.Marked()
	if over && !s.live {
		if recovered {
			b.hide(s)
		}
		if err := b.bringBack(ctx, op); err != nil {
			if !vault.IsUncertain(err) {
				b.unhide(op.key)
			}
			return nil, err
		}
		ctx = carried(ctx)
		var err error
		if base, err = b.afterRecover(ctx, s); err != nil {
			return nil, b.deleteAgain(ctx, op, recovered, err)
		}
	}

	taken := max(base.Generation, b.highestOf(op.key, op.id, s.state == Absent))
	r.Generation, r.CreatedBy = taken+1, op.Caller
	r.Epoch, r.AuditID = b.epoch.Load(), op.AuditID
	r.Made = done{Letter: op.letter, ID: op.id}
	r.Others = s.history(base)
	r.Others = r.Others[:min(len(r.Others), versions.Remembered)]
	r.First = base.First
	if over {
		r.First = r.Generation
	}
	if again := op.again; again != nil && !s.sameWrite(&r, *again, taken) {
		// What was sent before says something else of the secret: should it arrive, it
		// is a late one.
		r.Generation = max(taken, again.Generation) + 1
		r.Epoch = b.epoch.Add(1)
		if over {
			r.First = r.Generation
		}
	}
	after, err := b.set(ctx, op, s, value, r)
	switch {
	case vault.IsUncertain(err):
		op.again = &pendingWrite{value: value, record: r}
		b.pend(op.key, *op.again)
		return nil, err
	case err != nil:
		return nil, b.deleteAgain(ctx, op, recovered, err)
	}
	if s.state == Absent {
		b.forget(op.key)
	}
	op.wrote = after
	b.see(op.key, after)
	b.settled(op.key, op.id)
	b.unhide(op.key)
	if s.late != nil {
		if err := b.disable(ctx, op, *s.late); err != nil {
			// It is covered by what was written, and from before the delete: not served.
			b.log.Warn("a late version is not disabled", "key", op.key.String(), "audit_id", op.AuditID, "version", s.late.Version, "error", err)
		}
	}
	written := &snapshot{key: op.key, asOf: op.sentAt, state: Active, live: true, current: after, value: value}
	op.after = b.left(written)
	if s.state == Active {
		replaced := b.olderOf(s, s.current, s.value, nil)
		replaced.ExpireTime = after.GraceEnd
		op.after = op.after.with(replaced)
	}
	return written, nil
}

// sameWrite reports whether r would be the very write that was sent before, and
// makes it that: nothing came since, and it says the same of the secret. Two
// versions of one write are one to everybody, so they must not differ.
func (s *snapshot) sameWrite(r *record, again pendingWrite, taken int64) bool {
	same := *r
	same.Generation, same.Epoch, same.AuditID = again.Generation, again.Epoch, again.AuditID
	if same.First == r.Generation {
		same.First = same.Generation
	}
	now, _ := same.Encode(s.key, s.current.Tags)
	then, _ := again.Encode(s.key, s.current.Tags)
	if again.Generation <= taken || again.Epoch != r.Epoch || !maps.Equal(now, then) {
		return false
	}
	*r = same
	return true
}

// set makes one new version of what r says.
func (b *Broker) set(ctx context.Context, op *operation, s *snapshot, value secret.Value, r record) (version, error) {
	v := vault.NewVersion{First: s.state == Absent, Value: value, ContentType: s.current.ContentType, Tags: b.encode(r, s)}
	var props vault.Properties
	err := b.settle(ctx, op, func(ctx context.Context) (err error) {
		props, err = b.vault.Set(ctx, op.key, v)
		return err
	}, func(ctx context.Context) (there bool, err error) {
		props, there, err = b.landed(ctx, s, r)
		return there, err
	})
	return versions.New(props), err
}

// bringBack recovers a deleted name in the vault.
func (b *Broker) bringBack(ctx context.Context, op *operation) error {
	return b.settle(ctx, op, func(ctx context.Context) error {
		return b.vault.Recover(ctx, op.key)
	}, func(ctx context.Context) (bool, error) {
		_, _, err := b.vault.Get(ctx, op.key, "")
		if errors.Is(err, vault.ErrNotFound) {
			return false, nil
		}
		if errors.Is(err, vault.ErrDisabled) {
			return true, nil
		}
		return err == nil, err
	})
}

// afterRecover looks at what has come back with a name: what the vault showed of it
// while it was deleted was its newest version, which may be a late one. It gives
// the version that the next write counts on.
func (b *Broker) afterRecover(ctx context.Context, s *snapshot) (version, error) {
	s.live, s.listed = true, nil
	if err := b.listVersions(ctx, s); err != nil {
		return version{}, err
	}
	if greatest := s.listed.Greatest(); s.current.Generation > 0 && greatest.Beats(s.current) {
		s.putBehind(greatest)
	}
	base, err := b.base(ctx, s)
	b.raiseEpoch(base.Epoch)
	return base, err
}

// deleteAgain undoes the recover of a secret that somebody else had deleted,
// when the put over it failed. Should that fail too, the version stays hidden
// until the next write of the secret.
func (b *Broker) deleteAgain(ctx context.Context, op *operation, recovered bool, cause error) error {
	if !recovered {
		return cause
	}
	_, err := b.vault.Delete(carried(ctx), op.key)
	switch {
	case errors.Is(err, vault.ErrNotFound) && vault.IsUncertain(cause):
		return cause // the recover may yet arrive
	case err != nil && !errors.Is(err, vault.ErrNotFound):
		b.log.Error("a deleted secret is live in the vault after a failed put over it; the broker does not serve it, but who reads the vault directly can: put or delete it again",
			"key", op.key.String(), "audit_id", op.AuditID, "error", err)
		return cause
	}
	b.unhide(op.key)
	return cause
}

// landed looks whether the version that r was sent for is there. It is the newest,
// or there is none newer than the one that it was to replace, or the list tells.
func (b *Broker) landed(ctx context.Context, s *snapshot, r record) (vault.Properties, bool, error) {
	same := func(p vault.Properties) bool {
		found := versions.New(p).Record
		return found.Made == r.Made && found.Epoch == r.Epoch
	}
	newest, _, err := b.vault.Get(ctx, s.key, "")
	switch {
	case err == nil && same(newest):
		return newest, true, nil
	case err == nil && newest.Version == s.current.Version, errors.Is(err, vault.ErrNotFound):
		return vault.Properties{}, false, nil
	case err != nil && !errors.Is(err, vault.ErrDisabled):
		return vault.Properties{}, false, err
	}
	all, err := b.vault.Versions(ctx, s.key)
	if errors.Is(err, vault.ErrNotFound) {
		return vault.Properties{}, false, nil
	}
	at := slices.IndexFunc(all, same)
	if err != nil || at < 0 {
		return vault.Properties{}, false, err
	}
	return all[at], true, nil
}

// encode writes r into tags, beside those that others put on the current version.
func (b *Broker) encode(r record, s *snapshot) vault.Tags {
	tags, dropped := r.Encode(s.key, s.current.Tags)
	if len(dropped) > 0 {
		b.log.Warn("tags of others were not carried over: a version bears at most 15", "key", s.key.String(), "tags", dropped)
	}
	return tags
}

// redo gives the result of a put or rotate that was done already: the metadata
// of its version as it stands now.
func (b *Broker) redo(ctx context.Context, s *snapshot, d done, value secret.Value) (version, error) {
	v, ok, err := b.find(ctx, s, d.Version)
	if err != nil {
		return version{}, withCommit(vaultError(ctx, s.key, err), secret.Applied)
	}
	if !ok {
		// Of a deleted secret the vault shows the newest version alone.
		v.Key, v.Version = s.key, d.Version
	}
	if value.IsEmpty() || s.state == Deleted || !v.Enabled {
		return v, nil // there is nothing to compare, or the vault no longer gives it
	}
	stored := s.value
	if v.Version != s.current.Version {
		if _, stored, err = b.vault.Get(ctx, s.key, v.Version); err != nil {
			return version{}, withCommit(vaultError(ctx, s.key, err), secret.Applied)
		}
	}
	if !stored.Equal(value) {
		return version{}, errRequestIDReused(s.key)
	}
	return v, nil
}
