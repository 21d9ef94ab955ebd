package server_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/internal/race"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/keyvault"
)

// tally counts, and tells when it has come to a number.
type tally struct {
	mu    sync.Mutex
	count int
	told  map[int]chan struct{}
}

func (c *tally) add() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	if told := c.told[c.count]; told != nil {
		close(told)
	}
}

// await blocks until the count has come to n.
func (c *tally) await(x *subject, n int, of string) {
	x.t.Helper()
	c.mu.Lock()
	count, told := c.count, make(chan struct{})
	if c.told == nil {
		c.told = map[int]chan struct{}{}
	}
	if c.told[n] = told; count >= n {
		close(told)
	}
	c.mu.Unlock()
	select {
	case <-told:
	case <-x.ctx.Done():
		x.t.Fatalf("got %d %s, want %d", count, of, n)
	}
}

// inTurns counts the reads of a vault that were sent or wait for their turn.
type inTurns struct {
	vault.Vault
	placed tally
	waits  func() // unless nil, called when one has to wait

	mu   sync.Mutex
	sent []string // names, in the order in which they had their turns
}

func (v *inTurns) turns() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.sent)
}

func (v *inTurns) Get(ctx context.Context, key secret.Key, version string) (vault.Properties, secret.Value, error) {
	o := vault.OriginOf(ctx)
	placed := sync.OnceFunc(v.placed.add)
	follow := func(first, then func()) func() {
		return func() {
			if first != nil {
				first()
			}
			if then != nil {
				then()
			}
			placed()
		}
	}
	o.Waits, o.Sends = follow(v.waits, o.Waits), follow(func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.sent = append(v.sent, key.String())
	}, o.Sends)
	return v.Vault.Get(vault.WithOrigin(ctx, o), key, version)
}

// shortOfReads restarts the broker of a system on Key Vault with so few reads a
// second.
func (s *system) shortOfReads(perSecond float64) *inTurns {
	s.t.Helper()
	transport, p := s.fake.Transport(), s.fake.Broker()
	v, err := keyvault.Open(s.t.Context(), keyvault.Config{
		URL: s.fake.URL(), ReadsPerSecond: perSecond, Logger: s.logger(), Transport: transport,
		Credential: func() (azcore.TokenCredential, error) {
			return azidentity.NewClientSecretCredential(p.TenantID, p.ClientID, p.ClientSecret, &azidentity.ClientSecretCredentialOptions{
				ClientOptions: azcore.ClientOptions{Transport: &http.Client{Transport: transport}},
			})
		},
		Now: s.clock.Now, Wait: s.clock.wait,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = v.Close() })
	reads := &inTurns{Vault: v}
	s.heart = func(c *broker.Config) { c.Vault = reads }
	s.restart()
	return reads
}

// gotten are the names whose values were asked of the fake, in order.
func (s *system) gotten() (names []string) {
	for _, r := range s.fake.Journal() {
		if r.Op == keyvaultfake.OpGet && !r.Challenge && strings.HasPrefix(r.Name, "instance-") {
			names = append(names, r.Name)
		}
	}
	return names
}

// admissions restarts the broker of a system and counts the calls that it lets in.
func (s *system) admissions() *tally {
	s.t.Helper()
	calls := &tally{}
	s.config = func(c *server.Config) {
		c.Now = func() time.Time { // each call's certificate is judged by it
			calls.add()
			return time.Now()
		}
	}
	s.restart()
	return calls
}

// cold is a secret that the broker never saw.
func (s *system) cold(t *testing.T, id string) *subject {
	t.Helper()
	x := s.in(t, id, "absent")
	x.person(uri(2))
	return x
}

// hold makes reads of the vault wait, as long as they may.
func (b *barrier) hold(ctx context.Context, op string, _ secret.Key) error {
	if op != "Get" {
		return nil
	}
	b.reach()
	select {
	case <-b.opened:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TestOneLookForAll: 10,000 calls for a cold secret, of two callers, are one request
// to the vault.
func TestOneLookForAll(t *testing.T) {
	t.Parallel()
	const connections = 10
	gets := 10_000
	if race.Enabled {
		gets = 2_000
	}
	s := startKeyVault(t)
	calls := s.admissions()
	x, answer := s.cold(t, "demo"), newBarrier(t)
	s.vault.SetBefore(answer.hold)
	var clients []secretsv1.SecretsBrokerServiceClient
	for n := range connections {
		clients = append(clients, s.as([]string{consoleAPI, worker}[n%2]))
	}
	var wg sync.WaitGroup
	for n := range gets {
		wg.Go(func() {
			out, err := clients[n%connections].GetSecret(x.ctx, &secretsv1.GetSecretRequest{Ref: x.ref})
			if err != nil || out.GetValue() != uri(2) {
				t.Errorf("got %v, %v, want the value", out.GetMetadata(), err)
			}
		})
	}
	calls.await(x, gets, "calls")
	answer.open()
	wg.Wait()
	if got := x.looks(); got != 1 {
		t.Errorf("got %d requests to the vault, want 1", got)
	}
}

// TestWhoLeavesTakesNobodyWith: the call that the vault was asked for ends early, by
// its caller or its deadline. All others get their answer.
func TestWhoLeavesTakesNobodyWith(t *testing.T) {
	t.Parallel()
	onEachVault(t, testWhoLeavesTakesNobodyWith)
}

func testWhoLeavesTakesNobodyWith(t *testing.T, start func(*testing.T) *system) {
	for name, test := range map[string]struct {
		patience time.Duration
		end      error // of the vault's call at the deadline, unless it is that of the context
	}{
		"cancelled":                     {time.Hour, nil},
		"short deadline":                {300 * time.Millisecond, nil},
		"no time for the vault's tries": {300 * time.Millisecond, vault.ErrUnavailable},
		"no time for its turn":          {300 * time.Millisecond, vault.ErrThrottled},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const others = 50
			s := start(t)
			calls := s.admissions()
			x, answer, ended := s.cold(t, "demo"), newBarrier(t), newBarrier(t)
			s.vault.SetBefore(func(ctx context.Context, op string, key secret.Key) error {
				err := answer.hold(ctx, op, key)
				if err != nil {
					defer ended.reach()
				}
				if err != nil && test.end != nil {
					return test.end
				}
				return err
			})
			ctx, leave := context.WithTimeout(x.ctx, test.patience)
			defer leave()
			first := make(chan error, 1)
			get := func(ctx context.Context) error {
				_, err := x.c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: x.ref})
				return err
			}
			go func() { first <- get(ctx) }()
			<-answer.reached
			var wg sync.WaitGroup
			var told sync.Once
			for range others {
				wg.Go(func() {
					if err := get(x.ctx); err != nil {
						told.Do(func() { t.Error(err) })
					}
				})
			}
			calls.await(x, 1+others, "calls")
			if name == "cancelled" {
				leave()
			} else if test.end != nil {
				<-ended.reached
			}
			if err := <-first; err == nil {
				t.Error("got an answer before the vault gave one")
			}
			answer.open()
			wg.Wait()
			if got := x.looks(); got > 2 {
				t.Errorf("got %d requests to the vault, want at most one more", got)
			}
		})
	}
}

// TestSlowReadOfAReplacedVersion: without grace, nobody gets it from memory after the
// rotate returned.
func TestSlowReadOfAReplacedVersion(t *testing.T) {
	t.Parallel()
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		x := start(t).in(t, "demo", "active")
		x.clock.advance(time.Minute)
		reader, answer, read := x.as(worker), newBarrier(t), make(chan error, 1)
		x.vault.SetAfter(func(ctx context.Context, _ string, _ secret.Key, err error) error {
			if strings.HasSuffix(vault.OriginOf(ctx).Caller, worker) {
				answer.pass()
			}
			return err
		})
		go func() {
			_, err := reader.GetSecret(x.ctx, &secretsv1.GetSecretRequest{Ref: x.ref, Version: x.current})
			read <- err
		}()
		<-answer.reached
		x.rotateGrace(3, 0)
		answer.open()
		<-read // it began before: it may have either
		for _, max := range []time.Duration{time.Hour, byDefault, 0} {
			x.wantNo(max, x.current, secret.VersionExpired)
		}
	})
}

// TestAsOfIsNotWhileItWaitsForItsTurn: an answer is as of when the request was sent.
func TestAsOfIsNotWhileItWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	s := startKeyVault(t)
	reads := s.shortOfReads(8)
	var waited atomic.Bool
	reads.waits = func() {
		s.clock.advance(7 * time.Second)
		waited.Store(true)
	}
	for n := 0; !waited.Load(); n++ {
		out, err := s.cold(t, fmt.Sprint("demo-", n)).getWithin(byDefault, "")
		if got := out.GetFreshness().GetAsOf().AsTime(); err != nil || !got.Equal(s.clock.Now()) {
			t.Fatalf("got as of %v, %v, want %v", got, err, s.clock.Now())
		}
	}
}

// TestOneCallerDoesNotTakeAllTurns: while one has a hundred reads waiting, another
// one's goes among the next.
func TestOneCallerDoesNotTakeAllTurns(t *testing.T) {
	t.Parallel()
	const absent = 100
	s := startKeyVault(t)
	reads := s.shortOfReads(4)
	walker := s.as(worker)
	x := s.cold(t, "demo")
	ctx, leave := context.WithCancel(x.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer leave()
	for n := range absent {
		wg.Go(func() {
			_, _ = walker.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref(fmt.Sprint("absent-", n), uriKind)})
		})
	}
	reads.placed.await(x, absent, "reads that wait")
	for turn := range 3 {
		other := s.cold(t, fmt.Sprint("other-", turn))
		got := make(chan error, 1)
		go func() {
			_, err := other.getWithin(byDefault, "")
			got <- err
		}()
		reads.placed.await(x, absent+turn+1, "reads that wait")
		before := len(s.gotten())
		if err := <-got; err != nil {
			t.Fatal(err)
		}
		for n, name := range s.gotten()[before:] {
			if name == other.key.String() && n > 5 { // those that were on their way, and one
				t.Errorf("turn %d: %d of the walker's went before it", turn, n)
			}
		}
	}
}

// TestRestartWhileManySecretsAreInUse: all are asked for again at once, with few
// reads. Verifications go first, but for one turn in four; nobody waits in vain.
func TestRestartWhileManySecretsAreInUse(t *testing.T) {
	t.Parallel()
	const gets, verifications = 120, 60
	s := startKeyVault(t)
	token := secret.MintToken().Reveal()
	for n := range verifications {
		s.fake.PersonSet(fmt.Sprintf("instance-%d", n), token, nil)
	}
	for n := range gets {
		s.fake.PersonSet(fmt.Sprintf("instance-%d-dburi", n), uri(n), nil)
	}
	reads := s.shortOfReads(60)
	x, getter := s.in(t, "demo", "absent"), s.as(worker)
	var wg sync.WaitGroup
	for n := range gets {
		wg.Go(func() {
			out, err := getter.GetSecret(x.ctx, &secretsv1.GetSecretRequest{Ref: ref(fmt.Sprint(n), uriKind)})
			if err != nil || out.GetValue() != uri(n) {
				t.Errorf("Get: got %v, %v", out.GetMetadata(), err)
			}
		})
	}
	reads.placed.await(x, gets, "reads that wait")
	for n := range verifications {
		wg.Go(func() {
			out, err := x.c.VerifyToken(x.ctx, &secretsv1.VerifyTokenRequest{InstanceId: fmt.Sprint(n), Token: token})
			if err != nil || out.GetResult() != secretsv1.VerifyResult_VERIFY_RESULT_MATCH_CURRENT {
				t.Errorf("VerifyToken: got %v, %v", out, err)
			}
		})
	}
	reads.placed.await(x, gets+verifications, "reads that wait")
	before := len(reads.turns())
	wg.Wait()
	names := reads.turns()
	if asked := s.gotten(); len(names) != gets+verifications || len(asked) != len(names) {
		t.Errorf("got %d turns and %d requests to the vault, want one for each secret", len(names), len(asked))
	}
	left, last := 0, 0
	for n, name := range names[before:] {
		if !strings.HasSuffix(name, "-dburi") {
			left, last = left+1, n+1
		}
	}
	// Those that are let go together are told in any order. In order of their coming, the
	// last would be the last of all.
	if most := left*4/3 + verifications/2; last > most {
		t.Errorf("got the last of %d verifications as request %d of %d, want it by %d", left, last, len(names)-before, most)
	}
}

// TestHalfAnAnswerIsNoOutage: what the vault said counts, also when it cannot be asked
// the rest. There is no value any more that memory might stand in for.
func TestHalfAnAnswerIsNoOutage(t *testing.T) {
	t.Parallel()
	onEachVault(t, testHalfAnAnswerIsNoOutage)
}

func testHalfAnAnswerIsNoOutage(t *testing.T, start func(*testing.T) *system) {
	for name, test := range map[string]struct {
		change func(x *subject)
		rest   string // what cannot be asked
	}{
		"disabled": {func(x *subject) { x.patch(func(p *vault.Patch) { p.Enabled = false }) }, "Versions"},
		"deleted, and watched": {func(x *subject) {
			watch, err := x.c.WatchSecrets(x.ctx, &secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{x.ref}})
			if err != nil {
				x.t.Fatal(err)
			}
			if _, err := watch.Recv(); err != nil {
				x.t.Fatal(err)
			}
			if _, err := x.store.Delete(x.ctx, x.key); err != nil {
				x.t.Fatal(err)
			}
		}, "GetDeleted"},
		"replaced by another broker": {func(x *subject) {
			here, faulty := x.c, x.vault
			x.restart()
			x.reconnect()
			x.rotateGrace(3, 0)
			x.c, x.vault = here, faulty
		}, "Versions"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", "active")
			x.look()
			test.change(x)
			x.failing(test.rest)
			x.clock.advance(31 * time.Second)
			x.wantNo(byDefault, x.current, secret.SecretDisabled, secret.SecretNotFound, secret.VersionExpired, secret.VaultUnavailable)
		})
	}
}
