package authz

import (
	"crypto/x509"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// maxCallerBytes bounds a caller's name: it is stored with every version that
// the caller writes, in a tag of at most 512 characters.
const maxCallerBytes = 512

// CallerFromCertificate is the caller's name: the one URI of its certificate,
// which must be a SPIFFE ID of at most 512 bytes. It looks at the name only; that
// the certificate is valid now is for the TLS handshake and for whoever judges a
// call to check. The error is for the operator's log: it says what is wrong and
// holds nothing of the certificate.
func CallerFromCertificate(leaf *x509.Certificate) (spiffeid.ID, error) {
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("the certificate names no caller, which takes exactly one URI, a SPIFFE ID: %w", err)
	}
	if len(id.String()) > maxCallerBytes {
		return spiffeid.ID{}, fmt.Errorf("the certificate names no caller: its SPIFFE ID has over %d bytes", maxCallerBytes)
	}
	return id, nil
}
