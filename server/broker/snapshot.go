package broker

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

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
	listed []version
}

// version is a version with what its tags say.
type version struct {
	vault.Properties
	record
}

// newVersion reads the tags of p. Those that were copied from another secret say
// nothing of this one but that.
func newVersion(p vault.Properties) version {
	r := parseTags(p.Tags)
	if r.key != "" && r.key != p.Key.String() {
		r = record{format: r.format, key: r.key}
	}
	return version{p, r}
}

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
	if s.copied() {
		return nil, refuse(key, secret.KeyMismatch, "the vault's tag on this secret names another key; it was copied by hand, and has to be set anew or its tags removed")
	}
	return s, nil
}

// copied reports that the current version bears the tags of another secret.
func (s *snapshot) copied() bool { return s.current.key != "" && s.current.key != s.key.String() }

// look is load for a list, which shows copied ones too.
func (b *Broker) look(ctx context.Context, key secret.Key, d depth) (*snapshot, error) {
	pauses := vault.NewPauses(lookPause, time.Second)
	for asked := 1; ; asked++ {
		s, err := steady(func() (*snapshot, error) { return b.loadOnce(ctx, key, d, asked) })
		if errors.Is(err, vault.ErrRefused) {
			b.drop(key) // nothing of it is to be served when the vault cannot be reached
		}
		if !errors.Is(err, errStale) {
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
		s.live, s.current, s.value, s.state = true, newVersion(props), value, Active
		if err := b.judge(ctx, s, asked); err != nil {
			return nil, half(err)
		}
	case errors.Is(err, vault.ErrDisabled):
		s.live = true
		if err := b.list(ctx, s); err != nil {
			return nil, half(err)
		}
		if err := b.enter(ctx, s); err != nil {
			return nil, half(err)
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
			return nil, half(err)
		}
		s.state, s.current, s.deletedAt, s.purgeAt = Deleted, newVersion(d.Properties), d.DeletedAt, d.PurgeAt
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

// halfError is why the vault did not say all of a secret, after it said that it is not
// as it was, or not surely.
type halfError struct{ error }

func (e halfError) Unwrap() error { return e.error }

func half(err error) error { return halfError{err} }

// enter sets the state, and the value, by a current version that was found in the
// list.
func (b *Broker) enter(ctx context.Context, s *snapshot) error {
	switch m := s.current.deleted; {
	case s.current.Enabled && s.late != nil:
		props, value, err := b.vault.Get(ctx, s.key, s.current.Version)
		if err != nil {
			return err
		}
		s.current, s.value, s.state = newVersion(props), value, Active
	case s.current.Enabled:
		return vault.ErrNotFound // changed between the two requests
	case m != nil:
		s.state, s.deletedAt = Deleted, m.at
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
	if greatest := s.greatest(); s.late == nil && s.current.generation > 0 && greatest.beats(s.current) {
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
		s.listed = append(s.listed, newVersion(p))
	}
	slices.SortStableFunc(s.listed, func(x, y version) int {
		return cmp.Or(y.Created.Compare(x.Created), cmp.Compare(y.epoch, x.epoch), cmp.Compare(y.generation, x.generation))
	})
	// The vault counts whole seconds, so the order cannot always tell which one is
	// current: the Get did, or that it was disabled did.
	at := slices.IndexFunc(s.listed, func(v version) bool {
		if s.current.Version == "" {
			return !v.Enabled
		}
		return v.Version == s.current.Version
	})
	found := s.current.Version != ""
	if at < 0 || found && s.listed[at].Enabled != s.current.Enabled {
		s.listed = nil
		return vault.ErrNotFound // changed between the two requests
	}
	if !found {
		s.current = s.listed[at]
	}
	s.listed = slices.Concat([]version{s.listed[at]}, s.listed[:at], s.listed[at+1:])
	if greatest := s.greatest(); !found && s.current.generation > 0 && greatest.beats(s.current) {
		s.putBehind(greatest) // a late one that was disabled already
	}
	return nil
}

// base is the version on which the next write counts on: the current one, or
// where that was not written by the broker the greatest of the broker's own. It
// lists the versions only then. The zero version when there is none.
func (b *Broker) base(ctx context.Context, s *snapshot) (version, error) {
	if s.current.generation > 0 || !s.live {
		return s.current, nil
	}
	if err := b.list(ctx, s); err != nil {
		return version{}, err
	}
	base := s.current
	for _, v := range s.listed {
		if v.later(base.record) {
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
	if at := slices.IndexFunc(s.listed, func(v version) bool { return v.Version == id }); at >= 0 {
		return s.listed[at], true, nil
	}
	return version{}, false, nil
}

// expiry is when a version stops being honoured: zero unless a rotate replaced
// it. Only the version that the last rotate replaced can be in grace, so that
// whatever came after that rotate ended it. s must be listed, unless v is the
// current version, which has no expiry.
func (s *snapshot) expiry(v version) time.Time {
	for i, by := range s.listed {
		if by.previous != v.Version || s.putDown(by) {
			continue
		}
		end := by.graceEnd
		if i > 0 {
			// The one that replaced by stands before it.
			for _, over := range []time.Time{s.listed[i-1].Created, s.asOf} { // the vault's clock may be ahead
				if over.Before(end) {
					end = over
				}
			}
		}
		return end
	}
	return time.Time{}
}

// putDown reports whether v is a late version that was put down: it never
// replaced anything. s must be listed.
func (s *snapshot) putDown(v version) bool {
	return !v.Enabled && v.generation > 0 && slices.ContainsFunc(s.listed, func(g version) bool {
		return g.generation > 0 && g.later(v.record) && g.Created.Before(v.Created)
	})
}

// served reports whether v is not from before a delete that a put overwrote. s
// must be listed, unless v is the current version.
func (s *snapshot) served(v version) bool {
	if v.Version == s.current.Version {
		return true
	}
	newest := s.greatest() // it bears the bound
	if newest.first == 0 {
		return true
	}
	if v.generation > 0 {
		return v.generation >= newest.first
	}
	// The vault counts whole seconds; in doubt the value is not shown.
	for _, l := range s.listed {
		if l.generation == newest.first {
			return v.Created.After(l.Created)
		}
	}
	return false
}

// metadata is what is known of v as it stands in s.
func (s *snapshot) metadata(v version) Metadata {
	m := Metadata{
		Key:        s.key,
		Version:    v.Version,
		Generation: v.generation,
		State:      Active,
		CreatedBy:  v.createdBy,
		CreateTime: v.Created,
	}
	if !v.Enabled {
		m.State = Disabled
	}
	if s.state == Deleted {
		m.State, m.DeleteTime, m.PurgeTime = Deleted, s.deletedAt, s.purgeAt
	}
	if v.Version != s.current.Version {
		m.ExpireTime = s.expiry(v)
	}
	return m
}

// marked reports whether the broker's own delete keeps this version from being
// read.
func (v version) marked() bool { return v.deleted != nil && !v.Enabled }
