// Package vault is what the broker asks of the store that holds the secrets. It
// is shaped by what Azure Key Vault can do, so that every store behaves like the
// one in production: a secret is a name with versions, each version has tags,
// deletes are soft, lists come in pages, and there is no compare-and-set.
//
// Implementations are in the packages beside it; vaulttest is the suite that
// each of them passes.
package vault

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
)

// What a vault keeps of a version is described once, for those who read it without
// the broker too.
type (
	// Tags are the names and values that a version bears.
	Tags = versions.Tags
	// Properties is what a vault knows of a version besides its value.
	Properties = versions.Properties
)

// Vault keeps secrets. All methods are safe for concurrent use and return within
// their context, but for the time of a commit under way. Every error wraps one
// of the errors of this package, or the context's.
//
// A method that writes calls BeginEffect before it changes anything. It returns an
// error with IsUncertain when the write may have happened or may yet; after any
// other error it did not happen and will not. It is not repeated by the vault, so
// that who knows what makes a write one write decides that.
type Vault interface {
	// Set stores a new version, which becomes the current one. A deleted name is
	// ErrDeleted.
	Set(ctx context.Context, key secret.Key, v NewVersion) (Properties, error)

	// Get reads a version and its value, the current one when version is empty.
	// ErrNotFound when there is no such version or the name is deleted. A
	// disabled version is ErrDisabled; as in Key Vault, nothing else is said of
	// it, and no older version takes its place.
	Get(ctx context.Context, key secret.Key, version string) (Properties, secret.Value, error)

	// Versions lists all versions in no promised order. ErrNotFound when the name
	// is absent or deleted.
	Versions(ctx context.Context, key secret.Key) ([]Properties, error)

	// Update sets the attributes of a version and replaces all of its tags. Its
	// value and content type stay. ErrNotFound as for Get.
	Update(ctx context.Context, key secret.Key, version string, p Patch) (Properties, error)

	// Delete soft-deletes the name with all of its versions. ErrNotFound when it
	// is absent or deleted already.
	Delete(ctx context.Context, key secret.Key) (Deleted, error)

	// GetDeleted reads what is left of a deleted name: the properties of its
	// newest version, without the value. ErrNotFound when it is not deleted.
	GetDeleted(ctx context.Context, key secret.Key) (Deleted, error)

	// Recover undoes Delete and returns once the name can be used again.
	// ErrNotFound when it is not deleted.
	Recover(ctx context.Context, key secret.Key) error

	// Settle waits until a name is in no state between, in which neither Get nor
	// GetDeleted finds it though it is not gone. ErrNotFound when it is absent;
	// nil when it is live or deleted. It changes nothing.
	Settle(ctx context.Context, key secret.Key) error

	// List gives the newest version of each live name, without version ids, in
	// pages of at most max (at least 1), beginning where the skip of the page
	// before ends; what is no skip of this list is ErrSkip. Names that are no
	// secret.Key are left out.
	List(ctx context.Context, skip string, max int) (Page, error)

	// ListDeleted is List for deleted names. Neither shows what is in a state
	// between.
	ListDeleted(ctx context.Context, skip string, max int) (Page, error)

	// Check reports whether the vault can be used now; nil is yes.
	Check(ctx context.Context) error

	// Info describes the vault. It does not change and does not block.
	Info() Info

	// Close ends it, after the calls under way. Calls after Close are
	// ErrUnavailable.
	Close() error
}

// Info describes a vault to the operator and to the broker.
type Info struct {
	// Name is how the start-up log calls it, such as "embedded".
	Name string
	// Location says where it keeps its secrets, such as path=/data/store.db.
	// The zero Attr when it keeps none.
	Location slog.Attr
	// Discards reports that the vault keeps nothing: a write succeeds and is
	// forgotten.
	Discards bool
}

// NewVersion is a version to be stored. It is enabled.
type NewVersion struct {
	// First says that the name was found nowhere. Should it be in a state between,
	// that is ErrDeleted, and not waited out: what comes after it may be a secret
	// with versions.
	First       bool
	Value       secret.Value
	ContentType string
	Tags        Tags
}

// Patch is what Update sets.
type Patch struct {
	Enabled bool
	// Tags replace all tags of the version; nil removes them all.
	Tags Tags
}

// Deleted is a deleted name: the properties of its newest version, and when it
// was deleted and will be purged.
type Deleted struct {
	Properties
	DeletedAt time.Time
	PurgeAt   time.Time
}

// Page is a page of a list. Deleted holds the items of ListDeleted, Live those of
// List.
type Page struct {
	Live    []Properties
	Deleted []Deleted
	// Next is the skip of the next page; empty on the last. It is the vault's own
	// and says nothing of hosts or paths.
	Next string
}

// What a vault answers besides success.
var (
	// ErrNotFound: no such name or version now.
	ErrNotFound = errors.New("vault: not found")
	// ErrDisabled: the version is disabled.
	ErrDisabled = errors.New("vault: version disabled")
	// ErrDeleted: the name is deleted and can be recovered.
	ErrDeleted = errors.New("vault: name deleted")
	// ErrSkip: not a place in this list.
	ErrSkip = errors.New("vault: not a place in the list")
	// ErrThrottled: too many requests; wait and ask again.
	ErrThrottled = errors.New("vault: throttled")
	// ErrRefused: the vault refuses the broker itself.
	ErrRefused = errors.New("vault: credentials refused")
	// ErrUnavailable: the vault cannot be reached or cannot do its work.
	ErrUnavailable = errors.New("vault: unavailable")
)

type throttledError struct {
	err   error
	after time.Duration
}

func (e throttledError) Error() string { return e.err.Error() }
func (e throttledError) Unwrap() error { return e.err }

// Throttled is err, which wraps ErrThrottled, with the time after which the vault
// wants to be asked again.
func Throttled(err error, after time.Duration) error { return throttledError{err, after} }

// RetryAfter is the time that the vault named in a refusal; zero when it named
// none.
func RetryAfter(err error) time.Duration {
	var t throttledError
	errors.As(err, &t)
	return t.after
}

type uncertainError struct{ err error }

func (e uncertainError) Error() string { return "outcome unknown: " + e.err.Error() }
func (e uncertainError) Unwrap() error { return e.err }

// Uncertain marks the error of a write that may have happened or may yet.
func Uncertain(err error) error { return uncertainError{err} }

// IsUncertain reports whether a write that ended with err may have happened or
// may yet.
func IsUncertain(err error) bool {
	var u uncertainError
	return errors.As(err, &u)
}
