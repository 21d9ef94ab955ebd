package client

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// connection is what calls are made on until another one takes its place.
type connection struct {
	grpc  *grpc.ClientConn
	rpc   secretsv1.SecretsBrokerServiceClient
	calls sync.WaitGroup

	// Ended when calls are to go elsewhere: streams don't end by themselves.
	ctx    context.Context
	retire context.CancelFunc
}

// connections holds the connection in use and replaces it when the files
// change: the broker judges the certificate on every call, so an open connection
// must not outlive the one that it was made with.
type connections struct {
	ctx    context.Context // ended by stop
	cancel context.CancelFunc
	ended  chan struct{} // closed when follow has returned

	mu  sync.RWMutex
	now *connection
}

func (cs *connections) start(c *Client) error {
	cs.ctx, cs.cancel = context.WithCancel(context.Background())
	first, err := c.open()
	if err != nil {
		cs.cancel()
		return err
	}
	cs.now, cs.ended = first, make(chan struct{})
	_, version := c.files.current()
	go cs.follow(c, version)
	return nil
}

func (cs *connections) stop() error {
	cs.cancel()
	<-cs.ended
	return cs.now.grpc.Close()
}

// acquire is the connection for one call, whose end the caller tells it by
// calls.Done.
func (cs *connections) acquire() *connection {
	cs.mu.RLock()
	defer cs.mu.RUnlock()
	cs.now.calls.Add(1) // within the lock, so never after replace waits for them
	return cs.now
}

// open makes another connection, which connects when it is first used.
func (c *Client) open() (*connection, error) {
	cc, err := grpc.NewClient(c.target, c.options...)
	if err != nil {
		return nil, err
	}
	conn := &connection{grpc: cc, rpc: secretsv1.NewSecretsBrokerServiceClient(cc)}
	conn.ctx, conn.retire = context.WithCancel(c.ctx)
	return conn, nil
}

// follow looks at the files until stop; version is the one that is in use.
func (cs *connections) follow(c *Client, version int) {
	defer close(cs.ended)
	tick := time.NewTicker(fileInterval)
	defer tick.Stop()
	for {
		select {
		case <-cs.ctx.Done():
			return
		case <-tick.C:
		}
		_, latest := c.files.current()
		if latest == version {
			continue
		}
		version = latest
		// One that is not connected makes its next handshake with the new files.
		if cs.now.grpc.GetState() != connectivity.Idle {
			cs.replace(c)
		}
	}
}

// replace goes over to a new connection once it is ready: if the broker refuses
// the new certificate, the old one is better than none.
func (cs *connections) replace(c *Client) {
	fresh, err := c.open()
	if err != nil {
		return // as New would have said
	}
	fresh.grpc.Connect()
	for state := fresh.grpc.GetState(); state != connectivity.Ready; state = fresh.grpc.GetState() {
		if !fresh.grpc.WaitForStateChange(cs.ctx, state) {
			fresh.retire()
			_ = fresh.grpc.Close()
			return
		}
	}
	cs.mu.Lock()
	old := cs.now
	cs.now = fresh
	cs.mu.Unlock()

	old.retire()
	done := make(chan struct{})
	go func() {
		defer close(done)
		old.calls.Wait()
	}()
	select {
	case <-done:
	case <-cs.ctx.Done():
	}
	_ = old.grpc.Close()
	<-done
}
