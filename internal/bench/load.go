package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/exto/secrets-broker/internal/devdir"
)

// mostConnections are over how many the callers are spread.
const mostConnections = 4

// load keeps callers busy with calls of one server.
type load struct {
	address     string
	request     request
	callers     int
	connections []*connection
	group       *errgroup.Group
	failed      context.Context // done when a connection failed, or all have ended

	stopping  atomic.Bool
	measuring atomic.Bool // latencies count
}

// clientTLS is the side of the caller of the folder dir that may call all that is
// measured.
func clientTLS(dir string) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(devdir.PairFiles(dir, "console-api"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, RootCAs: roots}, nil
}

// dial connects to a server, with the certificates of dir.
func dial(ctx context.Context, address, dir string, r request, callers int) (_ *load, err error) {
	config, err := clientTLS(dir)
	if err != nil {
		return nil, err
	}
	config.NextProtos = []string{"h2"}
	dialer := &tls.Dialer{Config: config}
	l := &load{address: address, request: r, callers: callers, connections: make([]*connection, min(mostConnections, callers))}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	first := firstSerial()
	for i := range l.connections {
		conn, err := dialer.DialContext(ctx, "tcp", address)
		if err != nil {
			return nil, fmt.Errorf("connecting: %w", err)
		}
		var mine []caller
		for index := i; index < callers; index += len(l.connections) {
			mine = append(mine, caller{index: index})
		}
		if l.connections[i], err = newConnection(l, conn.(*tls.Conn), mine, first+uint64(i)); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("connecting: %w", err)
		}
	}
	return l, nil
}

// start has all callers call until stop, the end of ctx, or a failure, which is
// any answer but OK.
func (l *load) start(ctx context.Context) {
	l.group, l.failed = errgroup.WithContext(ctx)
	for _, c := range l.connections {
		l.group.Go(c.run)
	}
	context.AfterFunc(l.failed, l.close) // the others wait for answers
}

// stop waits for the calls under way and reports what failed.
func (l *load) stop() error {
	l.stopping.Store(true)
	return l.group.Wait()
}

func (l *load) close() {
	for _, c := range l.connections {
		if c != nil {
			_ = c.tls.Close()
		}
	}
}

// answered counts the answers so far.
func (l *load) answered() (n int64) {
	for _, c := range l.connections {
		n += c.answers.Load()
	}
	return n
}

// latencies are those of the measured window, once the load has stopped.
func (l *load) latencies() *latencies {
	all := &latencies{}
	for _, c := range l.connections {
		all.merge(&c.latencies)
	}
	return all
}
