package server

import (
	"crypto/tls"
	"time"

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
	c := &call{caller: conn.caller, conn: conn}
	g := &gate{trust: t, now: time.Now}
	return func() error { return g.admit(c, method) }
}

// Services is all that is registered, which is all that can be called.
func (s *Server) Services() map[string]grpc.ServiceInfo { return s.grpc.GetServiceInfo() }
