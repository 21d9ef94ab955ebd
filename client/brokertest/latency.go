package brokertest

import (
	"net"
	"sync"
	"time"
)

// latency is how late what the broker sends arrives.
type latency struct {
	mu      sync.Mutex
	d       time.Duration
	changed chan struct{} // closed when d is another one
}

func (l *latency) set(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.d = d
	close(l.changed)
	l.changed = make(chan struct{})
}

// wait lets the time pass, until it is another one or the connection is over.
func (l *latency) wait(over <-chan struct{}) {
	l.mu.Lock()
	d, changed := l.d, l.changed
	l.mu.Unlock()
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-changed:
	case <-over:
	}
}

// lateListener accepts connections that send late.
type lateListener struct {
	net.Listener
	latency *latency
}

func (l lateListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	over := make(chan struct{})
	return &lateConn{conn, l.latency, over, sync.OnceFunc(func() { close(over) })}, nil
}

type lateConn struct {
	net.Conn
	latency *latency
	over    chan struct{}
	end     func()
}

func (c *lateConn) Write(p []byte) (int, error) {
	c.latency.wait(c.over)
	return c.Conn.Write(p)
}

func (c *lateConn) Close() error {
	c.end()
	return c.Conn.Close()
}
