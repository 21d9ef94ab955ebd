package keyvaultfake

import (
	"maps"
	"net/http"
	"strings"
	"time"
)

// NameState is what is the case with a name.
type NameState string

// The states. Only a live name can be read; only a live or an absent one written.
const (
	Absent     NameState = "absent"
	Live       NameState = "live"
	Deleting   NameState = "deleting"   // neither live nor yet among the deleted ones
	Deleted    NameState = "deleted"    // to be recovered or purged
	Recovering NameState = "recovering" // neither among the deleted ones nor yet live
	Purging    NameState = "purging"    // gone, but the name is not free yet
)

// vault is the state of all names. Whoever uses it holds Fake.mu. All times come from
// the caller, so that a late commit can happen in the past.
type vault struct {
	transitions     Transitions
	retention       time.Duration
	purgeProtection bool
	secrets         map[string]*secret // by name in lower case
}

// secret is all that is kept of a name.
type secret struct {
	name     string     // as it was first written: names are case-insensitive, but kept
	versions []*version // in order of creation
	before   []*version // those before the newest was made, as they were then
	// phase began the state, until ends it: Deleting becomes Deleted, Recovering
	// becomes Live, Purging ends as Absent. The next state is not written down, it
	// follows from the time.
	phase         NameState
	until         time.Time
	conflictUntil time.Time // a recovered name that can be read, but not yet written
	deletedAt     time.Time
	purgeAt       time.Time // when the retention ends
}

type version struct {
	id, value, contentType string
	enabled                bool
	notBefore, expires     *int64 // for information only: reads do not look at them
	created, updated       time.Time
	tags                   map[string]string
}

// properties are what a write gives; nil means: leave it as it is.
type properties struct {
	contentType        *string
	enabled            *bool
	notBefore, expires *int64
	tags               map[string]string
}

// failure is an error as the service words it.
type failure struct {
	status               int
	code, inner, message string
}

// find gives a secret and its state; nil for an absent one.
func (v *vault) find(name string, now time.Time) (*secret, NameState) {
	key := strings.ToLower(name)
	s := v.secrets[key]
	if s == nil {
		return nil, Absent
	}
	state := s.phase
	switch {
	case now.Before(s.until):
	case state == Deleting:
		state = Deleted
	case state == Recovering:
		state = Live
	case state == Purging:
		state = Absent
	}
	if state == Deleted && !now.Before(s.purgeAt) {
		state = Absent // the retention has ended
	}
	if state == Absent {
		delete(v.secrets, key)
		return nil, Absent
	}
	return s, state
}

// conflict is what a write to a name is refused with that is neither live nor absent;
// what becomes of a deleted one depends on the write.
func (s *secret) conflict(state NameState, now time.Time) *failure {
	switch {
	case state == Deleting, state == Purging:
		return &failure{http.StatusConflict, "Conflict", "ObjectIsBeingDeleted",
			"Secret " + s.name + " is currently being deleted and cannot be changed or re-created; retry later."}
	case state == Recovering, state == Live && now.Before(s.conflictUntil):
		return &failure{http.StatusConflict, "Conflict", "ObjectIsBeingRecovered",
			"Secret " + s.name + " is currently being recovered and cannot be changed; retry later."}
	}
	return nil
}

func notFound(name string) *failure {
	return &failure{status: http.StatusNotFound, code: "SecretNotFound", message: "A secret with (name/id) " + name +
		" was not found in this key vault. If you recently deleted this secret you may be able to recover it using the correct recovery command."}
}

// set makes a new version.
func (v *vault) set(name, value string, p properties, now time.Time) (*secret, *version, *failure) {
	s, state := v.find(name, now)
	if s != nil {
		if fail := s.conflict(state, now); fail != nil {
			return nil, nil, fail
		}
		if state == Deleted {
			return nil, nil, &failure{http.StatusConflict, "Conflict", "ObjectIsDeletedButRecoverable", "Secret " + s.name +
				" is currently in a deleted but recoverable state, and its name cannot be reused; in this state, the secret can only be recovered or purged."}
		}
	}
	s, ver := v.add(name, value, p, now)
	return s, ver, nil
}

// add makes a new version of a live or absent name.
func (v *vault) add(name, value string, p properties, now time.Time) (*secret, *version) {
	s, _ := v.find(name, now)
	if s == nil {
		s = &secret{name: name, phase: Live}
		v.secrets[strings.ToLower(name)] = s
	}
	s.before = nil
	for _, old := range s.versions {
		kept := *old // tags are replaced whole, never changed
		s.before = append(s.before, &kept)
	}
	made := now.Truncate(time.Second)
	ver := &version{id: randomHex(), value: value, enabled: true, created: made}
	ver.apply(p, now)
	s.versions = append(s.versions, ver)
	return s, ver
}

// apply changes the properties that are given.
func (ver *version) apply(p properties, now time.Time) {
	if p.contentType != nil {
		ver.contentType = *p.contentType
	}
	if p.enabled != nil {
		ver.enabled = *p.enabled
	}
	if p.notBefore != nil {
		ver.notBefore = p.notBefore
	}
	if p.expires != nil {
		ver.expires = p.expires
	}
	if p.tags != nil {
		ver.tags = maps.Clone(p.tags)
	}
	ver.updated = now.Truncate(time.Second)
}

// newest is never nil: a secret begins with its first version.
func (s *secret) newest() *version { return s.versions[len(s.versions)-1] }

// pick gives the version with that id, or the newest if id is empty.
func pick(versions []*version, id string) *version {
	for i := len(versions) - 1; i >= 0; i-- {
		if id == "" || versions[i].id == strings.ToLower(id) {
			return versions[i]
		}
	}
	return nil
}

// readable gives a live name with its versions. Stale: those before the newest was
// made.
func (v *vault) readable(name string, stale bool, now time.Time) (*secret, []*version) {
	s, state := v.find(name, now)
	switch {
	case s == nil:
		return nil, nil
	case stale:
		return s, s.before // the name was live then, or absent
	case state == Live:
		return s, s.versions
	}
	return nil, nil
}

// get reads a version.
func (v *vault) get(name, id string, stale bool, now time.Time) (*secret, *version, *failure) {
	s, versions := v.readable(name, stale, now)
	ver := pick(versions, id)
	switch {
	case ver == nil:
		return nil, nil, notFound(name)
	case !ver.enabled:
		return nil, nil, &failure{http.StatusForbidden, "Forbidden", "SecretDisabled",
			"Operation get is not allowed on a disabled secret."}
	}
	return s, ver, nil
}

// update changes the properties of a version.
func (v *vault) update(name, id string, p properties, now time.Time) (*secret, *version, *failure) {
	s, state := v.find(name, now)
	if s == nil || state == Deleted {
		return nil, nil, notFound(name)
	}
	if fail := s.conflict(state, now); fail != nil {
		return nil, nil, fail
	}
	ver := pick(s.versions, id)
	if ver == nil {
		return nil, nil, notFound(name)
	}
	ver.apply(p, now)
	return s, ver, nil
}

// remove begins a deletion.
func (v *vault) remove(name string, now time.Time) (*secret, *failure) {
	s, state := v.find(name, now)
	if s == nil || state == Deleted {
		return nil, notFound(name)
	}
	if fail := s.conflict(state, now); fail != nil {
		return nil, fail
	}
	v.beginDelete(s, now)
	return s, nil
}

func (v *vault) beginDelete(s *secret, now time.Time) {
	s.phase, s.until = Deleting, now.Add(v.transitions.Delete)
	s.deletedAt = now.Truncate(time.Second)
	s.purgeAt = s.deletedAt.Add(v.retention)
}

// deleted finds a name that can be recovered or purged.
func (v *vault) deleted(name string, now time.Time) (*secret, *failure) {
	s, state := v.find(name, now)
	if state != Deleted {
		return nil, notFound(name)
	}
	return s, nil
}

// recover begins a recovery.
func (v *vault) recover(name string, now time.Time) (*secret, *failure) {
	s, fail := v.deleted(name, now)
	if fail == nil {
		v.beginRecover(s, now)
	}
	return s, fail
}

func (v *vault) beginRecover(s *secret, now time.Time) {
	s.phase, s.until = Recovering, now.Add(v.transitions.Recover)
	s.conflictUntil = s.until.Add(v.transitions.RecoverConflict)
}

// purge begins to free a name.
func (v *vault) purge(name string, now time.Time) *failure {
	s, state := v.find(name, now)
	if state == Deleting {
		// Unlike recover: a purge right after a delete was seen to conflict.
		return s.conflict(state, now)
	}
	if state != Deleted {
		return notFound(name)
	}
	if v.purgeProtection {
		return &failure{status: http.StatusForbidden, code: "Forbidden", message: "Operation \"purge\" is not allowed because purge protection is enabled for this vault."}
	}
	v.beginPurge(s, now)
	return nil
}

func (v *vault) beginPurge(s *secret, now time.Time) {
	s.phase, s.until = Purging, now.Add(v.transitions.Purge)
	s.versions = []*version{} // they are gone at once; only the name is not
	s.before = nil
}
