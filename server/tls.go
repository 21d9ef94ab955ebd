package server

import (
	"context"
	"net"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/exto/secrets-broker/server/authz"
)

// connection is what is known of a client's connection, for all calls on it.
type connection struct {
	credentials.TLSInfo
	caller   identity
	serial   string                   // of its certificate, in lower hex
	standing atomic.Pointer[standing] // as it was last judged
	watches  atomic.Int32             // under way
	writes   atomic.Int32             // likewise
	peer     net.Addr
	address  string // of peer
	account  *account
	traffic  *traffic

	owed       atomic.Int64 // the last mark of the audit log that answers have to wait for
	unrecorded atomic.Bool  // an answer's record could not be written after all
}

// owe has nothing leave from now on before the audit log has come to that mark.
func (c *connection) owe(mark int64) {
	for {
		owed := c.owed.Load()
		if mark <= owed || c.owed.CompareAndSwap(owed, mark) {
			return
		}
	}
}

// Unrecorded implements audit.Holder.
func (c *connection) Unrecorded() { c.unrecorded.Store(true) }

// newConnection reads the certificate that the handshake verified.
func newConnection(info credentials.TLSInfo) *connection {
	leaf := info.State.PeerCertificates[0]
	id, err := authz.CallerFromCertificate(leaf)
	return &connection{TLSInfo: info, caller: identity{id, err}, serial: authz.Serial(leaf.SerialNumber)}
}

// connectionOf is the connection that a call came on.
func connectionOf(ctx context.Context) *connection {
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.AuthInfo.(*connection); ok {
			return c
		}
	}
	return &connection{caller: identity{problem: errNoCertificate}, account: &account{}, traffic: &traffic{clock: &atomic.Uint32{}}}
}
