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
	peer     net.Addr
	address  string // of peer
	account  *account
	traffic  *traffic
}

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
