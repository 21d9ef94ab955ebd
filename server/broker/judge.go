package broker

import (
	"context"
	"errors"
	"slices"
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
	case s.current.generation == 0: // somebody else's: it counts
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
	greatest := s.greatest()
	switch {
	case !greatest.later(s.current.record):
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
	at := slices.IndexFunc(s.listed, func(v version) bool { return v.Version == k.version })
	if at >= 0 && (s.listed[at].beats(s.current) || !s.listed[at].Enabled) {
		s.putBehind(s.listed[at])
		return b.enter(ctx, s)
	}
	b.see(s.key, s.current)
	return nil
}

// beats reports whether v counts and than does not, of the broker's own versions:
// it is later; or both are one write, and v bears a delete or recover more.
func (v version) beats(than version) bool {
	if v.later(than.record) || than.later(v.record) {
		return v.later(than.record)
	}
	return v.made == than.made && v.Version != than.Version && v.touched() > than.touched()
}

// touched counts the deletes and recovers that v bears of its own.
func (v version) touched() int {
	n := 0
	if v.deleted != nil {
		n++
	}
	for _, d := range v.others {
		if d.version == v.Version {
			n++
		}
	}
	return n
}

// hasLate reports whether there is a late version to be put down: one that can be
// read, or that lies over what can.
func (s *snapshot) hasLate() bool {
	return s.late != nil && (s.late.Enabled || s.state == Active)
}

// greatest is the greatest of the broker's own versions; s must be listed.
func (s *snapshot) greatest() version {
	var greatest version
	for _, v := range s.listed {
		if v.generation > 0 && (greatest.generation == 0 || v.beats(greatest)) {
			greatest = v
		}
	}
	return greatest
}

// putBehind makes greatest the current version, and what the vault holds for it a
// late one.
func (s *snapshot) putBehind(greatest version) {
	late := s.current
	s.late, s.current, s.value = &late, greatest, secret.Value{}
	at := slices.IndexFunc(s.listed, func(v version) bool { return v.Version == greatest.Version })
	s.listed = slices.Concat([]version{greatest}, s.listed[:at], s.listed[at+1:])
}
