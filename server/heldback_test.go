package server_test

import (
	"sync/atomic"
	"testing"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/server"
)

// TestAnswerWaitsForItsRecord on its connection, when calls come so fast that they
// themselves do not wait.
func TestAnswerWaitsForItsRecord(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	held, release := make(chan struct{}), make(chan struct{})
	var once atomic.Bool
	s.config = func(c *server.Config) {
		c.SetAwait(func(mark int64) {
			if mark > 0 && once.CompareAndSwap(false, true) {
				close(held)
				<-release
			}
		})
	}
	s.startEmbedded()
	ctx, c := callContext(t), s.as(consoleAPI)
	if _, err := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", uriKind), Value: "postgres://u:p@db/i"}); err != nil {
		t.Fatal(err)
	}
	var answers atomic.Int64
	ended := make(chan error, 1)
	go func() {
		var err error
		for n := 0; n < 5000 && err == nil && !once.Load(); n++ {
			_, err = c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", uriKind)})
			answers.Add(1)
		}
		ended <- err
	}()
	select {
	case err := <-ended:
		t.Fatalf("got %v, and no answer that had to wait for its record", err)
	case <-held:
	}
	before := answers.Load()
	// Time for an answer that did not wait; others are not held up.
	for range 3 {
		if _, err := healthpb.NewHealthClient(s.dial(s.callerTLS(consoleAPI))).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
			t.Error(err)
		}
	}
	if n := answers.Load(); n != before {
		t.Error("got an answer whose record is still to be waited for")
	}
	close(release)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	recorded := int64(0)
	for _, r := range s.records() {
		if r.Action == "get" {
			recorded++
		}
	}
	if n := answers.Load(); n != recorded {
		t.Errorf("got %d answers and %d records of them", n, recorded)
	}
}

// TestAnswersWaitForTheLastRecord, whichever call comes last with its mark.
func TestAnswersWaitForTheLastRecord(t *testing.T) {
	t.Parallel()
	if got := server.Owed(3, 7, 5, 0); got != 7 {
		t.Errorf("got %d, want 7", got)
	}
}
