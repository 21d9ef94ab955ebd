package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// TestNothingUnrecordedLeavesUnderLoad: under load an answer waits for its record on its
// connection, and its call does not. The log's file is kept from growing again and again,
// from one moment to the next, until that meets answers which cannot be taken back: their
// connections end. Where there is little room to begin with, calls wait for their records,
// and all are told. Nobody ever gets an answer that has no record, and service is back
// each time.
func TestNothingUnrecordedLeavesUnderLoad(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		room   uint64 // that the file has in between
		rounds int
		cut    bool // connections end
	}{{"with ample room", unix.RLIM_INFINITY, 200, true}, {"with little room", 32 << 20, 5, false}} {
		t.Run(test.name, func(t *testing.T) {
			p := launch(t, t.TempDir(), nil, binary, "dev", "--listen-address=127.0.0.1:0", "--metrics-address=127.0.0.1:0")
			p.listen()
			l := loadOn(t, p)
			for n := 0; n < test.rounds && l.cut.Load() == 0 && !t.Failed(); n++ {
				l.mayGrow(test.room)
				l.await("service", &l.all, 1000)
				l.mayGrow(1)
				l.await("a refusal", &l.failures, 1)
			}
			l.mayGrow(unix.RLIM_INFINITY)
			l.await("service at the end", &l.all, 1000)
			l.end()
			const line = "connection closed: what was answered on it is not known to be recorded"
			if cut, said := l.cut.Load(), strings.Contains(p.err.String(), line); said != test.cut || cut > 0 != test.cut {
				t.Errorf("%d calls met the end of their connection, in the log: %v, want %v", cut, said, test.cut)
			}
			p.end(unix.SIGTERM)
			l.wantRecorded()
		})
	}
}

// readLoad is callers that read one secret each, one read after the other.
type readLoad struct {
	t                  *testing.T
	p                  *process
	answers            [16]int // of each
	all, failures, cut atomic.Int64
	stop               atomic.Bool
	callers            sync.WaitGroup
}

func loadOn(t *testing.T, p *process) *readLoad {
	l, ctx := &readLoad{t: t, p: p}, callContext(t)
	for n := range l.answers {
		c, secret := p.as("console-api"), ref(fmt.Sprintf("i%d", n), uriKind)
		must2(c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: secret, Value: "postgres://u:p@db/i"}))(t)
		l.callers.Go(func() {
			for !l.stop.Load() {
				_, err := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: secret})
				if err == nil {
					l.answers[n]++
					l.all.Add(1)
					continue
				}
				reason, _ := told(err)
				if status.Code(err) != codes.Unavailable || reason != "" && reason != "AUDIT_UNAVAILABLE" || strings.Contains(err.Error(), "refused") {
					t.Errorf("got %v, want AUDIT_UNAVAILABLE or the end of the connection", err)
					return
				}
				if reason == "" {
					l.cut.Add(1)
				}
				l.failures.Add(1)
			}
		})
	}
	return l
}

// await waits for so many more.
func (l *readLoad) await(what string, of *atomic.Int64, more int64) {
	l.t.Helper()
	ctx := callContext(l.t)
	for again, n := time.Tick(betweenReads), of.Load()+more; of.Load() < n && !l.t.Failed(); <-again {
		if ctx.Err() != nil {
			l.t.Fatalf("%s: not in time: %s", what, l.p.err)
		}
	}
}

// mayGrow limits how much larger than now the file of the log may become.
func (l *readLoad) mayGrow(room uint64) {
	if room != unix.RLIM_INFINITY {
		room += uint64(must2(os.Stat(filepath.Join(l.p.dir, auditFile)))(l.t).Size())
	}
	if err := unix.Prlimit(l.p.cmd.Process.Pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: room, Max: unix.RLIM_INFINITY}, nil); err != nil {
		l.t.Fatal(err)
	}
}

func (l *readLoad) end() {
	l.stop.Store(true)
	l.callers.Wait()
}

// wantRecorded finds a record of each answer.
func (l *readLoad) wantRecorded() {
	recorded := map[string]int{}
	for _, r := range auditRecords(l.t, filepath.Join(l.p.dir, auditFile)) {
		if r.Action == "get" && r.Code == "OK" {
			recorded[r.Key]++
		}
	}
	for n, got := range l.answers {
		if key := fmt.Sprintf("instance-i%d-dburi", n); recorded[key] < got {
			l.t.Errorf("%s: got %d answers, of which %d are recorded", key, got, recorded[key])
		}
	}
}
