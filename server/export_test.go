package server

import (
	"cmp"
	"crypto/tls"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// HandshakeTimeout is how long a connection may take for its handshake.
const HandshakeTimeout = handshakeTimeout

// SetHandshakeTimeout is for tests that have less time than that.
func (c *Config) SetHandshakeTimeout(d time.Duration) { c.handshakeTimeout = d }

// SetReadEvery is how often the files are read again in tests, which have less time.
func (c *TrustConfig) SetReadEvery(d time.Duration) { c.readEvery = d }

// Look reads the files again now.
func (t *Trust) Look() { t.look() }

// Admitting gives what judges calls of a method on one connection.
func Admitting(t *Trust, state tls.ConnectionState, method string) func() error {
	conn := newConnection(credentials.TLSInfo{State: state})
	m := methods[method]
	c := &call{action: m.permission, connection: conn}
	g := &gate{trust: t, now: time.Now}
	return func() error { return g.admit(c) }
}

// SetPings is for those that have less time for clients that are gone.
func (c *Config) SetPings(interval, timeout time.Duration) {
	c.pingInterval, c.pingTimeout = interval, timeout
}

// SetAwait puts something before the wait of answers for their records.
func (c *Config) SetAwait(before func(mark int64, gone <-chan struct{}) bool) {
	c.await = func(mark int64, gone <-chan struct{}) bool { return before(mark, gone) && c.Audit.Await(mark, gone) }
}

// Owed is the mark that answers on a connection wait for when its calls have these.
func Owed(marks ...int64) int64 {
	c := &connection{}
	for _, mark := range marks {
		c.owe(mark)
	}
	return c.owed.Load()
}

// Services is all that is registered, which is all that can be called.
func (s *Server) Services() map[string]grpc.ServiceInfo { return s.grpc.GetServiceInfo() }

// QuotaPause is how long a refusal by quota is held back, and QuotaRefusals how many an
// identity gets a second.
const (
	QuotaPause    = quotaPause
	QuotaRefusals = quotaRefusals
)

// Bounds are what callers may use; those that are 0 are the usual ones.
type Bounds struct {
	Handshakes, Connections, CallerConnections int
	Calls, Streams, Held                       int64
	Receive                                    time.Duration
	IdleFrames                                 int // and as good as none later
}

// SetBounds is for tests that do not want to use so much.
func (c *Config) SetBounds(b Bounds) {
	u := usualBounds
	c.bounds = u
	c.bounds.handshakes, c.bounds.connections, c.bounds.callerConnections = cmp.Or(b.Handshakes, u.handshakes), cmp.Or(b.Connections, u.connections), cmp.Or(b.CallerConnections, u.callerConnections)
	c.bounds.calls, c.bounds.streams, c.bounds.held = cmp.Or(b.Calls, u.calls), cmp.Or(b.Streams, u.streams), cmp.Or(b.Held, u.held)
	c.bounds.receive = cmp.Or(b.Receive, u.receive)
	if b.IdleFrames > 0 {
		c.bounds.idleFrames, c.bounds.idleFramesPerSecond = b.IdleFrames, 1
	}
}

// Usage is what one identity uses of the server; all 0 when nothing is known of it.
type Usage struct {
	Connections          int
	Calls, Streams, Held int64
}

// Usage is for tests that wait until something arrived.
func (s *Server) Usage(id string) (u Usage) {
	a := s.connections.accounts
	a.mu.Lock()
	defer a.mu.Unlock()
	if acc := a.of[spiffeid.RequireFromString(id)]; acc != nil {
		u = Usage{acc.connections, acc.calls.Load(), acc.streams.Load(), acc.held.Load()}
	}
	return u
}

// Accounts is how many identities something is known of.
func (s *Server) Accounts() int {
	a := s.connections.accounts
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.of)
}
