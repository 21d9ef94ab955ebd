package embedded

import (
	"errors"
	"fmt"
	"runtime/debug"

	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/exto/secrets-broker/server/vault"
)

// alive looks whether bbolt can begin a transaction. It reads the meta pages with
// its locks held and does not give them back when that fails, as it does when the
// file was cut or written over, with cp say: every call would hang. So we read
// them first.
func (s *Store) alive() error {
	if s.dead.Load() {
		return errors.New("no more calls until a restart")
	}
	if !metaSound(s.metas, 0) && !metaSound(s.metas[len(s.metas)/2:], 1) {
		return fmt.Errorf("%w: the file was written over", errPanic)
	}
	return nil
}

// errPanic is a panic of bbolt, or a fault in mapped memory.
var errPanic = errors.New("broken")

// guard runs fn and makes an error of its panic. bbolt panics when a page is not
// what it expects, and an I/O error in mapped memory is a fault; neither is a
// reason for the process to die.
func guard(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch p := recover().(type) {
		case nil:
		case error: // its text and a string's are for the log: bbolt knows names, and of values what is sealed
			err = fmt.Errorf("%w: %v", errPanic, p)
		case string:
			err = fmt.Errorf("%w: %s", errPanic, p)
		default:
			err = fmt.Errorf("%w: %s", errPanic, fmt.Sprintf("%T", p))
		}
	}()
	return fn()
}

// classify makes an error of package vault of every error that is none.
func (s *Store) classify(err error) error {
	switch {
	case err == nil, errors.Is(err, vault.ErrNotFound), errors.Is(err, vault.ErrDisabled),
		errors.Is(err, vault.ErrDeleted), errors.Is(err, vault.ErrUnavailable):
		return err
	case errors.Is(err, bolterrors.ErrDatabaseNotOpen):
		return s.unavailable(errClosed)
	}
	if errors.Is(err, errPanic) || errors.Is(err, errRecord) || errors.Is(err, errSealed) {
		s.logDamage.Do(func() {
			s.log.Error("the secret store is damaged: restore it from a backup", "path", s.path, "error", err)
		})
	}
	return s.unavailable(err)
}

var errClosed = errors.New("closed")

func (s *Store) unavailable(err error) error {
	return fmt.Errorf("%w: %s: %w", vault.ErrUnavailable, s.path, err)
}
