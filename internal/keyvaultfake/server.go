package keyvaultfake

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"log"
	"net"
	"net/http"
	"os"
	"sync"

	"github.com/exto/secrets-broker/internal/pki"
)

// server is an HTTP/1.1 server on loopback whose connections can be cut.
type server struct {
	gate *gate
	http *http.Server
}

// start runs a server; secure with pair. Its goroutine and its connections count as
// running.
func (f *Fake) start(pair pki.Pair, secure bool, build func(*server) http.Handler) (*server, error) {
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	s := &server{gate: &gate{TCPListener: listener, conns: map[*conn]struct{}{}}}
	s.http = &http.Server{
		Handler:   build(s),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair.TLS()}, MinVersion: tls.VersionTLS12},
		ErrorLog:  log.New(quiet{}, "key vault fake: ", 0),
		Protocols: new(http.Protocols),
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				f.running.Add(1)
			case http.StateClosed, http.StateHijacked:
				f.running.Done()
			}
		},
	}
	s.http.Protocols.SetHTTP1(true) // a cut cuts one request, not all that share a connection
	f.running.Go(func() {
		if secure {
			_ = s.http.ServeTLS(s.gate, "", "") // always http.ErrServerClosed
		} else {
			_ = s.http.Serve(s.gate)
		}
	})
	return s, nil
}

func (s *server) address() string { return s.gate.Addr().String() }

func (s *server) close() {
	s.gate.shut(true)
	_ = s.http.Close() // of a listener that is closed anyway
}

// quiet drops what net/http logs of clients that went away or do not trust the CA.
// The rest, such as a hook's panic, is seen.
type quiet struct{}

func (quiet) Write(line []byte) (int, error) {
	if bytes.Contains(line, []byte("TLS handshake error")) {
		return len(line), nil
	}
	return os.Stderr.Write(line)
}

// gate is a listener that knows its connections. While it is shut it cuts them.
type gate struct {
	*net.TCPListener
	mu     sync.Mutex
	closed bool
	conns  map[*conn]struct{}
}

// Accept waits for a connection that need not be cut.
func (g *gate) Accept() (net.Conn, error) {
	for {
		tcp, err := g.AcceptTCP()
		if err != nil {
			return nil, err
		}
		c := &conn{tcp, g}
		if g.add(c) {
			return c, nil
		}
		c.cut()
	}
}

func (g *gate) add(c *conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.conns[c] = struct{}{}
	}
	return !g.closed
}

func (g *gate) shut(closed bool) {
	g.mu.Lock()
	g.closed = closed
	var open []*conn
	if closed {
		for c := range g.conns {
			open = append(open, c)
		}
	}
	g.mu.Unlock()
	for _, c := range open {
		c.cut()
	}
}

func (g *gate) isShut() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.closed
}

// conn is a connection that came through a gate.
type conn struct {
	*net.TCPConn
	gate *gate
}

// Close closes the connection and makes the gate forget it.
func (c *conn) Close() error {
	c.gate.mu.Lock()
	delete(c.gate.conns, c)
	c.gate.mu.Unlock()
	return c.TCPConn.Close()
}

// cut resets the connection: nothing more is sent, not even an end of file.
func (c *conn) cut() {
	_ = c.SetLinger(0) // fails on a closed connection only
	_ = c.Close()
}

// cut resets the connection of a request that is being handled.
func cut(w http.ResponseWriter) {
	hijacked, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return // the connection has ended already
	}
	if secure, ok := hijacked.(*tls.Conn); ok {
		hijacked = secure.NetConn()
	}
	hijacked.(*conn).cut()
}

// randomHex is 32 lower-case hexadecimal characters that nobody can guess.
func randomHex() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
