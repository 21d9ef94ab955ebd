package server

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/exto/secrets-broker/server/authz"
)

// handshakes secures connections and knows whose handshake is under way: a gRPC
// server that stops waits for those, so that one silent connection would hold up
// a shutdown beyond its bound.
type handshakes struct {
	credentials.TransportCredentials
	trust *Trust

	mu      sync.Mutex
	pending map[net.Conn]bool
	ended   bool
}

func (h *handshakes) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	h.mu.Lock()
	if h.ended {
		h.mu.Unlock()
		return nil, nil, errors.New("the server is shutting down")
	}
	h.pending[raw] = true
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.pending, raw)
	}()
	before := h.trust.now.Load()
	conn, info, err := h.TransportCredentials.ServerHandshake(raw)
	if tlsInfo, ok := info.(credentials.TLSInfo); ok {
		c := newConnection(tlsInfo)
		if after := h.trust.now.Load(); after == before {
			// The handshake verified by this one and no other.
			c.standing.Store(after.judge(c, c.State.VerifiedChains))
		}
		info = c
	}
	return conn, info, err
}

// connection is what is known of a client's connection, for all calls on it.
type connection struct {
	credentials.TLSInfo
	caller   identity
	serial   string                   // of its certificate, in lower hex
	standing atomic.Pointer[standing] // as it was last judged
	watches  atomic.Int32             // under way
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
	return &connection{caller: identity{problem: errNoCertificate}}
}

// end closes the connections whose handshake is under way, and those to come.
func (h *handshakes) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	for raw := range h.pending {
		_ = raw.Close()
	}
}
