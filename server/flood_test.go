package server_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/race"
	"github.com/exto/secrets-broker/server"
)

// TestFloodOfOneIdentity: what another's cached Gets cost, with and without one, is
// printed; that none of them fails is what is asked. It runs beside no other test.
func TestFloodOfOneIdentity(t *testing.T) {
	if race.Enabled {
		t.Skip("under the race detector nothing is measured")
	}
	const calls, perSecond = 500, 2000
	s := newSystem(t)
	s.config = func(c *server.Config) { c.CallerRequestsPerSecond = perSecond }
	s.startEmbedded()
	c := s.as("instance/demo")
	if _, err := s.as(consoleAPI).PutSecret(callContext(t), &secretsv1.PutSecretRequest{Ref: ref("demo", tokenKind), Value: "tok"}); err != nil {
		t.Fatal(err)
	}
	p99 := func() time.Duration {
		var took []time.Duration
		for range calls { // which its own limit lets it make at once
			begun := time.Now()
			if _, err := c.GetSecret(callContext(t), &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind)}); err != nil {
				t.Fatal(err)
			}
			took = append(took, time.Since(begun))
		}
		slices.Sort(took)
		return took[len(took)*99/100]
	}
	without := p99()
	ctx, stop := context.WithCancel(callContext(t))
	var flood sync.WaitGroup
	begun := make(chan struct{}, 64)
	for range 4 {
		worker := s.as(worker)
		for range 16 {
			flood.Go(func() {
				for limited := false; ctx.Err() == nil; {
					_, err := worker.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind)})
					if !limited && status.Code(err) == codes.ResourceExhausted {
						limited = true
						begun <- struct{}{}
					}
				}
			})
		}
	}
	for range 64 { // each has met its limit
		<-begun
	}
	with := p99()
	stop()
	flood.Wait()
	t.Logf("p99 %v with a flood of another identity, %v without: %.1f times", with, without, float64(with)/float64(without))
}
