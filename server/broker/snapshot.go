package broker

import (
	"context"
	"errors"
	"time"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// snapshot is a secret as the vault had it at one moment.
type snapshot struct {
	key   secret.Key
	asOf  time.Time // when the first request was sent
	state State
	// live reports that the name is live in the vault. A secret can be Deleted
	// and live: marked, or hidden by the broker.
	live      bool
	current   version // the newest version; zero when Absent
	value     secret.Value
	deletedAt time.Time
	purgeAt   time.Time
	// unsure reports that an Absent secret may as well be deleted: nobody looked.
	unsure bool
	// late is the vault's newest version where that is a late one: current is then
	// the one that counts.
	late *version
	// listed holds all versions, the current one first, then newest first; nil
	// until they were needed.
	listed versions.List
}

type (
	version = versions.Version
	record  = versions.Record
	done    = versions.Done
)

// depth says how far a look goes.
type depth bool

const (
	// whole looks at what is deleted too.
	whole depth = false
	// live is content to know that a name is not live.
	live depth = true
)

// load reads a secret. It asks for the value, then for what is left of a deleted
// name, and lists the versions where the vault shows no tags, of a disabled
// version, and where its answer is not the greatest that is known.
func (b *Broker) load(ctx context.Context, key secret.Key, d depth) (*snapshot, error) {
	s, err := b.look(ctx, key, d)
	if err != nil {
		return nil, err
	}
	if s.current.Copied() {
		return nil, refuse(key, secret.KeyMismatch, "the vault's tag on this secret names another key; it was copied by hand, and has to be set anew or its tags removed")
	}
	return s, nil
}

// look is load for a list, which shows copied ones too.
func (b *Broker) look(ctx context.Context, key secret.Key, d depth) (*snapshot, error) {
	pauses := vault.NewPauses(lookPause, time.Second)
	for asked := 1; ; asked++ {
		s, err := steady(func() (*snapshot, error) { return b.loadOnce(ctx, key, d, asked) })
		if !errors.Is(err, errStale) {
			if half := (halfAnswer{}); errors.As(err, &half) {
				b.drop(key, half.asked) // nothing of it is to be served when the vault cannot be reached
			}
			return s, err
		}
		if !vault.Pause(ctx, b.wait, pauses.NextBackOff()) {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			k, _ := b.knownOf(key)
			return nil, refuse(key, secret.StalenessUnsatisfiable, "the vault gives a version older than generation %d, which this broker has written or seen; try again", k.generation)
		}
	}
}

// steady looks again when a secret was changed between two requests of one look,
// such as by a delete between a Get and a list of versions.
func steady[T any](look func() (T, error)) (T, error) {
	const looks = 4
	for n := 1; ; n++ {
		result, err := look()
		var told *Error
		if n == looks || errors.As(err, &told) || !changed(err) {
			return result, err
		}
	}
}

// changed reports whether err says no more than that a secret is not as it was a
// moment ago.
func changed(err error) bool {
	return errors.Is(err, vault.ErrNotFound) || errors.Is(err, vault.ErrDisabled) || errors.Is(err, errUnlike)
}

func (b *Broker) loadOnce(ctx context.Context, key secret.Key, d depth, asked int) (*snapshot, error) {
	s := &snapshot{key: key, asOf: b.now()}
	hidings := b.countHidings()
	// What the origin wants to hear of is the first request alone, of which asOf tells.
	origin := vault.OriginOf(ctx)
	first := origin
	first.Sends = func() {
		s.asOf = b.now()
		if origin.Sends != nil {
			origin.Sends()
		}
	}
	ctx = unheard(ctx)
	props, value, err := b.vault.Get(vault.WithOrigin(ctx, first), key, "")
	switch {
	case err == nil:
		s.live, s.current, s.value, s.state = true, versions.New(props), value, Active
		if err := b.judge(ctx, s, asked); err != nil {
			return nil, s.half(err)
		}
	case errors.Is(err, vault.ErrDisabled):
		s.live = true
		if err := b.list(ctx, s); err != nil {
			return nil, s.half(err)
		}
		if err := b.enter(ctx, s); err != nil {
			return nil, s.half(err)
		}
	case errors.Is(err, vault.ErrNotFound):
		b.missing(key)
		if d == live {
			s.unsure = true
			return s, nil
		}
		d, err := b.vault.GetDeleted(ctx, key)
		if errors.Is(err, vault.ErrNotFound) {
			return s, nil
		}
		if err != nil {
			return nil, s.half(err)
		}
		s.state, s.current, s.deletedAt, s.purgeAt = Deleted, versions.New(d.Properties), d.DeletedAt, d.PurgeAt
	case errors.Is(err, vault.ErrRefused):
		return nil, s.half(err)
	default:
		return nil, err
	}
	if s.live {
		if at, ok := b.isHidden(s.current.Properties); ok {
			s.state, s.deletedAt, s.value = Deleted, at, secret.Value{}
		} else if b.countHidings() != hidings {
			// It may have been hidden when the vault answered, and be gone by now.
			return nil, vault.ErrNotFound
		}
	}
	return s, nil
}

// unheard is ctx for requests of which the origin does not want to hear.
func unheard(ctx context.Context) context.Context {
	origin := vault.OriginOf(ctx)
	origin.Waits, origin.Sends = nil, nil
	return vault.WithOrigin(ctx, origin)
}

// halfAnswer is why the vault did not say all of a secret, after it said that it is not as
// it was, or not surely; or that it refuses the broker.
type halfAnswer struct {
	error
	asked time.Time
}

func (e halfAnswer) Unwrap() error { return e.error }

func (s *snapshot) half(err error) error { return halfAnswer{err, s.asOf} }

// enter sets the state, and the value, by a current version that was found in the
// list.
func (b *Broker) enter(ctx context.Context, s *snapshot) error {
	switch m := s.current.Deleted; {
	case s.current.Enabled && s.late != nil:
		props, value, err := b.vault.Get(ctx, s.key, s.current.Version)
		if err != nil {
			return err
		}
		s.current, s.value, s.state = versions.New(props), value, Active
	case s.current.Enabled:
		return vault.ErrNotFound // changed between the two requests
	case m != nil:
		s.state, s.deletedAt = Deleted, m.At
	default:
		s.state = Disabled
	}
	return nil
}

// list reads all versions into s, once.
func (b *Broker) list(ctx context.Context, s *snapshot) error {
	if s.listed != nil {
		return nil
	}
	if err := b.listVersions(ctx, s); err != nil {
		return err
	}
	if greatest := s.listed.Greatest(); s.late == nil && s.current.Generation > 0 && greatest.Beats(s.current) {
		b.see(s.key, greatest) // what the next look goes by
		return errUnlike
	}
	return nil
}

// listVersions is list without a judgement.
func (b *Broker) listVersions(ctx context.Context, s *snapshot) error {
	all, err := b.vault.Versions(ctx, s.key)
	if err != nil {
		return err
	}
	for _, p := range all {
		s.listed = append(s.listed, versions.New(p))
	}
	// Of a disabled one the vault said no more than that.
	found := s.current.Version != ""
	if !s.listed.Arrange(s.current.Version) || found && s.listed[0].Enabled != s.current.Enabled {
		s.listed = nil
		return vault.ErrNotFound // changed between the two requests
	}
	if !found {
		s.current = s.listed[0]
	}
	if greatest := s.listed.Greatest(); !found && s.current.Generation > 0 && greatest.Beats(s.current) {
		s.putBehind(greatest) // a late one that was disabled already
	}
	return nil
}

// base is the version on which the next write counts on: the current one, or
// where that was not written by the broker the greatest of the broker's own. It
// lists the versions only then. The zero version when there is none.
func (b *Broker) base(ctx context.Context, s *snapshot) (version, error) {
	if s.current.Generation > 0 || !s.live {
		return s.current, nil
	}
	if err := b.list(ctx, s); err != nil {
		return version{}, err
	}
	base := s.current
	for _, v := range s.listed {
		if v.Later(base.Record) {
			base = v
		}
	}
	return base, nil
}

// find is the version with this id. It lists the versions when it is not the
// current one.
func (b *Broker) find(ctx context.Context, s *snapshot, id string) (version, bool, error) {
	if id == s.current.Version {
		return s.current, true, nil
	}
	if !s.live {
		return version{}, false, nil
	}
	if err := b.list(ctx, s); err != nil {
		return version{}, false, err
	}
	if at := s.listed.Index(id); at >= 0 {
		return s.listed[at], true, nil
	}
	return version{}, false, nil
}

// metadata is what is known of v as it stands in s.
func (s *snapshot) metadata(v version) Metadata {
	m := Metadata{
		Key:        s.key,
		Version:    v.Version,
		Generation: v.Generation,
		State:      Active,
		CreatedBy:  v.CreatedBy,
		CreateTime: v.Created,
	}
	if !v.Enabled {
		m.State = Disabled
	}
	if s.state == Deleted {
		m.State, m.DeleteTime, m.PurgeTime = Deleted, s.deletedAt, s.purgeAt
	}
	if v.Version != s.current.Version {
		m.ExpireTime = s.listed.Expiry(v, s.asOf)
	}
	return m
}
