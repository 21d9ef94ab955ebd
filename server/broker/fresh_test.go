package broker_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
)

// cellar is a vault of values that a test changes behind the broker. It counts how
// often it is asked.
type cellar struct {
	vault.Vault
	asked atomic.Int64
	// hold, unless nil, is where an answer waits: after the value was read. Its error
	// takes the place of the answer.
	hold func(asked int64) error
	told atomic.Pointer[func()] // unless nil, called when the time is asked

	mu     sync.Mutex
	values map[secret.Key]vault.Properties
	now    time.Time
}

func newCellar() *cellar {
	return &cellar{values: map[secret.Key]vault.Properties{}, now: time.Now().UTC().Truncate(time.Second)}
}

func (c *cellar) Info() vault.Info { return vault.Info{Name: "cellar"} }

// Now is the time of the cellar and of its brokers.
func (c *cellar) Now() time.Time {
	if told := c.told.Load(); told != nil {
		(*told)()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *cellar) advance(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	c.mu.Unlock()
}

// put makes a value the current one, as another broker would; of generation 0 as a
// person would.
func (c *cellar) put(key secret.Key, generation int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := vault.Properties{Key: key, Version: c.version(generation), Enabled: true, Created: c.now}
	if generation > 0 {
		id := uuid.NewString()
		p.Tags = vault.Tags{"exto-format": "1", "exto-key": key.String(), "exto-generation": fmt.Sprint(generation), "exto-epoch": "1700000000000 " + id, "exto-operation": "p:" + id}
	}
	c.values[key] = p
}

func (c *cellar) version(generation int64) string {
	if generation == 0 {
		generation = c.now.UnixNano()
	}
	return fmt.Sprintf("%032d", generation)
}

func (c *cellar) Get(_ context.Context, key secret.Key, version string) (vault.Properties, secret.Value, error) {
	c.mu.Lock()
	p, ok := c.values[key]
	c.mu.Unlock()
	if n := c.asked.Add(1); c.hold != nil {
		if err := c.hold(n); err != nil {
			return vault.Properties{}, secret.Value{}, err
		}
	}
	if !ok || version != "" && version != p.Version {
		return p, secret.Value{}, vault.ErrNotFound
	}
	return p, secret.NewValue(p.Created.String()), nil // the value is when it was put
}

func (c *cellar) Versions(_ context.Context, key secret.Key) ([]vault.Properties, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return []vault.Properties{c.values[key]}, nil // the current one
}

// holdFirst makes the first answer wait until open, and those after it be what
// err gives, unless that is nil.
func (c *cellar) holdFirst(err func(asked int64) error) (sent chan struct{}, open func()) {
	sent, opened := make(chan struct{}), make(chan struct{})
	c.hold = func(asked int64) error {
		switch {
		case asked == 1:
			close(sent)
			<-opened
		case err != nil:
			return err(asked)
		}
		return nil
	}
	return sent, sync.OnceFunc(func() { close(opened) })
}

// heart is a broker on the cellar.
func (c *cellar) heart(t *testing.T) *broker.Broker {
	t.Helper()
	b := broker.New(broker.Config{Vault: c, Logger: slog.New(slog.DiscardHandler), Now: c.Now})
	t.Cleanup(func() { b.Close(context.Background()) })
	return b
}

func keyOf(t *testing.T, kind secret.Kind, format string, args ...any) secret.Key {
	t.Helper()
	id, err := secret.ParseInstanceID(fmt.Sprintf(format, args...))
	if err != nil {
		t.Fatal(err)
	}
	key, err := secret.NewKey(id, kind)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// patient is a context that tells when somebody waits for its end, too.
type patient struct {
	context.Context
	waits func()
}

func (p patient) Done() <-chan struct{} {
	p.waits()
	return p.Context.Done()
}

type got struct {
	broker.GetResult
	err error
}

// read begins a Get and returns when that waits for the vault.
func read(t *testing.T, b *broker.Broker, req broker.GetRequest) chan got {
	t.Helper()
	result, waits := make(chan got, 1), make(chan struct{})
	ctx := patient{t.Context(), sync.OnceFunc(func() { close(waits) })}
	go func() {
		r, err := b.Get(ctx, broker.Call{Caller: "spiffe://console.exto/worker"}, req)
		result <- got{r, err}
	}()
	select {
	case <-waits:
	case r := <-result:
		t.Fatalf("got %v, %v without waiting for the vault", r.Source, r.err)
	}
	return result
}

// TestWhoMayJoin: a read waits for a request that is under way when that was sent
// within its bound, and with none when it was sent after the read began.
func TestWhoMayJoin(t *testing.T) {
	t.Parallel()
	key := keyOf(t, secret.DatabaseURI, "demo")
	for name, test := range map[string]struct {
		later time.Duration
		req   broker.GetRequest
		joins bool
	}{
		"at once":             {0, broker.GetRequest{}, true},
		"at the bound":        {30 * time.Second, broker.GetRequest{}, true},
		"after the bound":     {30*time.Second + 1, broker.GetRequest{}, false},
		"at its own bound":    {time.Minute, broker.GetRequest{MaxStaleness: within(time.Minute)}, true},
		"never with 0s":       {0, broker.GetRequest{MaxStaleness: within(0)}, false},
		"for another version": {0, broker.GetRequest{Version: "another"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, sent2, open2 := newCellar(), make(chan struct{}), make(chan struct{})
			c.put(key, 1)
			sent, open := c.holdFirst(func(asked int64) error {
				if asked == 2 {
					close(sent2)
					<-open2
				}
				return nil
			})
			b, want, asOf := c.heart(t), int64(1), c.Now()
			first := read(t, b, broker.GetRequest{Key: key})
			<-sent
			c.advance(test.later)
			test.req.Key = key
			next := read(t, b, test.req)
			if !test.joins {
				<-sent2
				want, asOf = 2, c.Now()
			}
			if test.req.Version != "" { // that there is none is made sure of
				want = 4
			}
			open()
			<-first
			close(open2) // whoever asked himself waits for that
			if r := <-next; test.req.Version == "" && (r.err != nil || !r.AsOf.Equal(asOf)) {
				t.Errorf("got an answer as of %v, %v, want %v", r.AsOf, r.err, asOf)
			}
			if got := c.asked.Load(); got != want {
				t.Errorf("the vault was asked %d times, want %d", got, want)
			}
		})
	}
}

// TestJoinedAnswerIsTooLow: who waited for a request from before it began asks once
// more before it is told that the generation is not there.
func TestJoinedAnswerIsTooLow(t *testing.T) {
	t.Parallel()
	key := keyOf(t, secret.DatabaseURI, "demo")
	for least, reason := range map[int64]secret.Reason{2: "", 3: "", 4: secret.StalenessUnsatisfiable} {
		t.Run(fmt.Sprint(least), func(t *testing.T) {
			t.Parallel()
			c := newCellar()
			c.put(key, 2)
			sent, open := c.holdFirst(nil)
			b := c.heart(t)
			first := read(t, b, broker.GetRequest{Key: key})
			<-sent
			next := read(t, b, broker.GetRequest{Key: key, MinGeneration: least})
			c.advance(time.Second)
			c.put(key, 3)
			open()
			<-first
			r := <-next
			if told := (*broker.Error)(nil); errors.As(r.err, &told) != (reason != "") || told != nil && told.Reason != reason || r.err == nil && r.Generation != max(least, 2) {
				t.Errorf("got generation %d, %v, want %q", r.Generation, r.err, reason)
			}
			if got, want := c.asked.Load(), min(least-1, 2); got != want {
				t.Errorf("the vault was asked %d times, want %d", got, want)
			}
		})
	}
}

// TestJoinedAnswerFoundNothing: the same, where it is told that there is no such secret.
func TestJoinedAnswerFoundNothing(t *testing.T) {
	t.Parallel()
	key := keyOf(t, secret.DatabaseURI, "demo")
	c := newCellar()
	sent, open := c.holdFirst(nil)
	b := c.heart(t)
	first := read(t, b, broker.GetRequest{Key: key})
	<-sent
	next := read(t, b, broker.GetRequest{Key: key, MinGeneration: 3})
	c.advance(time.Second)
	c.put(key, 3)
	open()
	<-first
	if r := <-next; r.err != nil || r.Generation != 3 {
		t.Errorf("got generation %d, %v, want 3", r.Generation, r.err)
	}
}

// TestNobodyAsksForWhatHasJustArrived: the answer for which a read was about to wait
// came into memory in that very moment.
func TestNobodyAsksForWhatHasJustArrived(t *testing.T) {
	t.Parallel()
	key, c := keyOf(t, secret.DatabaseURI, "demo"), newCellar()
	c.put(key, 1)
	sent, open := c.holdFirst(nil)
	b := c.heart(t)
	first := read(t, b, broker.GetRequest{Key: key})
	<-sent
	land := sync.OnceFunc(func() {
		open()
		<-first
	})
	var asked atomic.Int64 // for the time: when it begins, and before it waits
	told := func() {
		if asked.Add(1) == 2 {
			land()
		}
	}
	c.told.Store(&told)
	_, err := b.Get(patient{t.Context(), land}, broker.Call{}, broker.GetRequest{Key: key})
	if got := c.asked.Load(); got != 1 || err != nil {
		t.Errorf("the vault was asked %d times, %v, want once", got, err)
	}
}

// TestOldAnswerComesLate: what the vault said meanwhile counts, also when it says
// nothing any more.
func TestOldAnswerComesLate(t *testing.T) {
	t.Parallel()
	key := keyOf(t, secret.DatabaseURI, "demo")
	for name, test := range map[string]struct {
		meanwhile error // nil: another value
		left      int64 // generation that is read afterwards; 0: none
	}{"refused": {vault.ErrRefused, 0}, "deleted": {vault.ErrNotFound, 0}, "another value": {nil, 2}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCellar()
			c.put(key, 1)
			sent, open := c.holdFirst(func(asked int64) error {
				if asked == 2 {
					return test.meanwhile
				}
				return vault.ErrUnavailable
			})
			b := c.heart(t)
			get := func(max *time.Duration) (broker.GetResult, error) {
				return b.Get(t.Context(), broker.Call{}, broker.GetRequest{Key: key, MaxStaleness: max})
			}
			first := read(t, b, broker.GetRequest{Key: key})
			<-sent
			c.advance(time.Second)
			c.put(key, 2)
			if _, err := get(within(0)); (err == nil) != (test.meanwhile == nil) {
				t.Errorf("got %v, want %v", err, test.meanwhile)
			}
			open()
			<-first
			c.advance(time.Minute)
			for _, max := range []*time.Duration{within(time.Hour), nil} {
				if r, err := get(max); (err == nil) != (test.left != 0) || r.Generation != test.left {
					t.Errorf("got generation %d, %v as of %v, %v", r.Generation, r.Source, r.AsOf, err)
				}
			}
		})
	}
}

// TestReadConditionsFromMemory: known_version and min_generation go by what is
// remembered as they go by the vault.
func TestReadConditionsFromMemory(t *testing.T) {
	t.Parallel()
	key, c := keyOf(t, secret.DatabaseURI, "demo"), newCellar()
	b := c.heart(t)
	get := func(known, least, want int64, max *time.Duration, source broker.Source) {
		t.Helper()
		r, err := b.Get(t.Context(), broker.Call{}, broker.GetRequest{Key: key, KnownVersion: c.version(known), MinGeneration: least, MaxStaleness: max})
		if err != nil || r.Generation != want || r.Source != source || r.NotModified != (known == want) || r.Value.IsEmpty() != r.NotModified {
			t.Errorf("known %d, least %d: got generation %d, %v, not modified %v, %v; want %d, %v", known, least, r.Generation, r.Source, r.NotModified, err, want, source)
		}
	}
	c.put(key, 2)
	get(9, 0, 2, nil, broker.Live)
	c.put(key, 3)
	get(2, 0, 2, nil, broker.Cached)
	get(2, 2, 2, nil, broker.Cached)
	get(9, 2, 2, nil, broker.Cached)
	get(3, 3, 3, within(time.Hour), broker.Live)
	get(3, 3, 3, nil, broker.Cached)
	_, err := b.Get(t.Context(), broker.Call{}, broker.GetRequest{Key: key, MinGeneration: 4})
	if told := (*broker.Error)(nil); !errors.As(err, &told) || told.Reason != secret.StalenessUnsatisfiable || !strings.Contains(told.Message, "generation 3") {
		t.Errorf("got %v, want the generation found", err)
	}
	c.put(key, 0)
	get(9, 4, 0, nil, broker.Live)
	get(9, 4, 0, nil, broker.Live) // it meets no bound in memory
	get(0, 0, 0, nil, broker.Cached)
}

// TestAbsentSecretsDoNotFillMemory: what others read stays in memory while one caller
// asks for more secrets that are not there than fit.
func TestAbsentSecretsDoNotFillMemory(t *testing.T) {
	t.Parallel()
	const others, absent = 50, 10_000
	c := newCellar()
	b := c.heart(t)
	get := func(key secret.Key) (broker.GetResult, error) {
		return b.Get(t.Context(), broker.Call{Caller: "spiffe://console.exto/worker"}, broker.GetRequest{Key: key})
	}
	for n := range others {
		key := keyOf(t, secret.DatabaseURI, "other-%d", n)
		c.put(key, 1)
		if _, err := get(key); err != nil {
			t.Fatal(err)
		}
	}
	for n := range absent {
		_, _ = get(keyOf(t, secret.DatabaseURI, "absent-%d", n))
	}
	for n := range others {
		if r, err := get(keyOf(t, secret.DatabaseURI, "other-%d", n)); err != nil || r.Source != broker.Cached {
			t.Fatalf("got %v, %v, want it from memory", r.Source, err)
		}
	}
}

// racing reports that this is a run with the race detector, which is slow.
func racing() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// TestAnHourOfAThousandInstances: each reads its three secrets once a minute, and the
// Console in between. No answer is older than 30 s, every change is seen within
// that, and the vault is asked little.
func TestAnHourOfAThousandInstances(t *testing.T) {
	t.Parallel()
	const instances, most = 1000, 320
	seconds := 3600
	if racing() {
		seconds = 120
	}
	c := newCellar()
	b := c.heart(t)
	var keys [instances][3]secret.Key
	type value struct{ changed, before time.Time }
	changes := map[secret.Key]value{}
	put := func(key secret.Key) {
		c.put(key, 0)
		changes[key] = value{c.Now(), changes[key].changed}
	}
	for i := range instances {
		for kind := range 3 {
			keys[i][kind] = keyOf(t, secret.Kind(kind+1), "instance-%d", i)
			put(keys[i][kind])
		}
	}
	memory, minute := 0, int64(0) // answers from there; requests up to the last one
	for second := range seconds {
		for i := range instances {
			due := (second - i%60 + 60) % 60
			if due != 0 && due != 20 { // the instance; the Console
				continue
			}
			for _, key := range keys[i] {
				r, err := b.Get(t.Context(), broker.Call{Caller: fmt.Sprint("spiffe://console.exto/instance/instance-", i)}, broker.GetRequest{Key: key})
				now, v := c.Now(), changes[key]
				if err != nil || now.Sub(r.AsOf) > 30*time.Second {
					t.Fatalf("got an answer as of %v, %v at %v", r.AsOf, err, now)
				}
				if seen := r.Value.Reveal(); seen != v.changed.String() && (now.Sub(v.changed) > 30*time.Second || seen != v.before.String()) {
					t.Fatalf("got the value of %s at %v, want that of %v", seen, now, v.changed)
				}
				if r.Source == broker.Cached {
					memory++
				}
			}
		}
		c.advance(time.Second)
		for kind := range 3 {
			put(keys[second*7%instances][kind])
		}
		if (second+1)%60 == 0 {
			asked := c.asked.Load()
			if got := asked - minute; got > most*60 || got < 3*instances {
				t.Errorf("minute %d: the vault was asked %d times", second/60, got)
			}
			minute = asked
		}
	}
	if want := 3 * instances * (seconds/60 - 1); memory < want {
		t.Errorf("got %d answers from memory, want %d", memory, want)
	}
}
