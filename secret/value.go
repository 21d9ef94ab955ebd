package secret

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"unicode"
	"unicode/utf8"
)

// maxValueBytes is the longest value of any kind. Key Vault accepts 25 KB.
const maxValueBytes = 25_000

// maxChars bounds tokens and client secrets: both travel in HTTP headers.
const maxChars = 4096

const redacted = "***"

// Value is a secret in memory. No formatting verb, logger, encoder or error
// shows it: it prints as ***. Only Reveal gives it away. The zero value is the
// empty value. Values do not compare with ==; use Equal.
type Value struct {
	_ [0]func()
	// A pointer, because fmt reaches through unexported fields of a struct that
	// holds a Value without asking its Format, and follows no pointer there.
	s *string
}

// NewValue wraps s unchecked, as for a value that the vault gave: what a person
// stored is served as it is. CheckValue judges one that a caller supplies.
func NewValue(s string) Value { return Value{s: &s} }

// Reveal returns the secret itself, for the wire and for the vault.
func (v Value) Reveal() string {
	if v.s == nil {
		return ""
	}
	return *v.s
}

// Equal reports whether both hold the same secret, in a time that depends on
// their lengths alone.
func (v Value) Equal(other Value) bool {
	return subtle.ConstantTimeCompare([]byte(v.Reveal()), []byte(other.Reveal())) == 1
}

// IsEmpty reports whether the secret has no characters.
func (v Value) IsEmpty() bool { return v.Reveal() == "" }

// Format writes *** for every verb.
func (Value) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String is ***.
func (Value) String() string { return redacted }

// LogValue is ***.
func (Value) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText gives ***, to encoding/json and all other encoders of text.
func (Value) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// CheckValue reports whether v may be stored as a secret of this kind: nil, or
// an error that says what is accepted and holds no part of v.
func CheckValue(kind Kind, v Value) error {
	s := v.Reveal()
	switch {
	case s == "":
		return errors.New("a value is required")
	case len(s) > maxValueBytes:
		return fmt.Errorf("the value is too long: at most %d bytes", maxValueBytes)
	case !utf8.ValidString(s):
		return errors.New("the value is not valid UTF-8")
	}
	switch kind {
	case RegistrationToken:
		return checkToken(s)
	case DatabaseURI:
		return checkDatabaseURI(s)
	case OIDCClientSecret:
		if utf8.RuneCountInString(s) > maxChars {
			return fmt.Errorf("an OIDC client secret has at most %d characters", maxChars)
		}
		for _, r := range s {
			if !unicode.IsPrint(r) {
				return errors.New("an OIDC client secret has printable characters only, and no line break")
			}
		}
		return nil
	}
	return errors.New("a kind is required")
}
