package server_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

// Of a stream whose client does not read, so much is on its way: what the client
// takes, which in these tests does not grow, and what gRPC lets the server queue.
const (
	window = 64 << 10
	queued = 64 << 10
)

// narrow is a client of which each stream takes a window and no more.
func (s *system) narrow(path string) secretsv1.SecretsBrokerServiceClient {
	s.t.Helper()
	cfg := s.clientTLS(s.certificate("spiffe://console.exto/" + path))
	conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithInitialWindowSize(window))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	return secretsv1.NewSecretsBrokerServiceClient(conn)
}

// size is what an event takes on the wire.
func size(e *secretsv1.WatchSecretsResponse) int { return proto.Size(e) + 5 }

// stall runs a broker with a watch whose client does not read any more, after so
// many puts of filler that it has no room for them. Others are watched too, were
// told to be missing, and are as they were.
func stall(t *testing.T, others ...string) (s *system, w *watching, filler *subject, puts int) {
	t.Helper()
	s = newSystem(t)
	caller := strings.Repeat("x", 480) // it makes events large, being named in them
	s.policy += "  - identity: spiffe://console.exto/" + caller + "\n    allow: [put, watch]\n"
	s.startEmbedded()
	filler = s.in(t, strings.Repeat("i", 100), "absent")
	filler.c = s.as(caller)
	refs := []*secretsv1.SecretRef{filler.ref}
	for _, id := range others {
		refs = append(refs, ref(id, uriKind))
	}
	w = watch(t, s.narrow(operator), refs...)
	for range refs {
		w.want("MISSING")
	}
	for sent := 0; sent < (window+queued)*5/4; puts++ {
		sent += size(&secretsv1.WatchSecretsResponse{Metadata: filler.put(puts).GetMetadata()})
	}
	return s, w, filler, puts
}

// TestChangesAreJoined for who does not read: of each secret the newest state is
// told, as CURRENT if it is not one change since what was told before.
func TestChangesAreJoined(t *testing.T) {
	t.Parallel()
	want := map[string]string{"puts": "CURRENT ACTIVE/3", "put": "PUT ACTIVE/1", "deleted": "CURRENT DELETED/1", "overwritten": "CURRENT ACTIVE/2", "purged": "MISSING", "outside": "CURRENT ACTIVE/0"}
	s, w, filler, puts := stall(t, "puts", "put", "deleted", "overwritten", "purged", "outside")
	of := func(id string) *subject { return s.in(t, id, "absent") }
	purged := of("purged")
	purged.put(1)
	purged.delete()
	other := purged.watch() // by somebody who does read
	other.want("CURRENT DELETED/1")
	s.clock.advance(91 * 24 * time.Hour)
	other.want("MISSING")
	outside := of("outside")
	outside.put(1)
	outside.setOutside(uri(2))
	outside.wantValue("", uri(2))
	for n := range 3 {
		of("puts").put(n)
	}
	of("put").put(1)
	of("deleted").put(1)
	of("deleted").delete()
	of("overwritten").put(1)
	of("overwritten").delete()
	of("overwritten").put(2)

	generation, received := int64(0), 0
	for left := len(want) + 1; left > 0; received++ {
		e := w.next()
		m := e.GetMetadata()
		if m.GetKey() != filler.key.String() {
			if got, want := toldOf(e), want[m.GetRef().GetInstanceId()]; got != want {
				t.Errorf("got %s of %s, want %s", got, m.GetKey(), want)
			}
			left--
			continue
		}
		step := map[secretsv1.ChangeType]bool{secretsv1.ChangeType_CHANGE_TYPE_PUT: m.GetGeneration() == generation+1, secretsv1.ChangeType_CHANGE_TYPE_CURRENT: m.GetGeneration() > generation}
		if !step[e.GetType()] {
			t.Errorf("got %s after generation %d", toldOf(e), generation)
		}
		if generation = m.GetGeneration(); generation == int64(puts) {
			left--
		}
	}
	if received >= puts {
		t.Errorf("got %d events, want fewer than the %d changes", received, puts)
	}
}

// TestShutdownEndsWatches, those too that wait for the vault. The bound of this
// shutdown never comes.
func TestShutdownEndsWatches(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	x := s.in(t, "demo", "active")
	var all []*watching
	for range 3 {
		c := s.as(operator)
		for range 20 {
			w := watch(t, c, x.ref)
			w.want("CURRENT ACTIVE/2")
			all = append(all, w)
		}
	}
	reached := make(chan struct{})
	var once sync.Once
	s.vault.SetBefore(func(ctx context.Context, _ string, _ secret.Key) error {
		once.Do(func() { close(reached) })
		<-ctx.Done()
		return ctx.Err()
	})
	all = append(all, watch(t, s.as(operator), ref("unread", uriKind)))
	<-reached
	over := s.shutdown(context.Background())
	for _, w := range all {
		w.wantEnd(codes.Unavailable, secret.ShuttingDown)
	}
	wantClosed(t, over, "the end of the shutdown")
}

// underRace reports whether the race detector is on, with which everything takes
// about ten times as long.
func underRace() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// TestWatchLoad: 200 watches of overlapping secrets and 10,000 changes, or 500 under
// the race detector. Everybody sees the last generation of each secret, and none
// goes back. Who does not read costs no more than what is on its way and one state
// of each secret.
func TestWatchLoad(t *testing.T) {
	t.Parallel()
	const (
		secrets              = 50
		connections, streams = 10, 19 // of each, and a staller
		few                  = 3      // secrets of a stream; a staller has all
		writers              = 32
	)
	changes := 200 // of each secret
	if underRace() {
		changes = 10
	}
	s := startSystem(t)
	var refs []*secretsv1.SecretRef
	for n := range secrets {
		refs = append(refs, ref(fmt.Sprint("load-", n), uriKind))
	}
	begin := func(c secretsv1.SecretsBrokerServiceClient, refs []*secretsv1.SecretRef) grpc.ServerStreamingClient[secretsv1.WatchSecretsResponse] {
		t.Helper()
		w, err := c.WatchSecrets(callContext(t), &secretsv1.WatchSecretsRequest{Refs: refs})
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	// follow reads until all are at their last generation.
	follow := func(w grpc.ServerStreamingClient[secretsv1.WatchSecretsResponse], left int) (events, bytes int) {
		seen := map[string]int64{}
		for ; left > 0; events++ {
			e, err := w.Recv()
			if err != nil {
				t.Errorf("with %d of the last generations to come: %v", left, err)
				break
			}
			m := e.GetMetadata()
			if last, ok := seen[m.GetKey()]; ok && m.GetGeneration() <= last {
				t.Errorf("got %s of %s after generation %d", toldOf(e), m.GetKey(), last)
			}
			if seen[m.GetKey()] = m.GetGeneration(); m.GetGeneration() == int64(changes) {
				left--
			}
			bytes += size(e)
		}
		return events, bytes
	}

	var writing, reading sync.WaitGroup
	written := make(chan struct{})
	for range connections {
		c := s.narrow(operator)
		for range streams {
			first := rand.IntN(secrets)
			some := append(refs[first:min(first+few, secrets):secrets], refs[:max(0, first+few-secrets)]...)
			w := begin(c, some)
			reading.Go(func() { follow(w, few) })
		}
		staller := begin(c, refs)
		reading.Go(func() {
			<-written
			events, bytes := follow(staller, secrets)
			if most := window + queued + 2*secrets*bytes/events; bytes > most {
				t.Errorf("got %d events, %d bytes, for who did not read, want at most %d", events, bytes, most)
			}
		})
	}
	next := make(chan int)
	for range writers {
		c := s.as(consoleAPI)
		writing.Go(func() {
			for n := range next {
				if _, err := c.PutSecret(callContext(t), &secretsv1.PutSecretRequest{Ref: refs[n%secrets], Value: uri(n)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for n := range secrets * changes {
		next <- n
	}
	close(next)
	writing.Wait()
	close(written)
	reading.Wait()
}

// TestWatchesOfOneConnection: beside 1,024 of them calls go on as ever, and so do
// they. One more is refused, until one has ended; another connection is another
// matter.
func TestWatchesOfOneConnection(t *testing.T) {
	t.Parallel()
	const most = 1024
	s := startSystem(t)
	x := s.in(t, "demo", "active") // with a connection of its own, of which these are
	var all []*watching
	for range most {
		all = append(all, x.watch())
	}
	for _, w := range all {
		w.want("CURRENT ACTIVE/2")
	}
	const puts = 3
	for n := range puts {
		if _, err := x.get(""); err != nil {
			t.Fatal(err)
		}
		x.put(3 + n)
	}
	for n, w := range all {
		for last := int64(2); last < 2+puts; {
			e := w.next()
			if last = e.GetMetadata().GetGeneration(); e.GetMetadata().GetState() != active {
				t.Fatalf("watch %d: got %s", n, toldOf(e))
			}
		}
	}

	_, err := x.watch().Recv()
	f := failed(t, err)
	if f.code != codes.ResourceExhausted || f.reason != secret.CallerQuotaExceeded {
		t.Errorf("got %v, want RESOURCE_EXHAUSTED, CALLER_QUOTA_EXCEEDED", err)
	}
	if !slices.ContainsFunc(f.status.Details(), func(d any) bool { r, ok := d.(*errdetails.RetryInfo); return ok && r.GetRetryDelay().AsDuration() > 0 }) {
		t.Errorf("got details %v, want a RetryInfo", f.status.Details())
	}
	if _, err := x.get(""); err != nil {
		t.Errorf("a call after that: %v", err)
	}
	watch(t, s.as(consoleAPI), x.ref).want("CURRENT ACTIVE/5")
	all[0].end()
	for { // the server has yet to hear of that
		_, err := x.watch().Recv()
		if err == nil {
			break
		}
		if f := failed(t, err); f.reason != secret.CallerQuotaExceeded || all[1].Context().Err() != nil {
			t.Fatalf("with one of them ended: %v", err)
		}
	}
}
