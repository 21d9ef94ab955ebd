package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/exto/secrets-broker/client"
	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

func newSource(t *testing.T, ctx context.Context, from client.Getter, id string, o client.SourceOptions) *client.Source {
	t.Helper()
	s, err := client.NewSource(ctx, from, mustKey("instance-"+id), o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// await waits until the source holds what is wanted.
func await(t *testing.T, s *client.Source, what string, so func(client.Held) bool) {
	t.Helper()
	for {
		changed, held := s.Changed(), s.Value()
		if so(held) {
			return
		}
		select {
		case <-changed:
		case <-time.After(30 * time.Second):
			t.Fatalf("not within 30 s: %s; got %+v", what, s.Value())
		}
	}
}

func version(v string) func(client.Held) bool {
	return func(h client.Held) bool {
		return h.Version == v && h.Value.Reveal() == "value of "+v && h.Err == nil
	}
}

// byWatch has an interval that a test does not see the end of: what comes, comes
// by the watch.
var byWatch = client.SourceOptions{Interval: time.Hour}

func TestSourceFollowsTheWatch(t *testing.T) {
	t.Parallel()
	shelf, b := startShelf(t, "acme")
	c := b.client(t)
	s := newSource(t, t.Context(), c, "acme", byWatch)
	if !version("v1")(s.Value()) {
		t.Fatalf("got %+v, want the first value at once", s.Value())
	}
	shelf.set("acme", 2)
	await(t, s, "the second version", version("v2"))
	eventually(t, "known to be current", func() bool { return time.Since(s.Value().AsOf) < time.Second && s.Value().Err == nil })

	// It goes: the value stays, with the reason; then it comes back.
	shelf.set("acme", 0)
	await(t, s, "the deletion", func(h client.Held) bool { return errors.Is(h.Err, client.ErrNotFound) && h.Version == "v2" })
	if got := s.Value(); got.Value.Reveal() != "value of v2" {
		t.Errorf("the value of a deleted secret is gone, want the last")
	}
	shelf.set("acme", 2)
	await(t, s, "the same version again", version("v2"))

	// After an outage the watch comes back by itself.
	shelf.fail(codes.Unavailable)
	eventually(t, "no watch", func() bool { _, watches := shelf.count(); return watches == 0 })
	if got := s.Value(); got.Value.Reveal() != "value of v2" {
		t.Error("the value did not outlast the outage")
	}
	shelf.set("acme", 3)
	shelf.fail(codes.OK)
	await(t, s, "what changed in the outage", version("v3"))
}

func TestSourceReadsWithoutWatch(t *testing.T) {
	t.Parallel()
	shelf, b := startShelf(t, "acme")
	b.watch = nil
	s := newSource(t, t.Context(), b.client(t), "acme", client.SourceOptions{Interval: 20 * time.Millisecond})
	before, _ := shelf.count()
	eventually(t, "three reads", func() bool { reads, _ := shelf.count(); return reads >= before+3 })
	shelf.mu.Lock()
	for _, req := range shelf.reads[1:] {
		if req.GetKnownVersion() != "v1" || req.GetMaxStaleness() != nil {
			t.Errorf("got a read with known version %q and staleness %v, want a cheap one", req.GetKnownVersion(), req.GetMaxStaleness())
		}
	}
	shelf.mu.Unlock()
	shelf.set("acme", 2)
	await(t, s, "the second version", version("v2"))

	shelf.fail(codes.Unavailable)
	eventually(t, "the error of the reads", func() bool { return errors.Is(s.Value().Err, client.ErrUnavailable) })
	old := s.Value()
	eventually(t, "more reads in the outage", func() bool { now, _ := shelf.count(); return now > before+10 })
	if now := s.Value(); !now.AsOf.Equal(old.AsOf) || now.Version != "v2" || now.Value.IsEmpty() {
		t.Errorf("got %+v in the outage, want what was held, as old as it is", now)
	}
	shelf.fail(codes.OK)
	eventually(t, "the end of the outage", func() bool { now := s.Value(); return now.Err == nil && now.AsOf.After(old.AsOf) })
}

func TestSourceBegins(t *testing.T) {
	t.Parallel()
	shelf, b := startShelf(t, "acme")
	c := newClient(t, b.addr, b.files)
	missing := mustKey("instance-nobody")
	if _, err := client.NewSource(t.Context(), c, missing, client.SourceOptions{}); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	s := newSource(t, t.Context(), c, "nobody", client.SourceOptions{AllowMissing: true, Interval: time.Hour})
	if held := s.Value(); !held.Value.IsEmpty() || !errors.Is(held.Err, client.ErrNotFound) {
		t.Errorf("got %+v, want no value and why", held)
	}
	shelf.set("nobody", 1)
	await(t, s, "the first version", version("v1"))

	shelf.fail(codes.Unavailable)
	if _, err := client.NewSource(t.Context(), c, mustKey("instance-acme"), client.SourceOptions{MaxWait: 200 * time.Millisecond}); err == nil {
		t.Error("got no error in an outage that outlasts MaxWait")
	}
	began := make(chan error, 1)
	go func() {
		_, err := client.NewSource(t.Context(), c, mustKey("instance-acme"), client.SourceOptions{})
		began <- err
	}()
	shelf.fail(codes.OK)
	if err := <-began; err != nil {
		t.Errorf("got %v, want it to wait for the end of the outage", err)
	}
}

func TestUnauthorized(t *testing.T) {
	t.Parallel()
	shelf, b := startShelf(t, "acme")
	b.watch = nil
	s := newSource(t, t.Context(), b.client(t), "acme", byWatch)
	before, _ := shelf.count()

	shelf.set("acme", 2)
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if held, err := s.Unauthorized(t.Context(), "v1"); err != nil || held.Version != "v2" {
				t.Errorf("got %s, %v, want v2", held.Version, err)
			}
		})
	}
	all.Wait()
	reads, _ := shelf.count()
	if got := reads - before; got != 1 {
		t.Errorf("50 refusals made %d reads, want 1", got)
	}
	shelf.mu.Lock()
	if bound := shelf.reads[reads-1].GetMaxStaleness(); bound == nil || bound.AsDuration() > time.Second {
		t.Errorf("got a staleness of %v, want at most 1 s", bound)
	}
	shelf.mu.Unlock()

	// Soon after, what is held is all there is.
	if held, err := s.Unauthorized(t.Context(), "v2"); err != nil || held.Version != "v2" {
		t.Errorf("got %s, %v, want v2", held.Version, err)
	}
	if now, _ := shelf.count(); now != reads {
		t.Errorf("got %d more reads, want none so soon", now-reads)
	}
}

// gate is a Getter that a test lets answer.
type gate struct {
	reads   atomic.Int32
	answers chan client.GetResult
}

func (g *gate) Get(ctx context.Context, _ secret.Key, _ client.GetOptions) (client.GetResult, error) {
	g.reads.Add(1)
	select {
	case r := <-g.answers:
		return r, nil
	case <-ctx.Done():
		return client.GetResult{}, ctx.Err()
	}
}

func TestSourceOverAnotherGetter(t *testing.T) {
	t.Parallel()
	g := &gate{answers: make(chan client.GetResult, 1)}
	answer := func(v string) {
		g.answers <- client.GetResult{Metadata: client.Metadata{Version: v}, Value: secret.NewValue("value of " + v)}
	}
	ctx, cancel := context.WithCancel(t.Context())
	answer("v1")
	s := newSource(t, ctx, g, "acme", client.SourceOptions{Interval: time.Millisecond})
	answer("v2")
	await(t, s, "the second version", version("v2"))
	eventually(t, "a read under way", func() bool { return g.reads.Load() >= 3 })

	// A value never waits for a read, and a caller no longer than it wants.
	if !version("v2")(s.Value()) {
		t.Errorf("got %+v with a read under way", s.Value())
	}
	short, done := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer done()
	if held, err := s.Unauthorized(short, "v2"); !errors.Is(err, context.DeadlineExceeded) || held.Version != "v2" {
		t.Errorf("got %s, %v, want what is held and DeadlineExceeded", held.Version, err)
	}
	cancel() // goleak looks whether all is over
	if s.Value().Value.IsEmpty() {
		t.Error("the value went with the context")
	}
}

// asked is a read that waits for the test's answer.
type asked struct {
	forced bool
	answer chan string
}

type askedGetter chan asked

func (g askedGetter) Get(_ context.Context, _ secret.Key, o client.GetOptions) (client.GetResult, error) {
	a := asked{o.MaxStaleness != nil, make(chan string)}
	g <- a
	v := <-a.answer
	return client.GetResult{Metadata: client.Metadata{Version: v}, Value: secret.NewValue("value of " + v)}, nil
}

// The answer to an earlier question must not take the place of one to a later.
func TestLateAnswerChangesNothing(t *testing.T) {
	t.Parallel()
	g := make(askedGetter)
	go func() { (<-g).answer <- "v1" }()
	ctx, cancel := context.WithCancel(t.Context())
	s := newSource(t, ctx, g, "acme", client.SourceOptions{Interval: time.Millisecond})
	early := <-g // of the interval
	done := make(chan client.Held)
	go func() {
		held, _ := s.Unauthorized(t.Context(), "v1")
		done <- held
	}()
	late := <-g
	if early.forced || !late.forced {
		t.Fatal("got the reads in another order than wanted")
	}
	late.answer <- "v2"
	if held := <-done; held.Version != "v2" {
		t.Errorf("got %s, want v2", held.Version)
	}
	early.answer <- "v1"
	next := <-g // so the early answer was taken in
	if !version("v2")(s.Value()) {
		t.Errorf("got %+v, want v2 still", s.Value())
	}
	cancel()
	next.answer <- "v2"
}

// Where a watch is opened anew for one more secret and says nothing, the others
// are read as without a watch.
func TestSilentWatch(t *testing.T) {
	t.Parallel()
	shelf, b := startShelf(t, "acme", "beta")
	var silent atomic.Bool
	b.watch = func(req *secretsv1.WatchSecretsRequest, stream grpc.ServerStreamingServer[secretsv1.WatchSecretsResponse]) error {
		if silent.Load() {
			<-stream.Context().Done()
			return stream.Context().Err()
		}
		return shelf.watch(req, stream)
	}
	c := b.client(t)
	acme := newSource(t, t.Context(), c, "acme", client.SourceOptions{Interval: 20 * time.Millisecond})
	eventually(t, "a watch", func() bool { _, watches := shelf.count(); return watches == 1 })
	silent.Store(true)
	newSource(t, t.Context(), c, "beta", byWatch)
	eventually(t, "the watch given up", func() bool { _, watches := shelf.count(); return watches == 0 })
	shelf.set("acme", 2)
	await(t, acme, "the second version without a watch", version("v2"))
}

// A version from outside has no generation by which an older one could be told.
func TestOutsideVersionIsReadAfresh(t *testing.T) {
	t.Parallel()
	shelf, b := startShelf(t, "acme")
	s := newSource(t, t.Context(), b.client(t), "acme", byWatch)
	eventually(t, "a watch", func() bool { _, watches := shelf.count(); return watches == 1 })
	shelf.change(func() {
		m := proto.CloneOf(shelf.secrets["acme"])
		m.Version, m.Generation = "outside", 0
		shelf.secrets["acme"] = m
	})
	await(t, s, "the version from outside", version("outside"))
	shelf.mu.Lock()
	defer shelf.mu.Unlock()
	if bound := shelf.reads[len(shelf.reads)-1].GetMaxStaleness(); bound == nil || bound.AsDuration() > time.Second {
		t.Errorf("got a staleness of %v, want at most 1 s", bound)
	}
}

// One key that may not be read any more must not end the watch of the others.
func TestForbiddenKeyLeavesTheWatch(t *testing.T) {
	t.Parallel()
	shelf, b := startShelf(t, "acme", "beta")
	var forbidden atomic.Bool
	b.answer = func(ctx context.Context, m proto.Message) (proto.Message, error) {
		if forbidden.Load() && m.(*secretsv1.GetSecretRequest).GetRef().GetInstanceId() == "beta" {
			return nil, refusalOf(codes.PermissionDenied, secret.CallerNotAllowed)
		}
		return shelf.answer(ctx, m)
	}
	b.watch = func(req *secretsv1.WatchSecretsRequest, stream grpc.ServerStreamingServer[secretsv1.WatchSecretsResponse]) error {
		for _, ref := range req.GetRefs() {
			if forbidden.Load() && ref.GetInstanceId() == "beta" {
				return refusalOf(codes.PermissionDenied, secret.CallerNotAllowed)
			}
		}
		return shelf.watch(req, stream)
	}
	c := b.client(t)
	acme := newSource(t, t.Context(), c, "acme", byWatch)
	beta := newSource(t, t.Context(), c, "beta", client.SourceOptions{Interval: 20 * time.Millisecond})
	eventually(t, "a watch", func() bool { _, watches := shelf.count(); return watches == 1 })
	forbidden.Store(true)
	shelf.fail(codes.Unavailable) // the watch ends, and another is refused
	shelf.fail(codes.OK)
	eventually(t, "beta refused", func() bool { return errors.Is(beta.Value().Err, client.ErrNotAllowed) })
	shelf.set("acme", 2)
	await(t, acme, "a change by the watch", version("v2"))
}

// TestThousandSources: one connection, few streams, few goroutines, and all see a
// change and come back after an outage.
func TestThousandSources(t *testing.T) {
	t.Parallel()
	const n = 1000
	ids := make([]string, n)
	for i := range ids {
		ids[i] = fmt.Sprintf("i%d", i)
	}
	shelf, b := startShelf(t, ids...)
	var dialled atomic.Int32
	c := newClient(t, b.addr, b.files, grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		dialled.Add(1)
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	sources := make([]*client.Source, n)
	for i, id := range ids {
		sources[i] = newSource(t, ctx, c, id, client.SourceOptions{})
	}
	live := func(generation int64) func() bool {
		return func() bool {
			for _, s := range sources {
				if held := s.Value(); held.Generation != generation || held.Err != nil || time.Since(held.AsOf) > 10*time.Millisecond {
					return false
				}
			}
			return true
		}
	}
	eventually(t, "all watched", live(1))
	if _, watches := shelf.count(); watches > 8 {
		t.Errorf("got %d streams, want at most 8", watches)
	}
	if got := sourceGoroutines(); got > 100 {
		t.Errorf("got %d goroutines of the client, want at most 100", got)
	}
	shelf.change(func() {
		for _, m := range shelf.secrets {
			next := proto.CloneOf(m)
			next.Generation, next.Version = 2, "v2"
			shelf.secrets[next.GetRef().GetInstanceId()] = next
		}
	})
	eventually(t, "all changed", live(2))
	shelf.fail(codes.Unavailable)
	eventually(t, "no watch", func() bool { _, watches := shelf.count(); return watches == 0 })
	if got := sourceGoroutines(); got > 100 {
		t.Errorf("got %d goroutines of the client in the outage, want at most 100", got)
	}
	shelf.fail(codes.OK)
	eventually(t, "all watched again", live(2))
	if got := dialled.Load(); got != 1 {
		t.Errorf("got %d connections, want 1", got)
	}
	cancel()
	eventually(t, "no watch at the end", func() bool { _, watches := shelf.count(); return watches == 0 })
}

// sourceGoroutines counts those that run code of package client.
func sourceGoroutines() int {
	stacks := make([]byte, 64<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	n := 0
	for _, one := range bytes.Split(stacks, []byte("\n\n")) {
		if bytes.Contains(one, []byte("secrets-broker/client.")) {
			n++
		}
	}
	return n
}
