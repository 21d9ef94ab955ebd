package authz

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math/big"
	"regexp"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Revoked says which certificates are none any more. It is made by ParseRevoked
// and never changes; the zero value revokes nothing. It is safe for concurrent use.
type Revoked struct {
	serials map[string]bool // as Serial writes them
	callers map[spiffeid.ID]bool
}

// Colons stand between digits, as openssl writes them, and nowhere else.
var serialForm = regexp.MustCompile(`^[0-9A-Fa-f]+(:[0-9A-Fa-f]+)*$`)

// ParseRevoked reads a list of what is revoked: in each line a certificate's serial
// number in hex, in which colons, case and leading zeros do not matter, or a SPIFFE
// ID. A # begins a comment, and lines may be empty. Any other line is an error, which
// names the line and repeats nothing of it.
func ParseRevoked(data []byte) (*Revoked, error) {
	r := &Revoked{serials: map[string]bool{}, callers: map[spiffeid.ID]bool{}}
	n := 0
	for line := range bytes.Lines(data) {
		n++
		text, _, _ := strings.Cut(string(line), "#")
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		if err := r.add(text); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
	return r, nil
}

func (r *Revoked) add(text string) error {
	if serialForm.MatchString(text) {
		digits := strings.TrimLeft(strings.ToLower(strings.ReplaceAll(text, ":", "")), "0")
		r.serials[cmp.Or(digits, "0")] = true
		return nil
	}
	id, err := spiffeid.FromString(text)
	if err != nil || len(text) > maxCallerBytes {
		return errors.New("accepted is a certificate's serial number in hex, such as 3f:a2:01, or a SPIFFE ID, such as spiffe://console.exto/worker; # begins a comment")
	}
	r.callers[id] = true
	return nil
}

// Serial writes a certificate's serial number in lower hex, without leading zeros.
func Serial(n *big.Int) string { return n.Text(16) }

// HasSerial reports whether the certificate with this serial number is revoked, as
// Serial writes it.
func (r *Revoked) HasSerial(serial string) bool { return r.serials[serial] }

// HasCaller reports whether every certificate of this caller is revoked.
func (r *Revoked) HasCaller(id spiffeid.ID) bool { return r.callers[id] }
