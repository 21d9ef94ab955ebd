package broker

import (
	"context"
	"errors"
	"time"

	"github.com/exto/secrets-broker/secret"
)

var (
	// errStale: the vault's answer is older than what is known; ask again.
	errStale = errors.New("broker: the vault's answer is older than what is known")
	// errUnlike: the list of versions knows a greater one than the answer before it.
	errUnlike = errors.New("broker: the vault's answers contradict each other")
)

const (
	lookPause = 100 * time.Millisecond
	// tiedLooks is how often the vault is asked before the newer of two versions of
	// the same second, by its own count, is believed to be that.
	tiedLooks = 4
	// believe is after how long a vault that insists is believed, whatever its
	// times of creation say: they may come from several machines.
	believe = time.Minute
)

// judge compares the vault's newest version with the greatest that is known. A
// lesser one is either an old answer, a late write, or that of a new secret.
func (b *Broker) judge(ctx context.Context, s *snapshot, asked int) error {
	k, ok := b.knownOf(s.key)
	switch {
	case s.current.Generation == 0: // somebody else's: it counts
		b.meet(s.key)
		return nil
	case !ok || !k.later(s.current) && !k.twin(s.current):
		b.see(s.key, s.current)
		return nil
	case k.twin(s.current):
		return b.judgeTwin(ctx, s, k)
	}
	insists := b.doubt(s.key) > believe
	if s.current.Created.Before(k.created) && !k.gone && !insists {
		return errStale
	}
	if err := b.listVersions(ctx, s); err != nil {
		return err
	}
	greatest := s.listed.Greatest()
	switch {
	case !greatest.Later(s.current.Record):
		if !k.gone && !s.current.Created.After(k.created) {
			return errStale // so is the list
		}
		b.replace(s.key, s.current)
		return nil
	case insists:
	case s.current.Created.Before(greatest.Created),
		s.current.Created.Equal(greatest.Created) && asked < tiedLooks:
		return errStale
	}
	s.putBehind(greatest)
	return b.enter(ctx, s)
}

// judgeTwin looks at another version of the write that is known: it was sent twice,
// and both arrived. The newest counts, unless something was done with the other one
// meanwhile that it says nothing of.
func (b *Broker) judgeTwin(ctx context.Context, s *snapshot, k known) error {
	if err := b.listVersions(ctx, s); err != nil {
		return err
	}
	at := s.listed.Index(k.version)
	if at >= 0 && (s.listed[at].Beats(s.current) || !s.listed[at].Enabled) {
		s.putBehind(s.listed[at])
		return b.enter(ctx, s)
	}
	b.see(s.key, s.current)
	return nil
}

// hasLate reports whether there is a late version to be put down: one that can be
// read, or that lies over what can.
func (s *snapshot) hasLate() bool {
	return s.late != nil && (s.late.Enabled || s.state == Active)
}

// putBehind makes greatest the current version, and what the vault holds for it a
// late one.
func (s *snapshot) putBehind(greatest version) {
	late := s.current
	s.late, s.current, s.value = &late, greatest, secret.Value{}
	s.listed.Lead(s.listed.Index(greatest.Version))
}
