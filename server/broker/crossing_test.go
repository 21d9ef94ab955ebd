package broker_test

import (
	"context"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/embedded"
	"github.com/exto/secrets-broker/server/vault/vaulttest"
)

// What comes between the requests of one look at the vault, or between a read and
// its answer.

// another is a caller beside the one of read.
var another = broker.Call{Caller: "spiffe://console.exto/console-api"}

// crossing is a broker, and the vault under it whose answers a test holds back.
type crossing struct {
	*broker.Broker
	t     *testing.T
	vault *vaulttest.Faulty
	later atomic.Int64           // how far the broker's clock went ahead; ns
	told  atomic.Pointer[func()] // unless nil, called when the time is asked
	wait  func(context.Context, time.Duration) error
	ttl   time.Duration
	stale time.Duration
}

func newCrossing(t *testing.T) *crossing {
	t.Helper()
	store, err := embedded.Open(embedded.Config{Dir: t.TempDir(), Retention: time.Hour, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	x := &crossing{t: t, vault: vaulttest.NewFaulty(store)}
	x.restart()
	return x
}

// restart is a new broker, which remembers nothing.
func (x *crossing) restart() {
	b := broker.New(broker.Config{Vault: x.vault, Logger: slog.New(slog.DiscardHandler), Now: x.now, Wait: x.wait, CacheTTL: x.ttl, StaleOnError: x.stale})
	x.Broker = b
	x.t.Cleanup(func() { b.Close(context.Background()) })
}

func (x *crossing) now() time.Time {
	if told := x.told.Load(); told != nil {
		(*told)()
	}
	return time.Now().Add(time.Duration(x.later.Load()))
}

func (x *crossing) advance(d time.Duration) { x.later.Add(int64(d)) }

// put writes a value and gives its version.
func (x *crossing) put(key secret.Key, value string) string {
	x.t.Helper()
	r, err := x.Put(x.t.Context(), another, broker.PutRequest{Key: key, Value: secret.NewValue(value)})
	if err != nil {
		x.t.Fatal(err)
	}
	return r.Version
}

// rotate replaces the value, with an hour of grace.
func (x *crossing) rotate(key secret.Key, value secret.Value) {
	x.t.Helper()
	if _, err := x.Rotate(x.t.Context(), another, broker.RotateRequest{Key: key, NewValue: value, Grace: time.Hour}); err != nil {
		x.t.Fatal(err)
	}
}

// person puts a value in the vault.
func (x *crossing) person(key secret.Key, value string) {
	x.t.Helper()
	if _, err := x.vault.Vault.Set(context.Background(), key, vault.NewVersion{Value: secret.NewValue(value)}); err != nil {
		x.t.Error(err)
	}
}

// wantInOutage checks what is remembered of a secret while the vault is away; empty:
// nothing.
func (x *crossing) wantInOutage(key secret.Key, value string) {
	x.t.Helper()
	x.advance(5 * time.Minute)
	x.vault.SetBefore(func(context.Context, string, secret.Key) error { return vault.ErrUnavailable })
	r, err := x.Get(x.t.Context(), another, broker.GetRequest{Key: key})
	if (err == nil) != (value != "") || r.Value.Reveal() != value {
		x.t.Errorf("in an outage: got %q, %v, want %q", r.Value.Reveal(), err, value)
	}
}

// TestVersionAmongReadsOfTheCurrentOne: what others learn of the current version does
// not make the read of another one begin again.
func TestVersionAmongReadsOfTheCurrentOne(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	first := x.put(key, "one")
	x.put(key, "two")
	x.restart()
	var asked atomic.Int64
	x.vault.SetBefore(func(ctx context.Context, _ string, _ secret.Key) error {
		if vault.OriginOf(ctx).Caller == another.Caller || asked.Add(1) > 20 {
			return nil
		}
		if _, err := x.Get(t.Context(), another, broker.GetRequest{Key: key, MaxStaleness: within(0)}); err != nil {
			t.Error(err)
		}
		select { // the answer is on its way
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
		return ctx.Err()
	})
	r := <-read(t, x.Broker, broker.GetRequest{Key: key, Version: first, MaxStaleness: within(0)})
	if r.err != nil || r.Value.Reveal() != "one" || r.Source != broker.Live {
		t.Errorf("got %q, %v, %v", r.Value.Reveal(), r.Source, r.err)
	}
	if got := asked.Load(); got != 3 { // the current one, the list, the version
		t.Errorf("the vault was asked %d times for it, want 3", got)
	}
}

// TestFreshReadJoinsNoSecondHalf: with max_staleness 0 a read does not wait for a look
// of which a request is still to be sent, but not the first one.
func TestFreshReadJoinsNoSecondHalf(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	first := x.put(key, "one")
	x.rotate(key, secret.NewValue("two"))
	x.advance(time.Minute)
	queued, turn := make(chan struct{}), make(chan struct{})
	var gets atomic.Int64
	x.vault.SetBefore(func(ctx context.Context, op string, _ secret.Key) error {
		if op != "Get" || gets.Add(1) != 2 {
			return nil
		}
		origin := vault.OriginOf(ctx)
		if origin.Waits != nil {
			origin.Waits()
		}
		close(queued)
		<-turn
		if origin.Sends != nil {
			origin.Sends()
		}
		return nil
	})
	before := read(t, x.Broker, broker.GetRequest{Key: key, Version: first})
	<-queued
	x.person(key, "three") // ends the grace
	fresh := read(t, x.Broker, broker.GetRequest{Key: key, Version: first, MaxStaleness: within(0)})
	close(turn)
	<-before
	r := <-fresh
	wantError(t, r.err, secret.VersionExpired, "")
}

// TestHurriedCallers: those who cannot wait for the vault leave its answer to be
// remembered for the others.
func TestHurriedCallers(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	x.put(key, "one")
	x.person(key, "two")
	x.advance(time.Minute)
	answer := make(chan struct{})
	var asked atomic.Int64
	x.vault.SetBefore(func(ctx context.Context, _ string, _ secret.Key) error {
		asked.Add(1)
		select {
		case <-answer:
		case <-ctx.Done():
		}
		return ctx.Err()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if r, err := x.Get(ctx, another, broker.GetRequest{Key: key}); err != nil || r.Value.Reveal() != "one" || r.Source != broker.StaleOnError {
		t.Errorf("in a hurry: got %q, %v, %v", r.Value.Reveal(), r.Source, err)
	}
	<-ctx.Done() // which it did not wait for
	close(answer)
	if r, err := x.Get(t.Context(), another, broker.GetRequest{Key: key}); err != nil || r.Value.Reveal() != "two" {
		t.Errorf("got %q, %v, %v", r.Value.Reveal(), r.Source, err)
	}
	if got := asked.Load(); got != 1 {
		t.Errorf("the vault was asked %d times, want once for both", got)
	}
}

// TestWriterTakesMemoryFromAReader: who could have been answered from memory, and
// cannot any more, waits for the vault as one who never could.
func TestWriterTakesMemoryFromAReader(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	x.put(key, "one")
	x.advance(time.Minute)
	asked, taken, open := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var gets atomic.Int64
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		switch {
		case op == "Get" && gets.Add(1) == 1:
			close(asked)
			<-open
		case op == "Set":
			close(taken)
			<-open
		}
		return nil
	})
	req := broker.GetRequest{Key: key}
	first := read(t, x.Broker, req)
	<-asked
	x.advance(1700 * time.Millisecond) // of the 2 s that memory gives the vault
	next := read(t, x.Broker, req)
	wrote := make(chan error, 1)
	go func() {
		_, err := x.Put(t.Context(), another, broker.PutRequest{Key: key, Value: secret.NewValue("two")})
		wrote <- err
	}()
	<-taken
	told := sync.OnceFunc(func() { close(open) }) // its time is over
	x.told.Store(&told)
	for _, result := range []chan got{first, next} {
		if r := <-result; r.err != nil || r.Source != broker.Live {
			t.Errorf("got %v, %v", r.Source, r.err)
		}
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
}

// TestMemoryIsNotLive: a value from before the read began is from memory, also when it
// came there while the read waited.
func TestMemoryIsNotLive(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	x.put(key, "one")
	x.advance(20 * time.Second)
	sent, open := make(chan struct{}), make(chan struct{})
	x.vault.SetBefore(func(ctx context.Context, op string, _ secret.Key) error {
		switch {
		case op == "Set":
			close(sent)
			<-open
			return vault.ErrRefused
		case vault.OriginOf(ctx).Caller != another.Caller:
			<-ctx.Done()
		}
		return ctx.Err()
	})
	wrote := make(chan error, 1)
	go func() {
		_, err := x.Put(t.Context(), another, broker.PutRequest{Key: key, Value: secret.NewValue("two")})
		wrote <- err
	}()
	<-sent
	x.advance(time.Second)
	result := read(t, x.Broker, broker.GetRequest{Key: key})
	close(open)
	wantError(t, <-wrote, secret.VaultRefused, secret.NotApplied)
	if r := <-result; r.err != nil || r.Value.Reveal() != "one" || r.Source != broker.Cached {
		t.Errorf("got %q, %v, %v", r.Value.Reveal(), r.Source, r.err)
	}
}

// TestWhoHangsUpOnALook, which is the only one for a while, does not keep the next
// caller from its answer.
func TestWhoHangsUpOnALook(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change func(*crossing, secret.Key)
		age    time.Duration
		token  string
		want   broker.VerifyResult
	}{
		"at the token in grace": {func(*crossing, secret.Key) {}, 0, "token-one", broker.MatchPrevious},
		"at a changed token":    {func(x *crossing, key secret.Key) { x.person(key, "token-two") }, 3 * time.Second, "token-two", broker.MatchCurrent},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, key := newCrossing(t), keyOf(t, secret.RegistrationToken, "demo")
			x.put(key, "token-one")
			if test.age == 0 {
				x.rotate(key, secret.Value{})
			}
			x.restart()
			if _, err := x.Get(t.Context(), another, broker.GetRequest{Key: key}); err != nil {
				t.Fatal(err)
			}
			test.change(x, key)
			x.advance(test.age)
			ctx, hangUp := context.WithCancel(t.Context())
			gone := make(chan struct{})
			x.vault.SetBefore(func(ctx context.Context, _ string, _ secret.Key) error {
				hangUp()
				<-gone
				return ctx.Err()
			})
			_, err := x.Verify(ctx, another, key, secret.NewValue("token-of-nobody"))
			close(gone)
			wantError(t, err, secret.Cancelled, "")
			if v, err := x.Verify(t.Context(), another, key, secret.NewValue(test.token)); err != nil || v.Result != test.want {
				t.Errorf("got %+v, %v, want %v", v, err, test.want)
			}
		})
	}
}

// TestLookThatEverybodyLeft is not kept over a write that came after they did, however
// late its answer arrives.
func TestLookThatEverybodyLeft(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	x.put(key, "one")
	x.restart()
	ctx, hangUp := context.WithCancel(t.Context())
	open, first := make(chan struct{}), atomic.Bool{}
	x.vault.SetAfter(func(_ context.Context, _ string, _ secret.Key, err error) error {
		if first.CompareAndSwap(false, true) {
			hangUp()
			<-open
		}
		return err
	})
	_, err := x.Get(ctx, another, broker.GetRequest{Key: key})
	wantError(t, err, secret.Cancelled, "")
	// A write that leaves nothing in memory: the vault does not take its second step.
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		if op == "Delete" {
			return vault.ErrUnavailable
		}
		return nil
	})
	_, err = x.Delete(t.Context(), another, broker.DeleteRequest{Key: key})
	wantError(t, err, secret.VaultUnavailable, secret.Applied)
	close(open)
	for range 1000 {
		_, err := x.Get(t.Context(), another, broker.GetRequest{Key: key})
		wantError(t, err, secret.SecretNotFound, "")
		runtime.Gosched() // the answer that nobody waits for may arrive now
	}
}

// TestVersionThatReplacedItself: tags by which the previous version is the current one
// do not keep the broker busy.
func TestVersionThatReplacedItself(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.RegistrationToken, "demo")
	version := x.put(key, "token-one")
	props, _, err := x.vault.Get(t.Context(), key, "")
	if err != nil {
		t.Fatal(err)
	}
	tags := props.Tags.Clone()
	tags["exto-previous"] = version + " 2099-01-01T00:00:00.000Z"
	if _, err := x.vault.Update(t.Context(), key, version, vault.Patch{Enabled: true, Tags: tags}); err != nil {
		t.Fatal(err)
	}
	x.advance(time.Minute)
	var asked atomic.Int64
	busy := func() {
		if asked.Add(1) > 10_000 {
			runtime.Goexit()
		}
	}
	x.told.Store(&busy)
	ended, returned := make(chan struct{}), false
	go func() {
		defer close(ended)
		v, err := x.Verify(t.Context(), another, key, secret.NewValue("token-of-nobody"))
		if returned = true; err != nil || v.Result != broker.NoMatch {
			t.Errorf("got %+v, %v, want no match", v, err)
		}
	}()
	<-ended
	if !returned {
		t.Error("the call does not come to its end")
	}
}

func within(d time.Duration) *time.Duration { return &d }
