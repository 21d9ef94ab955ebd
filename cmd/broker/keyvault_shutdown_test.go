package main

import (
	"context"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

// TestKeyVaultShutdownDuringAWrite: what a shutdown cuts off tells its caller so,
// with what became of it, and the same request at the next broker ends it.
func TestKeyVaultShutdownDuringAWrite(t *testing.T) {
	t.Parallel()
	c := secretCloud(t, devFolder(t), keyvaultfake.Config{})
	p := c.start("BROKER_SHUTDOWN_TIMEOUT", "5s") // a tenth of it is for what is cut off to be told
	reached, hold := make(chan struct{}, 1), make(chan struct{})
	c.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op != keyvaultfake.OpSet || r.Challenge {
			return keyvaultfake.Fault{}
		}
		select {
		case reached <- struct{}{}:
		default:
		}
		return keyvaultfake.Fault{Hold: hold}
	})
	id := uuid.NewString()
	put := func(ctx context.Context, p *process) error {
		_, err := p.as("console-api").PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", oidcKind), Value: "held", RequestId: id})
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- put(ctx, p) }()
	<-reached
	p.end(syscall.SIGTERM)
	err := <-done
	if reason, commit := told(err); reason != "SHUTTING_DOWN" || commit != "UNKNOWN" {
		t.Errorf("got %v, want SHUTTING_DOWN with UNKNOWN", err)
	}
	c.OnRequest(nil)
	close(hold)
	next := c.start()
	if err := put(ctx, next); err != nil {
		t.Fatalf("the same request at the next broker: %v", err)
	}
	out, err := next.as("console-api").GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", oidcKind), MaxStaleness: durationpb.New(0)})
	if err != nil || out.GetValue() != "held" {
		t.Errorf("got %v, want the value that was put", err)
	}
}
