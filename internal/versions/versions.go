// Package versions is how a secret is kept in the versions of a vault's name: what
// the broker writes into their tags, and what the list of them says of each one. The
// broker and client/direct read it alike.
package versions

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/exto/secrets-broker/secret"
)

// Limits of Key Vault that every vault keeps to:
// https://learn.microsoft.com/azure/key-vault/secrets/about-secrets
const (
	MaxTags     = 15
	MaxTagChars = 512 // of a tag's name, and of its value
)

// Tags are the names and values that a version bears, readable by all who may
// list. At most MaxTags, each at most MaxTagChars.
type Tags map[string]string

// Clone copies the tags; nil stays nil.
func (t Tags) Clone() Tags { return maps.Clone(t) }

// Check reports whether a vault would store these tags.
func (t Tags) Check() error {
	if len(t) > MaxTags {
		return fmt.Errorf("%d tags; a version bears at most %d", len(t), MaxTags)
	}
	for name, value := range t {
		if len(name) > MaxTagChars || len(value) > MaxTagChars {
			return fmt.Errorf("tag %.40q has more than %d characters", name, MaxTagChars)
		}
	}
	return nil
}

// Properties is what a vault knows of a version besides its value.
type Properties struct {
	Key secret.Key
	// Version is the vault's own id of the version: up to 32 letters and digits.
	// Empty in lists of names.
	Version string
	Enabled bool
	// Created is by the vault's clock, in whole seconds, as in Key Vault.
	Created     time.Time
	ContentType string
	Tags        Tags
}

// Version is a version with what its tags say.
type Version struct {
	Properties
	Record
}

// New reads the tags of p. Those that were copied from another secret say nothing
// of this one but that.
func New(p Properties) Version {
	r := Parse(p.Tags)
	if r.Name != "" && r.Name != p.Key.String() {
		r = Record{Format: r.Format, Name: r.Name}
	}
	return Version{p, r}
}

// Copied reports that v bears the tags of another secret.
func (v Version) Copied() bool { return v.Name != "" && v.Name != v.Key.String() }

// Marked reports whether the broker's own delete keeps this version from being
// read.
func (v Version) Marked() bool { return v.Deleted != nil && !v.Enabled }

// Beats reports whether v counts and than does not, of the broker's own versions:
// it is later; or both are one write, and v bears a delete or recover more.
func (v Version) Beats(than Version) bool {
	if v.Later(than.Record) || than.Later(v.Record) {
		return v.Later(than.Record)
	}
	return v.Made == than.Made && v.Version != than.Version && v.touched() > than.touched()
}

// touched counts the deletes and recovers that v bears of its own.
func (v Version) touched() int {
	n := 0
	if v.Deleted != nil {
		n++
	}
	for _, d := range v.Others {
		if d.Version == v.Version {
			n++
		}
	}
	return n
}

// List is all versions of a secret, the current one first, then newest first, as
// Arrange puts them. What nil says of the current version is true.
type List []Version

// Arrange puts l in order. The vault counts whole seconds, so the order cannot always
// tell which one is current: current is the id that the vault gave; empty where it
// said no more than that the current one is disabled. False: l is not of the moment
// at which it was said.
func (l List) Arrange(current string) bool {
	slices.SortStableFunc(l, func(x, y Version) int {
		return cmp.Or(y.Created.Compare(x.Created), cmp.Compare(y.Epoch, x.Epoch), cmp.Compare(y.Generation, x.Generation))
	})
	at := slices.IndexFunc(l, func(v Version) bool {
		if current == "" {
			return !v.Enabled
		}
		return v.Version == current
	})
	if at < 0 {
		return false
	}
	if current == "" {
		// Of several that are disabled and of one second somebody else's goes first: taken
		// for an older one it would have what it replaced put over it.
		for i, v := range l[at:] {
			if v.Created.Equal(l[at].Created) && !v.Enabled && v.Generation == 0 {
				at += i
				break
			}
		}
	}
	l.Lead(at)
	return true
}

// Lead makes the version at this place the current one.
func (l List) Lead(at int) {
	v := l[at]
	copy(l[1:at+1], l[:at])
	l[0] = v
}

// Index is the place of the version with this id; -1 when there is none.
func (l List) Index(id string) int {
	return slices.IndexFunc(l, func(v Version) bool { return v.Version == id })
}

// Greatest is the greatest of the broker's own versions; the zero Version when there
// is none.
func (l List) Greatest() Version {
	var greatest Version
	for _, v := range l {
		if v.Generation > 0 && (greatest.Generation == 0 || v.Beats(greatest)) {
			greatest = v
		}
	}
	return greatest
}

// Expiry is when a version stops being honoured: zero unless a rotate replaced it.
// Only the version that the last rotate replaced can be in grace, so that whatever
// came after that rotate ended it. asOf is when the list was asked for.
func (l List) Expiry(v Version, asOf time.Time) time.Time {
	for i, by := range l {
		if by.Previous != v.Version || l.putDown(by) {
			continue
		}
		end := by.GraceEnd
		if i > 0 {
			// The one that replaced by stands before it.
			for _, over := range []time.Time{l[i-1].Created, asOf} { // the vault's clock may be ahead
				if over.Before(end) {
					end = over
				}
			}
		}
		return end
	}
	return time.Time{}
}

// putDown reports whether v is a late version that was put down: it never replaced
// anything.
func (l List) putDown(v Version) bool {
	return !v.Enabled && v.Generation > 0 && slices.ContainsFunc(l, func(g Version) bool {
		return g.Generation > 0 && g.Later(v.Record) && g.Created.Before(v.Created)
	})
}

// Served reports whether v is not from before a delete that a put overwrote. The
// current version always is.
func (l List) Served(v Version) bool {
	if len(l) == 0 || v.Version == l[0].Version {
		return true
	}
	newest := l.Greatest() // it bears the bound
	if newest.First == 0 {
		return true
	}
	if v.Generation > 0 {
		return v.Generation >= newest.First
	}
	// The vault counts whole seconds; in doubt the value is not shown.
	for _, o := range l {
		if o.Generation == newest.First {
			return v.Created.After(o.Created)
		}
	}
	return false
}
