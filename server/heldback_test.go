package server_test

import (
	"context"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/server"
)

// marked is a broker on whose connections answers wait for their records. Those of
// consoleAPI are asked for one after the other, so fast that their calls do not wait.
type marked struct {
	*system
	c    secretsv1.SecretsBrokerServiceClient
	last atomic.Int64 // mark that an answer came with
	gots int          // answers
}

// startMarked has await come before each wait for a mark that is new.
func startMarked(t *testing.T, await func(gone <-chan struct{}) bool) *marked {
	m := &marked{system: newSystem(t)}
	m.config = func(c *server.Config) {
		c.SetAwait(func(mark int64, gone <-chan struct{}) bool {
			return m.last.Swap(mark) == mark || await(gone)
		})
	}
	m.startEmbedded()
	m.c = m.as(consoleAPI)
	if _, err := m.c.PutSecret(callContext(t), &secretsv1.PutSecretRequest{Ref: ref("marked", uriKind), Value: uri(1)}); err != nil {
		t.Fatal(err)
	}
	return m
}

// get asks until so, or until a call fails.
func (m *marked) get(ctx context.Context, so func() bool) (err error) {
	for ctx.Err() == nil && err == nil && !so() {
		if _, err = m.c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("marked", uriKind)}); err == nil {
			m.gots++
		}
	}
	return err
}

// TestAnswerWaitsForItsRecord on its connection, and those on others do not.
func TestAnswerWaitsForItsRecord(t *testing.T) {
	t.Parallel()
	held, release := make(chan struct{}), make(chan struct{})
	var once, answered atomic.Bool
	m := startMarked(t, func(<-chan struct{}) bool {
		if once.CompareAndSwap(false, true) {
			close(held)
			<-release
		}
		return true
	})
	ended := make(chan error, 1)
	go func() {
		err := m.get(callContext(t), once.Load)
		answered.Store(true)
		ended <- err
	}()
	wantClosed(t, held, "an answer that waits for its record")
	// Time for an answer that does not.
	for range 3 {
		if err := list(t, m.as(consoleAPI)); err != nil {
			t.Error(err)
		}
	}
	if answered.Load() {
		t.Error("got an answer whose record is still to be waited for")
	}
	close(release)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	recorded := 0
	for _, r := range m.records() {
		if r.Action == "get" {
			recorded++
		}
	}
	if m.gots != recorded {
		t.Errorf("got %d answers and %d records of them", m.gots, recorded)
	}
}

// TestAnswerOfUnknownRecord ends with its connection, and the next call is served.
func TestAnswerOfUnknownRecord(t *testing.T) {
	t.Parallel()
	var once atomic.Bool
	m := startMarked(t, func(<-chan struct{}) bool { return !once.CompareAndSwap(false, true) })
	if err := m.get(callContext(t), func() bool { return false }); status.Code(err) != codes.Unavailable || len(status.Convert(err).Details()) > 0 {
		t.Errorf("got %v, want the end of the connection", err)
	}
	if !m.logHasLine("level=WARN", "connection closed: what was answered on it is not known to be recorded", consoleAPI) {
		t.Error("the log does not say so")
	}
	more := m.gots + 10
	if err := m.get(callContext(t), func() bool { return m.gots == more }); err != nil {
		t.Errorf("got %v, want service on another connection", err)
	}
}

// TestShutdownWhileAnswersWait for their records is not held up.
func TestShutdownWhileAnswersWait(t *testing.T) {
	t.Parallel()
	held := make(chan struct{})
	var once atomic.Bool
	m := startMarked(t, func(gone <-chan struct{}) bool {
		if once.CompareAndSwap(false, true) {
			close(held)
		}
		<-gone
		return false
	})
	ended := make(chan error, 1)
	go func() { ended <- m.get(callContext(t), func() bool { return false }) }()
	wantClosed(t, held, "an answer that waits for its record")
	bound, cancel := context.WithCancel(t.Context())
	cancel()
	wantClosed(t, m.shutdown(bound), "the end of the shutdown")
	if err := <-ended; err == nil {
		t.Error("got an answer, want none")
	}
	if m.logHasLine("connection closed: what was answered on it") {
		t.Error("the log has a line of a connection that ended by itself")
	}
}

// TestReadsBesideAWriteWait in their calls: their connection is the write's too.
func TestReadsBesideAWriteWait(t *testing.T) {
	t.Parallel()
	m := startMarked(t, func(<-chan struct{}) bool { return true })
	x := m.in(t, "demo", "active")
	reached, release := x.hang("Set", false)
	done := make(chan error, 1)
	go func() {
		_, err := m.c.PutSecret(callContext(t), &secretsv1.PutSecretRequest{Ref: ref("demo", uriKind), Value: uri(3)})
		done <- err
	}()
	wantClosed(t, reached, "the write")
	before, more := m.last.Load(), m.gots+300
	if err := m.get(callContext(t), func() bool { return m.gots == more }); err != nil {
		t.Error(err)
	}
	if after := m.last.Load(); after != before {
		t.Errorf("got marks up to %d, want none after %d", after, before)
	}
	release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	// And then they are as fast as before.
	if err := m.get(callContext(t), func() bool { return m.last.Load() != before }); err != nil || m.last.Load() == before {
		t.Errorf("got %v and no further mark", err)
	}
}

// TestAnswersWaitForTheLastRecord, whichever call comes last with its mark.
func TestAnswersWaitForTheLastRecord(t *testing.T) {
	t.Parallel()
	if got := server.Owed(3, 7, 5, 0); got != 7 {
		t.Errorf("got %d, want 7", got)
	}
}
