package keyvaultfake

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// Version is a version of a secret as the vault has it.
type Version struct {
	ID, Value, ContentType string
	Enabled                bool
	Created                time.Time
	Tags                   map[string]string
}

func (ver *version) look() Version {
	return Version{ver.id, ver.value, ver.contentType, ver.enabled, ver.created, maps.Clone(ver.tags)}
}

// Versions are those of a name in the order in which they were made, also while it is
// deleted.
func (f *Fake) Versions(name string) []Version {
	now := f.enter()
	defer f.mu.Unlock()
	s, _ := f.vault.find(name, now)
	if s == nil {
		return nil
	}
	versions := make([]Version, len(s.versions))
	for i, ver := range s.versions {
		versions[i] = ver.look()
	}
	return versions
}

// State of a name. A recovered name that can be read is Live, even while writes still
// conflict.
func (f *Fake) State(name string) NameState {
	now := f.enter()
	defer f.mu.Unlock()
	_, state := f.vault.find(name, now)
	return state
}

// The Person methods are somebody's hands in the vault: at once, without HTTP, and
// whatever the limits, the rights and the mode are. They panic if the state of the name
// does not allow what is asked.

// PersonSet makes a new version of a live or absent name.
func (f *Fake) PersonSet(name, value string, tags map[string]string) Version {
	now := f.enter()
	defer f.mu.Unlock()
	f.need("PersonSet", name, now, Live, Absent)
	_, ver := f.vault.add(name, value, properties{tags: tags}, now)
	return ver.look()
}

// PersonUpdate enables or disables a version, the newest if version is empty, and
// replaces its tags unless they are nil.
func (f *Fake) PersonUpdate(name, version string, enabled bool, tags map[string]string) {
	now := f.enter()
	defer f.mu.Unlock()
	ver := pick(f.need("PersonUpdate", name, now, Live).versions, version)
	if ver == nil {
		panic(fmt.Sprintf("keyvaultfake: PersonUpdate: %s has no version %s", name, version))
	}
	ver.apply(properties{enabled: &enabled, tags: tags}, now)
}

// PersonDelete begins the deletion of a live name.
func (f *Fake) PersonDelete(name string) {
	now := f.enter()
	defer f.mu.Unlock()
	f.vault.beginDelete(f.need("PersonDelete", name, now, Live), now)
}

// PersonRecover begins the recovery of a deleted name.
func (f *Fake) PersonRecover(name string) {
	now := f.enter()
	defer f.mu.Unlock()
	f.vault.beginRecover(f.need("PersonRecover", name, now, Deleted), now)
}

// PersonPurge begins the purge of a deleted name.
func (f *Fake) PersonPurge(name string) {
	now := f.enter()
	defer f.mu.Unlock()
	f.vault.beginPurge(f.need("PersonPurge", name, now, Deleted), now)
}

// need panics unless the name is in one of the states.
func (f *Fake) need(method, name string, now time.Time, states ...NameState) *secret {
	s, state := f.vault.find(name, now)
	if !slices.Contains(states, state) {
		panic(fmt.Sprintf("keyvaultfake: %s: %s is %s, not one of %v", method, name, state, states))
	}
	return s
}
