package server

import (
	"container/list"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
)

var (
	errShutDown = errors.New("the server is shutting down")
	errTooMany  = errors.New("too many connections")
	// errHeldBack is for what was answered when it was thought that the record would follow.
	errHeldBack = errors.New("what is answered here is not known to be recorded")
)

// connections secures connections and knows all that are open. A gRPC server that
// stops waits for handshakes under way, so that one silent connection would hold up
// a shutdown beyond its bound; and it takes any number of them.
type connections struct {
	credentials.TransportCredentials
	trust    *Trust
	accounts *accounts
	refusals *refusals
	await    func(mark int64, gone <-chan struct{}) bool // of the audit log
	log      *slog.Logger
	clock    atomic.Uint32 // counts quarters of the time that a request may take

	mu      sync.Mutex
	pending list.List // of *guarded: no HTTP/2 yet, the oldest first
	open    map[*guarded]bool
	ended   bool
}

// guarded is a connection from its acceptance until it is closed.
type guarded struct {
	net.Conn   // secured; nil before
	raw        net.Conn
	all        *connections
	pending    *list.Element // guarded by all.mu, as is released
	released   bool
	connection *connection // nil before the handshake is done
	*traffic
	// reading is so while somebody waits for what the client sends, and for good after
	// an error: a Close otherwise is because of what it sent.
	reading atomic.Bool
	left    atomic.Bool   // the end was announced
	gone    chan struct{} // closed once released
}

// ServerHandshake is in force up to the client's HTTP/2 preface: pending ends with its
// first frame.
func (c *connections) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	g := &guarded{raw: raw, all: c, gone: make(chan struct{})}
	if err := c.begin(g); err != nil {
		return nil, nil, err
	}
	before := c.trust.now.Load()
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		if c.release(g) && !c.over() { // else it was shed, and counted then
			c.refusals.handshake(raw.RemoteAddr(), err)
		}
		return nil, nil, err
	}
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok {
		c.release(g)
		return nil, nil, errors.New("the connection is not secured by TLS")
	}
	client := newConnection(tlsInfo)
	client.peer = raw.RemoteAddr()
	client.address = client.peer.String()
	if after := c.trust.now.Load(); after == before {
		// The handshake verified by this one and no other.
		client.standing.Store(after.judge(client, client.State.VerifiedChains))
	}
	if client.account = c.accounts.open(client.caller.id); client.account == nil {
		c.release(g)
		c.refusals.report(refusalOn(client, whyCallerConnections))
		_ = conn.Close()
		return nil, nil, errTooMany
	}
	c.mu.Lock()
	g.Conn, g.connection, g.traffic = conn, client, newTraffic(c, client.account)
	client.traffic = g.traffic
	released := g.released
	c.mu.Unlock()
	if released { // shed meanwhile
		c.accounts.close(client.caller.id, client.account)
		return nil, nil, net.ErrClosed
	}
	return g, client, nil
}

// over reports whether the server is shutting down.
func (c *connections) over() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// begin takes a connection in, and sheds another if need be.
func (c *connections) begin(g *guarded) error {
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		return errShutDown
	}
	if len(c.open)-c.pending.Len() >= c.accounts.connections {
		c.mu.Unlock()
		c.refusals.report(transportRefusal{peer: g.raw.RemoteAddr(), why: whyConnections})
		return errTooMany
	}
	var oldest *guarded
	if c.pending.Len() >= c.accounts.handshakes {
		oldest = c.pending.Front().Value.(*guarded)
	}
	c.open[g] = true
	g.pending = c.pending.PushBack(g)
	c.mu.Unlock()
	if oldest != nil {
		oldest.shed(whyHandshakes)
	}
	return nil
}

// release ends the account of a connection, and reports whether it had not ended before.
func (c *connections) release(g *guarded) bool {
	c.mu.Lock()
	if g.released {
		c.mu.Unlock()
		return false
	}
	g.released = true
	close(g.gone)
	delete(c.open, g)
	early := g.pending != nil && !c.ended
	c.settle(g)
	client, traffic := g.connection, g.traffic
	c.mu.Unlock()
	if client != nil {
		traffic.end()
		c.accounts.close(client.caller.id, client.account)
		if early {
			g.left.Store(true) // all is said by this
			c.refusals.report(refusalOn(client, whyPreface))
		}
	}
	return true
}

// settle takes a connection from those that are pending.
func (c *connections) settle(g *guarded) {
	if g.pending != nil {
		c.pending.Remove(g.pending)
		g.pending = nil
	}
}

// established is for a connection that speaks HTTP/2.
func (c *connections) established(g *guarded) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle(g)
}

// end closes the connections whose handshake is under way, and those to come.
func (c *connections) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	for e := c.pending.Front(); e != nil; e = e.Next() {
		_ = e.Value.(*guarded).raw.Close()
	}
}

// watch sheds connections on which a request does not come to its end, until done.
func (c *connections) watch(done <-chan struct{}) {
	tick := time.NewTicker(c.accounts.receive / quarters)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		now := c.clock.Add(1)
		var late []*guarded
		c.mu.Lock()
		for g := range c.open {
			if g.traffic != nil && g.traffic.late(now) {
				late = append(late, g)
			}
		}
		c.mu.Unlock()
		for _, g := range late {
			g.shed(whyUnfinished)
		}
	}
}

// shed closes a connection for that reason.
func (g *guarded) shed(why string) {
	refusal := transportRefusal{peer: g.raw.RemoteAddr(), why: why}
	g.all.mu.Lock()
	if g.connection != nil {
		refusal = refusalOn(g.connection, why)
	}
	g.all.settle(g) // this is the reason that counts, not that there was no HTTP/2 yet
	g.all.mu.Unlock()
	first := g.all.release(g)
	// Not Close, which says goodbye to a client that may not be reading.
	_ = g.raw.Close()
	if first {
		g.all.refusals.report(refusal)
	}
}

func (g *guarded) Read(p []byte) (int, error) {
	begun := g.in.begun
	g.reading.Store(true)
	n, err := g.Conn.Read(p)
	if why := g.received(p[:n]); why != "" {
		g.shed(why)
		return 0, net.ErrClosed
	}
	if g.in.begun && !begun {
		g.all.established(g)
	}
	if err == nil {
		g.reading.Store(false)
	}
	return n, err
}

// Write lets nothing leave before the records of all that was answered up to now are
// written. Calls have waited for theirs where that was in doubt: when it fails all the
// same there is no way to tell them, but the end of the connection.
func (g *guarded) Write(p []byte) (int, error) {
	if owed := g.connection.owed.Load(); !g.all.await(owed, g.gone) || g.connection.unrecorded.Load() {
		select {
		case <-g.gone: // nobody is there to miss it
		default:
			g.all.log.Warn("connection closed: what was answered on it is not known to be recorded", "caller", g.connection.caller.name(), "peer.address", g.connection.address)
		}
		g.left.Store(true) // the end is no fault of the client
		_ = g.raw.Close()  // gRPC leaves it to who reads to find out
		return 0, errHeldBack
	}
	why, left := g.sent(p)
	if why != "" {
		g.all.refusals.report(refusalOn(g.connection, why))
	}
	if left {
		g.left.Store(true)
	}
	return g.Conn.Write(p)
}

// Close is gRPC's, which says nothing to a client whose frames are none.
func (g *guarded) Close() error {
	if g.all.release(g) && !g.reading.Load() && !g.left.Load() && !g.all.over() {
		g.all.refusals.report(refusalOn(g.connection, whyProtocol))
	}
	return g.Conn.Close()
}
