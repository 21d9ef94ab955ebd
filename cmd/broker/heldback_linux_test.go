package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// TestNothingUnrecordedLeavesUnderLoad: under load an answer waits for its record on its
// connection, and its call does not. The log's file is kept from growing again and again,
// from one moment to the next, until that meets answers which cannot be taken back: their
// connections end. Nobody has ever got an answer that has no record, and service is back
// each time.
func TestNothingUnrecordedLeavesUnderLoad(t *testing.T) {
	t.Parallel()
	dir, ctx := t.TempDir(), callContext(t)
	p := launch(t, dir, nil, binary, "dev", "--listen-address=127.0.0.1:0", "--metrics-address=127.0.0.1:0")
	p.listen()
	const callers = 16
	var answers [callers]int
	var all, failures, cut atomic.Int64
	var stop atomic.Bool
	var load sync.WaitGroup
	for n := range callers {
		c, secret := p.as("console-api"), ref(fmt.Sprintf("i%d", n), uriKind)
		must2(c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: secret, Value: "postgres://u:p@db/i"}))(t)
		load.Go(func() {
			for !stop.Load() {
				_, err := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: secret})
				reason, _ := told(err)
				switch {
				case err == nil:
					answers[n]++
					all.Add(1)
				case status.Code(err) != codes.Unavailable || reason != "" && reason != "AUDIT_UNAVAILABLE":
					t.Errorf("got %v, want AUDIT_UNAVAILABLE or the end of the connection", err)
					return
				case strings.Contains(err.Error(), "connection refused"):
					t.Error(err) // it is not there any more
					return
				case reason == "":
					cut.Add(1)
				}
				if err != nil {
					failures.Add(1)
				}
			}
		})
	}
	await := func(what string, of *atomic.Int64, n int64) {
		for of.Load() < n && !t.Failed() {
			if ctx.Err() != nil {
				t.Fatalf("%s: %s", what, p.err)
			}
		}
	}
	log := filepath.Join(dir, auditFile)
	limit := func(size uint64) {
		if err := unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: unix.RLIM_INFINITY}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for range 200 {
		await("service is not back", &all, all.Load()+1000)
		before := failures.Load()
		limit(uint64(must2(os.Stat(log))(t).Size()) + 1)
		await("nothing was refused", &failures, before+1)
		limit(unix.RLIM_INFINITY)
		if cut.Load() > 0 || t.Failed() {
			break
		}
	}
	await("service is not back at the end", &all, all.Load()+1000)
	stop.Store(true)
	load.Wait()
	if cut.Load() == 0 || !strings.Contains(p.err.String(), "connection closed: what was answered on it could not be recorded") {
		t.Errorf("no connection was cut, or the log does not say so: %s", p.err)
	}
	p.end(unix.SIGTERM)
	recorded := map[string]int{}
	for _, r := range auditRecords(t, log) {
		if r.Action == "get" && r.Code == "OK" {
			recorded[r.Key]++
		}
	}
	for n, got := range answers {
		if key := fmt.Sprintf("instance-i%d-dburi", n); recorded[key] < got {
			t.Errorf("%s: got %d answers, of which %d are recorded", key, got, recorded[key])
		}
	}
}
