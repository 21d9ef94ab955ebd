package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// told is the reason and the commit state of an error.
func told(err error) (reason, commit string) {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason(), info.GetMetadata()["commit_state"]
		}
	}
	return "", ""
}

// TestKilledInTheMiddleOfWrites kills the process 20 times under concurrent
// writers, who retry with the same request id, as the contract tells them to.
func TestKilledInTheMiddleOfWrites(t *testing.T) {
	t.Parallel()
	const kills, writers = 20, 8
	dir := t.TempDir()
	type written struct{ version, value string }
	var (
		mu    sync.Mutex
		acked = map[string][]written{} // per instance, in order of generations
		open  = make([]*secretsv1.PutSecretRequest, writers)
	)
	for range kills {
		p, ctx := devIn(t, dir), callContext(t)
		c := p.as("console-api")
		enough := make(chan struct{})
		var count int
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				id := fmt.Sprintf("w%d", w%4) // two writers for each secret
				for {
					if open[w] == nil {
						open[w] = &secretsv1.PutSecretRequest{Ref: ref(id, oidcKind), Value: "value-" + uuid.NewString(), RequestId: uuid.NewString()}
					}
					out, err := c.PutSecret(ctx, open[w])
					if err != nil {
						return // killed: the next process gets the same request again
					}
					mu.Lock()
					acked[id] = append(acked[id], written{out.GetMetadata().GetVersion(), open[w].GetValue()})
					if count++; count == 40 {
						close(enough)
					}
					mu.Unlock()
					open[w] = nil
				}
			})
		}
		select {
		case <-enough:
		case <-ctx.Done():
			t.Error("fewer than 40 writes were acknowledged before their deadline")
		}
		p.kill()
		wg.Wait()
		if code, stdout, stderr := runBroker(t, dir, nil, "audit", "verify", auditFile); code != 0 {
			t.Errorf("audit verify after a kill: got %d, %s%s", code, stdout, stderr)
		}
	}
	p, ctx := devIn(t, dir), callContext(t)
	c := p.as("console-api")
	p.awaitMetric("secrets_broker_audit_open_intents 0")
	closed, applied := map[string]bool{}, map[string]bool{}
	for _, line := range auditRecords(t, filepath.Join(dir, auditFile)) {
		switch {
		case line.Type == "intent":
			closed[line.ID] = false // also when it is written again, at the beginning of a file
		case line.Type == "outcome" && (line.Commit != "UNKNOWN" || line.Settled != ""):
			closed[line.ID] = true
		}
		if line.Version != "" && line.Commit == "APPLIED" {
			applied[line.Version] = true
		}
		if line.Replayed {
			applied[line.Version] = true
		}
	}
	for id, done := range closed {
		if !done {
			t.Errorf("the intent %s has no outcome", id)
		}
	}
	for id, writes := range acked {
		for _, w := range writes {
			if !applied[w.version] {
				t.Errorf("%s: the audit log does not say that version %s was written", id, w.version)
			}
		}
	}
	for id, writes := range acked {
		described := must2(c.DescribeSecret(ctx, &secretsv1.DescribeSecretRequest{Ref: ref(id, oidcKind)}))(t)
		generations := map[int64]bool{}
		for _, v := range described.GetVersions() {
			if generations[v.GetGeneration()] || v.GetGeneration() < 1 || v.GetGeneration() > int64(len(described.GetVersions())) {
				t.Errorf("%s: generation %d is double or beyond the %d versions", id, v.GetGeneration(), len(described.GetVersions()))
			}
			generations[v.GetGeneration()] = true
			must2(c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref(id, oidcKind), Version: v.GetVersion(), MaxStaleness: durationpb.New(0)}))(t) // it opens
		}
		versions := map[string]bool{}
		for _, w := range writes {
			if versions[w.version] {
				t.Errorf("%s: version %s was acknowledged twice", id, w.version)
			}
			versions[w.version] = true
			got := must2(c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref(id, oidcKind), Version: w.version, MaxStaleness: durationpb.New(0)}))(t)
			if got.GetValue() != w.value {
				t.Errorf("%s: version %s does not hold the value that was acknowledged", id, w.version)
			}
		}
	}
}

func TestRotateAcrossAKill(t *testing.T) {
	t.Parallel()
	dir, ctx := t.TempDir(), callContext(t)
	p := devIn(t, dir)
	id, r := uuid.NewString(), ref("demo", tokenKind)
	rotate := func() (*secretsv1.RotateSecretResponse, error) {
		return p.as("console-api").RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: r, AllowMissing: true, RequestId: id})
	}
	again := func() {
		t.Helper()
		p.kill()
		p = devIn(t, dir)
	}
	first := must2(rotate())(t).GetValue()
	again()
	for n := range 9 {
		if got := must2(rotate())(t).GetValue(); got != first {
			t.Fatalf("after %d puts and a kill: got another token", n)
		}
		must2(p.as("worker").PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: r, Value: fmt.Sprint("put-", n)}))(t)
		if n == 7 {
			again()
		}
	}
	if got := must2(rotate())(t).GetValue(); got == first {
		t.Error("after nine puts: got the same token, want a new one")
	}
	must2(p.as("worker").RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: r}))(t)
	again()
	_, err := rotate()
	if reason, commit := told(err); reason != "VERSION_EXPIRED" || commit != "APPLIED" {
		t.Errorf("after a further rotate: got %v, want VERSION_EXPIRED with APPLIED", err)
	}
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	dir, ctx := t.TempDir(), callContext(t)
	devIn(t, dir).kill() // makes the folder
	// A limit on the size of files is met like the end of the disk. The store
	// begins below it.
	p := launch(t, dir, nil, "sh", "-c", fmt.Sprintf("ulimit -f %d; exec %s dev --listen-address=127.0.0.1:0 --metrics-address=127.0.0.1:0", 17<<20/512, binary))
	p.listen()
	c := p.as("console-api")
	value := strings.Repeat("0123456789", 400)
	var last *secretsv1.SecretMetadata
	var refused error
	for n := 0; refused == nil && n < 20_000; n += 64 {
		var wg sync.WaitGroup
		var mu sync.Mutex
		for range 64 {
			wg.Go(func() {
				out, err := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("i"+uuid.NewString(), oidcKind), Value: value})
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					refused = err
				} else {
					last = out.GetMetadata()
				}
			})
		}
		wg.Wait()
	}
	if reason, commit := told(refused); reason != "VAULT_UNAVAILABLE" || commit != "NOT_APPLIED" {
		t.Fatalf("got %v, want VAULT_UNAVAILABLE with NOT_APPLIED", refused)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	out, err := c.GetSecret(short, &secretsv1.GetSecretRequest{Ref: last.GetRef(), MaxStaleness: durationpb.New(0)})
	if err != nil || out.GetValue() != value {
		t.Errorf("a read after it: got %v, %v, want the value", out.GetMetadata(), err)
	}
	p.kill()
	p = devIn(t, dir) // with room again
	must2(p.as("console-api").PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: last.GetRef(), Value: "another"}))(t)
}
