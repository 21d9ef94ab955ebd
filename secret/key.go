// Package secret is the vocabulary of the broker: which secrets there are, how
// they are named, what their values may look like, and in which words a call
// is refused. Its types parse or refuse, so that whoever holds one need not
// check it again. It talks to nobody, and all of it is safe for concurrent use.
package secret

import (
	"errors"
	"fmt"
	"strings"
)

// InstanceID is the primary key of a customer instance. It is made by
// ParseInstanceID alone; the zero value names no instance and is comparable
// with ==.
type InstanceID struct{ id string }

// Beginnings and endings of the names in the vault. Running instances read the
// vault directly by these names, so they are fixed for good.
const (
	keyPrefix    = "instance-"
	suffixDBURI  = "-dburi"
	suffixOIDC   = "-oidc-secret"
	maxInstance  = 100
	instanceForm = "1 to 100 lower-case letters, digits and inner hyphens"
)

// ParseInstanceID accepts 1 to 100 lower-case letters, digits and hyphens that
// begin and end with a letter or digit. It refuses the endings -dburi and
// -oidc-secret: the token key of such an instance would be another instance's
// database or OIDC key. The error says what is accepted and does not repeat s.
func ParseInstanceID(s string) (InstanceID, error) {
	if s == "" {
		return InstanceID{}, errors.New("an instance id is required: " + instanceForm)
	}
	if len(s) > maxInstance || s[0] == '-' || s[len(s)-1] == '-' || !onlyIDBytes(s) {
		return InstanceID{}, errors.New("not an instance id: accepted are " + instanceForm)
	}
	for _, suffix := range []string{suffixDBURI, suffixOIDC} {
		if strings.HasSuffix(s, suffix) {
			return InstanceID{}, fmt.Errorf("an instance id does not end in %s: its token key would be another instance's key", suffix)
		}
	}
	return InstanceID{s}, nil
}

func onlyIDBytes(s string) bool {
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
			return false
		}
	}
	return true
}

// String is the id as the Console's database has it; empty for the zero value.
func (id InstanceID) String() string { return id.id }

// Kind says which of an instance's secrets is meant. The zero value is no kind.
type Kind int

// The three kinds, numbered as in the contract.
const (
	RegistrationToken Kind = iota + 1
	DatabaseURI
	OIDCClientSecret
)

// Kinds lists all kinds in the order of their numbers.
func Kinds() []Kind { return []Kind{RegistrationToken, DatabaseURI, OIDCClientSecret} }

// String is the contract's word, such as DATABASE_URI.
func (k Kind) String() string {
	switch k {
	case RegistrationToken:
		return "REGISTRATION_TOKEN"
	case DatabaseURI:
		return "DATABASE_URI"
	case OIDCClientSecret:
		return "OIDC_CLIENT_SECRET"
	}
	return fmt.Sprintf("Kind(%d)", int(k))
}

// ParseKind accepts the contract's words: REGISTRATION_TOKEN, DATABASE_URI and
// OIDC_CLIENT_SECRET. The error names them and does not repeat s.
func ParseKind(s string) (Kind, error) {
	for _, k := range Kinds() {
		if s == k.String() {
			return k, nil
		}
	}
	return 0, errors.New("not a kind: accepted are REGISTRATION_TOKEN, DATABASE_URI and OIDC_CLIENT_SECRET")
}

// Key names one secret: an instance and a kind. As a string it is the name in
// the vault and the only thing that a database stores. It is made by NewKey or
// ParseKey; the zero value names nothing. Keys compare with ==.
type Key struct {
	id   InstanceID
	kind Kind
}

// NewKey makes the key of an instance's secret. It refuses the zero InstanceID
// and what is not one of Kinds.
func NewKey(id InstanceID, kind Kind) (Key, error) {
	if id == (InstanceID{}) {
		return Key{}, errors.New("an instance id is required")
	}
	if kind < RegistrationToken || kind > OIDCClientSecret {
		return Key{}, errors.New("a kind is required: REGISTRATION_TOKEN, DATABASE_URI or OIDC_CLIENT_SECRET")
	}
	return Key{id, kind}, nil
}

// ParseKey reads a key back from its name, such as instance-abc-dburi. It is
// the inverse of String and refuses everything that String does not make, names
// in upper case too. The error does not repeat s.
func ParseKey(s string) (Key, error) {
	rest, ok := strings.CutPrefix(s, keyPrefix)
	if !ok {
		return Key{}, errors.New("not a key: it begins with " + keyPrefix)
	}
	kind := RegistrationToken
	if base, ok := strings.CutSuffix(rest, suffixOIDC); ok {
		rest, kind = base, OIDCClientSecret
	} else if base, ok := strings.CutSuffix(rest, suffixDBURI); ok {
		rest, kind = base, DatabaseURI
	}
	id, err := ParseInstanceID(rest)
	if err != nil {
		return Key{}, fmt.Errorf("not a key: %w", err)
	}
	return Key{id, kind}, nil
}

// InstanceID is the instance whose secret this is.
func (k Key) InstanceID() InstanceID { return k.id }

// Kind is the kind of this secret.
func (k Key) Kind() Kind { return k.kind }

// String is the name in the vault: instance-{id}, instance-{id}-dburi or
// instance-{id}-oidc-secret. Empty for the zero value.
func (k Key) String() string {
	switch k.kind {
	case RegistrationToken:
		return keyPrefix + k.id.id
	case DatabaseURI:
		return keyPrefix + k.id.id + suffixDBURI
	case OIDCClientSecret:
		return keyPrefix + k.id.id + suffixOIDC
	}
	return ""
}
