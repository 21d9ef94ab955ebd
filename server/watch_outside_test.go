package server_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
)

// bound is how old the broker's knowledge of a secret may be, in these tests the
// default. After noticed of it the broker has looked again.
const (
	bound   = broker.DefaultCacheTTL
	noticed = bound * 9 / 10
)

// ok fails the test on an error of a person's.
func (x *subject) ok(err error) {
	x.t.Helper()
	if err != nil {
		x.t.Fatal(err)
	}
}

// turn enables or disables the newest version as a person would.
func (x *subject) turn(enabled bool) {
	x.t.Helper()
	all, err := x.store.Versions(x.ctx, x.key)
	x.ok(err)
	newest := all[0]
	for _, v := range all {
		if v.Created.After(newest.Created) {
			newest = v
		}
	}
	_, err = x.store.Update(x.ctx, x.key, newest.Version, vault.Patch{Enabled: enabled, Tags: newest.Tags})
	x.ok(err)
}

// TestWatchTellsOfWhatAPersonDoes within the bound.
func TestWatchTellsOfWhatAPersonDoes(t *testing.T) {
	t.Parallel()
	onEachVault(t, testWatchTellsOfWhatAPersonDoes)
}

func testWatchTellsOfWhatAPersonDoes(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	w := x.watch()
	w.want("CURRENT ACTIVE/2")
	for _, step := range []struct {
		do   func()
		want string
	}{
		{func() { x.current = x.setOutside(uri(3)) }, "CHANGED_OUTSIDE ACTIVE/0"},
		{func() { x.current = x.setOutside(uri(4)) }, "CHANGED_OUTSIDE ACTIVE/0"},
		{func() { x.current = x.put(5).GetMetadata().GetVersion() }, "PUT ACTIVE/3"},
		{func() { x.turn(false) }, "CHANGED_OUTSIDE DISABLED/3"},
		{func() { x.delete() }, "DELETED DELETED/3"},
		{func() { x.ok(operations["recover"](x).err) }, "RECOVERED DISABLED/3"},
		{func() { x.turn(true) }, "CHANGED_OUTSIDE ACTIVE/3"},
		{func() { x.patch(func(p *vault.Patch) { p.Tags = vault.Tags{"owner": "me"} }) }, "CHANGED_OUTSIDE ACTIVE/0"},
		{func() {
			_, err := x.store.Delete(x.ctx, x.key)
			x.ok(err)
			x.settle()
		}, "CHANGED_OUTSIDE DELETED/0"},
		{func() { x.ok(x.store.Recover(x.ctx, x.key)) }, "CHANGED_OUTSIDE ACTIVE/0"},
		{func() { x.delete() }, "DELETED DELETED/0"},
		{func() { x.clock.advance(91 * 24 * time.Hour) }, "MISSING"}, // purged
		{func() { x.current = x.put(6).GetMetadata().GetVersion() }, "PUT ACTIVE/1"},
	} {
		step.do()
		x.clock.advance(noticed)
		m := w.want(step.want)
		if step.want != "MISSING" && m.GetVersion() != x.current {
			t.Errorf("%s: got version %q, want %q", step.want, m.GetVersion(), x.current)
		}
	}
}

// TestWatchOfADeleteThatAPersonUndoes: recovered by hand it is still deleted, until
// somebody enables it, and again when that is undone.
func TestWatchOfADeleteThatAPersonUndoes(t *testing.T) {
	t.Parallel()
	x := startSystem(t).in(t, "demo", "marked")
	w := x.watch()
	w.want("CURRENT DELETED/2")
	for _, enabled := range []bool{true, false, true} {
		x.clock.advance(noticed) // it is looked at, and nothing is said
		if enabled {
			x.turn(true)
			x.clock.advance(noticed)
			w.want("CHANGED_OUTSIDE ACTIVE/2")
			continue
		}
		x.turn(false)
		x.clock.advance(noticed)
		w.want("CHANGED_OUTSIDE DELETED/2")
	}
}

// TestWatchOfTagsThatAPersonPutsBack: with them the broker's last operation is named
// again, which is not done again.
func TestWatchOfTagsThatAPersonPutsBack(t *testing.T) {
	t.Parallel()
	x := startSystem(t).in(t, "demo", "active")
	w := x.watch()
	w.want("CURRENT ACTIVE/2")
	var tags vault.Tags
	x.patch(func(p *vault.Patch) { tags, p.Tags = p.Tags, nil })
	x.clock.advance(noticed)
	w.want("CHANGED_OUTSIDE ACTIVE/0")
	x.patch(func(p *vault.Patch) { p.Tags = tags })
	x.clock.advance(noticed)
	w.want("CHANGED_OUTSIDE ACTIVE/2")
}

// until skips what is told of a name in a state between, in which it is neither live
// nor deleted, and may pass for MISSING.
func (w *watching) until(state secretsv1.SecretState) string {
	w.t.Helper()
	for {
		e := w.next()
		if e.GetMetadata().GetState() == state {
			return toldOf(e)
		}
		if got := toldOf(e); got != "MISSING" {
			w.t.Errorf("got %s before %v", got, state)
		}
	}
}

// TestWatchDuringATransition: what a person did is not the broker's doing, whatever
// the broker saw of it while it was under way.
func TestWatchDuringATransition(t *testing.T) {
	t.Parallel()
	s := startKeyVault(t)
	s.stop()
	s.heart = func(c *broker.Config) { c.CacheTTL = 3 * time.Second }
	s.restart()
	x := s.in(t, "demo", "active")
	w := x.watch()
	w.want("CURRENT ACTIVE/2")
	for _, step := range []struct {
		do    func(name string)
		state secretsv1.SecretState
		want  string
	}{
		{s.fake.PersonDelete, deleted, "CHANGED_OUTSIDE DELETED/2"},
		{s.fake.PersonRecover, active, "CHANGED_OUTSIDE ACTIVE/2"},
	} {
		looked := make(chan struct{})
		var once sync.Once
		step.do(x.key.String())
		x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
			if op == "GetDeleted" {
				once.Do(func() { close(looked) })
			}
			return err
		})
		x.clock.advance(3 * time.Second)
		wantClosed(t, looked, "a look at the name in its state between")
		x.clock.advance(20 * time.Second)
		if got := w.until(step.state); got != step.want {
			t.Errorf("got %s, want %s", got, step.want)
		}
	}
}

// TestWatchThatBeginsDuringAWrite sees the end of it, though the vault gave the old
// state after the write was sent.
func TestWatchThatBeginsDuringAWrite(t *testing.T) {
	t.Parallel()
	x := startKeyVault(t).in(t, "demo", "active")
	reached, release := make(chan struct{}), make(chan struct{})
	x.fake.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op != keyvaultfake.OpSet || r.Challenge {
			return keyvaultfake.Fault{}
		}
		close(reached)
		return keyvaultfake.Fault{Hold: release}
	})
	ended := make(chan error, 1)
	go func() { ended <- writeCalls["put"](x, x.ctx, "") }()
	<-reached
	x.clock.advance(time.Second)
	w := x.watch()
	w.want("CURRENT ACTIVE/2")
	close(release)
	x.ok(<-ended)
	w.want("PUT ACTIVE/3")
}

// TestWatchOfWhatIsCommittedLate: it is the broker's own, however late, and what
// counts does not go back for it.
func TestWatchOfWhatIsCommittedLate(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		do          func(x *subject)
		first, late string
	}{
		"told to be of unknown outcome": {func(x *subject) { x.unknownPut(uuid.NewString(), time.Minute) }, "", "PUT ACTIVE/3"},
		"over a later one, so that it is put down": {func(x *subject) {
			x.unknownPut(uuid.NewString(), time.Minute)
			x.put(4)
		}, "CURRENT ACTIVE/4", "PUT ACTIVE/5"},
		"over its own repetition": {func(x *subject) {
			x.fault(keyvaultfake.OpSet, 1, keyvaultfake.Fault{LateCommit: time.Minute})
			x.ok(writeCalls["put"](x, x.ctx, uuid.NewString()))
		}, "PUT ACTIVE/3", "PUT ACTIVE/3"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := startKeyVault(t).in(t, "demo", "active")
			w := x.watch()
			w.want("CURRENT ACTIVE/2")
			test.do(x)
			if test.first != "" {
				w.want(test.first)
			}
			before := len(x.versions())
			x.land()
			if len(x.versions()) == before {
				t.Fatal("nothing was committed late")
			}
			w.want(test.late)
		})
	}
}

// TestOldAnswerAfterANewerEvent: a look at the vault that takes long does not bring
// back what was before.
func TestOldAnswerAfterANewerEvent(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		do         func(x *subject)
		want, then string
	}{
		"put":     {func(x *subject) { x.put(3) }, "PUT ACTIVE/3", "PUT ACTIVE/4"},
		"deleted": {func(x *subject) { x.delete() }, "DELETED DELETED/2", "PUT ACTIVE/3"},
		"set by a person": {func(x *subject) {
			x.setOutside(uri(3))
			x.wantValue("", uri(3))
		}, "CHANGED_OUTSIDE ACTIVE/0", "PUT ACTIVE/3"},
		"set by a person, and forgotten": {func(x *subject) {
			x.setOutside(uri(3))
			x.wantValue("", uri(3))
			x.vault.SetBefore(func(context.Context, string, secret.Key) error { return vault.ErrRefused })
			x.wantGet("", secret.VaultRefused)
			x.vault.SetBefore(nil)
		}, "CHANGED_OUTSIDE ACTIVE/0", "PUT ACTIVE/3"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := startSystem(t).in(t, "demo", "active")
			w := x.watch()
			w.want("CURRENT ACTIVE/2")
			reached, release := make(chan struct{}), make(chan struct{})
			var first atomic.Bool
			x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
				if op == "Get" && first.CompareAndSwap(false, true) {
					close(reached)
					<-release
				}
				return err
			})
			slow := make(chan error, 1)
			go func() {
				_, err := x.get("")
				slow <- err
			}()
			<-reached
			x.clock.advance(time.Second)
			test.do(x)
			w.want(test.want)
			close(release)
			<-slow
			x.put(4) // whose event would come after what the slow one brought
			w.want(test.then)
		})
	}
}

// TestWatchInAnOutage: without the vault a watch begins only where memory knows the
// secret; one that is open stays open, and goes on afterwards.
func TestWatchInAnOutage(t *testing.T) {
	t.Parallel()
	onEachVault(t, testWatchInAnOutage)
}

func testWatchInAnOutage(t *testing.T, start func(*testing.T) *system) {
	s := start(t)
	x, unknown := s.in(t, "demo", "active"), ref("unknown", uriKind)
	open := x.watch()
	open.want("CURRENT ACTIVE/2")
	asked := make(chan struct{}, 100)
	s.vault.SetBefore(func(context.Context, string, secret.Key) error {
		asked <- struct{}{}
		return vault.ErrUnavailable
	})
	watch(t, x.c, x.ref, unknown).wantEnd(codes.Unavailable, secret.VaultUnavailable)
	for len(asked) > 0 {
		<-asked
	}
	s.clock.advance(10 * time.Minute)
	for range 3 { // it keeps looking
		<-asked
		s.clock.advance(bound / 5)
	}
	remembers := x.watch()
	remembers.want("CURRENT ACTIVE/2")
	x.setOutside(uri(3))
	s.vault.SetBefore(nil)
	s.clock.advance(bound / 5)
	open.want("CHANGED_OUTSIDE ACTIVE/0")
	remembers.want("CHANGED_OUTSIDE ACTIVE/0")

	s.vault.SetBefore(func(context.Context, string, secret.Key) error { return vault.ErrUnavailable })
	s.clock.advance(broker.DefaultStaleOnError + time.Minute)
	x.watch().wantEnd(codes.Unavailable, secret.VaultUnavailable)
	s.vault.SetBefore(nil)
	x.put(4)
	open.want("PUT ACTIVE/3")
}

// counting counts how often the vault is asked for the value of each secret.
func (s *system) counting() (count func(secret.Key) int) {
	var mu sync.Mutex
	counts := map[secret.Key]int{}
	s.vault.SetAfter(func(_ context.Context, op string, key secret.Key, err error) error {
		if op == "Get" {
			mu.Lock()
			defer mu.Unlock()
			counts[key]++
		}
		return err
	})
	return func(key secret.Key) int {
		mu.Lock()
		defer mu.Unlock()
		return counts[key]
	}
}

// TestPollingIsShared: the vault is asked once in a period for a secret, however
// many watch it.
func TestPollingIsShared(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	x, other := s.in(t, "demo", "active"), s.in(t, "other", "active")
	s.restart() // which remembers nothing
	count := s.counting()
	var all []*watching
	for range 4 {
		c := s.as(operator)
		for range 20 {
			all = append(all, watch(t, c, x.ref))
		}
	}
	all = append(all, watch(t, s.as(operator), x.ref, other.ref))
	for _, w := range all {
		w.want("CURRENT ACTIVE/2")
	}
	all[len(all)-1].want("CURRENT ACTIVE/2")
	for period := range 3 {
		if got := count(x.key); got != period+1 {
			t.Fatalf("after %d periods: got %d requests, want one at the start and one in each period", period, got)
		}
		x.setOutside(uri(10 + period))
		s.clock.advance(noticed)
		for _, w := range all {
			w.want("CHANGED_OUTSIDE ACTIVE/0")
		}
	}
}

// TestWhatIsReadAnywayIsNotPolled: the answers that callers get are for those who
// watch, too.
func TestWhatIsReadAnywayIsNotPolled(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.heart = func(c *broker.Config) { c.CacheTTL = 3 * time.Second }
	s.startEmbedded()
	x, polled := s.in(t, "demo", "active"), s.in(t, "polled", "active")
	w := watch(t, x.c, x.ref, polled.ref)
	w.want("CURRENT ACTIVE/2")
	w.want("CURRENT ACTIVE/2")
	x.wantValue("", uri(2))
	count := s.counting()
	const rounds = 5
	for n := range rounds {
		polled.setOutside(uri(10 + n))
		for range 3 {
			x.wantValue("", uri(2))
			s.clock.advance(time.Second)
		}
		x.wantValue("", uri(2))
		// When the other one was polled, this one could have been.
		if m := w.want("CHANGED_OUTSIDE ACTIVE/0"); m.GetKey() != polled.key.String() {
			t.Fatalf("got an event of %s", m.GetKey())
		}
	}
	if got := count(x.key); got != rounds*4 {
		t.Errorf("got %d requests, want the %d reads alone", got, rounds*4)
	}
	// And what they brought is told.
	x.setOutside(uri(3))
	x.wantValue("", uri(3))
	w.want("CHANGED_OUTSIDE ACTIVE/0")
}
