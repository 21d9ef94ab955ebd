// Package authz decides who may call the broker: it reads the caller's one name
// from its certificate, and judges by a policy what that name may do. It decides
// and nothing else; its callers see to it that every decision is recorded.
package authz

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/exto/secrets-broker/secret"
)

// Permission is a word of a rule's allow: that of an RPC, or debug. What is none
// of the constants, the zero value too, is allowed to nobody.
type Permission string

// The ten permissions. Debug is for server reflection and channelz, each other
// one for the RPC of its name.
const (
	Put      Permission = "put"
	Get      Permission = "get"
	Rotate   Permission = "rotate"
	Delete   Permission = "delete"
	Recover  Permission = "recover"
	Verify   Permission = "verify"
	Describe Permission = "describe"
	List     Permission = "list"
	Watch    Permission = "watch"
	Debug    Permission = "debug"
)

var permissions = []Permission{Put, Get, Rotate, Delete, Recover, Verify, Describe, List, Watch, Debug}

// Policy says which callers may do what. It is made by ParsePolicy and never
// changes; the zero value allows nothing to anybody. It is safe for concurrent
// use, and no decision about a caller that it knows allocates memory.
//
// Rules add up and none takes anything away: a call is allowed when a single
// rule allows all of it.
type Policy struct {
	exact     map[spiffeid.ID][]rule
	templates []template
}

// A rule gives its callers permissions for kinds and instances.
type rule struct {
	permissions bits
	kinds       bits
	// instances is nil for all. Rules of a template have none: they reach the
	// instance that the caller's name holds and no other.
	instances map[secret.InstanceID]bool
}

// A template is an identity with {instance_id}, taken apart there.
type template struct {
	before, after string
	rules         []rule
}

// instance is the id that stands in the caller's name where the template has
// {instance_id}; false when the caller is none of the template's. An instance id
// has no slash, so that it is one whole segment of the name.
func (t *template) instance(caller string) (secret.InstanceID, bool) {
	rest, ok := strings.CutPrefix(caller, t.before)
	if !ok {
		return secret.InstanceID{}, false
	}
	if rest, ok = strings.CutSuffix(rest, t.after); !ok {
		return secret.InstanceID{}, false
	}
	id, err := secret.ParseInstanceID(rest)
	return id, err == nil
}

// bits is a set of small numbers.
type bits uint16

func permissionBit(p Permission) bits {
	i := slices.Index(permissions, p)
	if i < 0 {
		return 0
	}
	return 1 << i
}

func kindBit(k secret.Kind) bits { return 1 << k }

// Knows reports whether some rule is about this caller. A caller of another
// trust domain is never known.
func (p *Policy) Knows(caller spiffeid.ID) bool {
	return p.someRule(caller, func(*rule, secret.InstanceID) bool { return true })
}

// Permits reports whether some rule gives the caller this permission, for
// whatever secret.
func (p *Policy) Permits(caller spiffeid.ID, permission Permission) bool {
	want := permissionBit(permission)
	return p.someRule(caller, func(r *rule, _ secret.InstanceID) bool {
		return r.permissions&want != 0
	})
}

// Allows reports whether a single rule gives the caller this permission for this
// kind of this instance. Nobody is allowed the zero Key.
func (p *Policy) Allows(caller spiffeid.ID, permission Permission, key secret.Key) bool {
	want, kind := permissionBit(permission), kindBit(key.Kind())
	return p.someRule(caller, func(r *rule, own secret.InstanceID) bool {
		return r.permissions&want != 0 && r.kinds&kind != 0 && r.reaches(key.InstanceID(), own)
	})
}

// AllowsInstance reports whether a single rule gives the caller this permission
// for this instance, for whatever kind. Nobody is allowed the zero InstanceID.
func (p *Policy) AllowsInstance(caller spiffeid.ID, permission Permission, id secret.InstanceID) bool {
	want := permissionBit(permission)
	return id != secret.InstanceID{} && p.someRule(caller, func(r *rule, own secret.InstanceID) bool {
		return r.permissions&want != 0 && r.reaches(id, own)
	})
}

// reaches reports whether the rule is about this instance. own is the instance
// that the caller's name holds, when the rule is a template's.
func (r *rule) reaches(id, own secret.InstanceID) bool {
	if own != (secret.InstanceID{}) {
		return id == own
	}
	return r.instances == nil || r.instances[id]
}

// someRule reports whether f is true of one of the caller's rules. The trust
// domain needs no look: ParsePolicy lets no identity of another one in.
func (p *Policy) someRule(caller spiffeid.ID, f func(r *rule, own secret.InstanceID) bool) bool {
	rules := p.exact[caller]
	for i := range rules {
		if f(&rules[i], secret.InstanceID{}) {
			return true
		}
	}
	for i := range p.templates {
		t := &p.templates[i]
		own, ok := t.instance(caller.String())
		for j := range t.rules {
			if ok && f(&t.rules[j], own) {
				return true
			}
		}
	}
	return false
}
