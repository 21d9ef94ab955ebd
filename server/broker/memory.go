package broker

import (
	"cmp"
	"slices"
	"time"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// What the process remembers besides what the vault says. None of it is needed
// after a crash; while it runs, it keeps a vault that answers late, or with what
// is old, from being believed.

const (
	// A write of unknown outcome is remembered so long, and at most so many of one
	// secret.
	pendingFor  = time.Hour
	mostPending = versions.Remembered
)

// known is the greatest version of a secret that this process wrote or saw.
type known struct {
	epoch, generation int64
	version           string
	created           time.Time
	// gone reports that the name was not found since.
	gone bool
	// doubted is since when the vault gives a lesser one as the current; zero
	// while it does not.
	doubted time.Time
}

// later orders it before v as Record.Later does.
func (k known) later(v version) bool {
	return cmp.Or(cmp.Compare(k.epoch, v.Epoch), cmp.Compare(k.generation, v.Generation)) > 0
}

// twin reports whether v is another version of the same write.
func (k known) twin(v version) bool {
	return k.epoch == v.Epoch && k.generation == v.Generation && k.version != v.Version
}

// pendingWrite is a put or rotate whose outcome is not known. Sent again by the
// same process it is the same write: same value, generation and epoch.
type pendingWrite struct {
	record
	value secret.Value
	at    time.Time
}

// hiddenVersion is a version that is live in the vault only because a put over a
// secret that somebody else deleted had to recover it first.
type hiddenVersion struct {
	version   string
	created   time.Time
	deletedAt time.Time
}

// see remembers v if it is the greatest so far.
func (b *Broker) see(key secret.Key, v version) {
	if v.Generation == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if k, ok := b.known[key]; !ok || !k.later(v) {
		b.known[key] = known{epoch: v.Epoch, generation: v.Generation, version: v.Version, created: v.Created}
	}
}

// replace remembers v whatever was known: the secret is a new one.
func (b *Broker) replace(key secret.Key, v version) {
	b.mu.Lock()
	delete(b.known, key)
	b.mu.Unlock()
	b.see(key, v)
}

// meet remembers that there is a secret that somebody else wrote.
func (b *Broker) meet(key secret.Key) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.met[key] = true
}

// stranger reports whether the process never saw a secret of this name.
func (b *Broker) stranger(key secret.Key) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, known := b.known[key]
	return !known && !b.met[key]
}

func (b *Broker) knownOf(key secret.Key) (known, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	k, ok := b.known[key]
	return k, ok
}

// missing remembers that the name was not found.
func (b *Broker) missing(key secret.Key) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if k, ok := b.known[key]; ok {
		k.gone = true
		b.known[key] = k
	}
}

// doubt remembers since when the vault gives a lesser version, and says for how
// long it has.
func (b *Broker) doubt(key secret.Key) time.Duration {
	now := b.now()
	b.mu.Lock()
	defer b.mu.Unlock()
	k, ok := b.known[key]
	if !ok {
		return 0
	}
	if k.doubted.IsZero() {
		k.doubted = now
		b.known[key] = k
	}
	return now.Sub(k.doubted)
}

// forget drops what is known of a name that is absent: whoever comes next is a
// new secret. Only the holder of the secret's lock may know that it is: to a
// reader, a name that is being recovered can look absent.
func (b *Broker) forget(key secret.Key) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.known, key)
	delete(b.met, key)
	delete(b.hidden, key)
}

// highestOf is the highest generation of a secret that was written, seen, or sent
// with unknown outcome by another operation than id: no later write takes it
// again. Of an absent one only the last counts.
func (b *Broker) highestOf(key secret.Key, id string, absent bool) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	highest := int64(0)
	if !absent {
		highest = b.known[key].generation
	}
	for _, w := range b.pending[key] {
		if w.Made.ID != id {
			highest = max(highest, w.Generation)
		}
	}
	return highest
}

// pend remembers a write of unknown outcome.
func (b *Broker) pend(key secret.Key, w pendingWrite) {
	w.at = b.now()
	b.mu.Lock()
	defer b.mu.Unlock()
	for k, writes := range b.pending {
		if writes = slices.DeleteFunc(writes, func(p pendingWrite) bool { return w.at.Sub(p.at) > pendingFor || k == key && p.Made.ID == w.Made.ID }); len(writes) > 0 {
			b.pending[k] = writes
		} else {
			delete(b.pending, k)
		}
	}
	writes := append(b.pending[key], w)
	b.pending[key] = writes[max(0, len(writes)-mostPending):]
}

func (b *Broker) pendingOf(key secret.Key, id string) (pendingWrite, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	at := slices.IndexFunc(b.pending[key], func(p pendingWrite) bool { return p.Made.ID == id })
	if at < 0 {
		return pendingWrite{}, false
	}
	return b.pending[key][at], true
}

// settled forgets a write whose outcome is known now.
func (b *Broker) settled(key secret.Key, id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	writes := slices.DeleteFunc(b.pending[key], func(p pendingWrite) bool { return p.Made.ID == id })
	if len(writes) > 0 {
		b.pending[key] = writes
	} else {
		delete(b.pending, key)
	}
}

// mayStillApply reports whether a write of unknown outcome would count if it
// arrived now: nothing greater was written since.
func (b *Broker) mayStillApply(key secret.Key, id string) bool {
	w, ok := b.pendingOf(key, id)
	if !ok || b.now().Sub(w.at) > pendingFor {
		return false
	}
	k, ok := b.knownOf(key)
	return !ok || !k.later(version{Record: w.record})
}

// hide keeps a version from being served that is about to be live in the vault.
func (b *Broker) hide(s *snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hidden[s.key] = hiddenVersion{s.current.Version, s.current.Created, s.deletedAt}
	b.hidings++
}

func (b *Broker) unhide(key secret.Key) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.hidden[key]; ok {
		delete(b.hidden, key)
		b.hidings++
	}
}

func (b *Broker) countHidings() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.hidings
}

// isHidden reports whether this version is hidden, and when the secret was
// deleted. In lists of names versions have no id; there the time of creation
// tells.
func (b *Broker) isHidden(p vault.Properties) (time.Time, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	h, ok := b.hidden[p.Key]
	return h.deletedAt, ok && (h.version == p.Version || p.Version == "" && h.created.Equal(p.Created))
}
