package server

import (
	"time"

	"google.golang.org/grpc"
)

// HandshakeTimeout is how long a connection may take for its handshake.
const HandshakeTimeout = handshakeTimeout

// SetHandshakeTimeout is for tests that have less time than that.
func (c *Config) SetHandshakeTimeout(d time.Duration) { c.handshakeTimeout = d }

// Services is all that is registered, which is all that can be called.
func (s *Server) Services() map[string]grpc.ServiceInfo { return s.grpc.GetServiceInfo() }
