package server_test

import (
	"context"
	"fmt"
	"net/http"
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
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/keyvault"
)

// TestSecondLook: what was changed outside is seen by the first token that needs it, as
// soon as what is remembered is older than 2 s, and not before.
func TestSecondLook(t *testing.T) {
	t.Parallel()
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		for _, state := range []string{"absent", "active", "outside", "disabled"} {
			t.Run(state, func(t *testing.T) {
				t.Parallel()
				x, before := start(t).instance(t, "demo", state)
				x.cold()
				x.wantVerify("new", noMatch)
				x.setOutside("new") // takes a second
				for range 2 {
					if got := x.lookups(func() { x.wantVerify("new", noMatch) }); len(got) > 0 {
						t.Errorf("not older than 2 s: the vault was asked for %v", got)
					}
					x.clock.advance(time.Second)
				}
				x.clock.advance(1 - time.Second)
				if got := x.lookups(func() { x.wantVerify("new", "MATCH_CURRENT/0") }); len(got) != 1 {
					t.Errorf("older than 2 s: the vault was asked for %v, want one Get", got)
				}
				if got := x.lookups(func() { x.wantVerify(before, noMatch) }); len(got) > 0 {
					t.Errorf("after the look: the vault was asked for %v", got)
				}
			})
		}
	})
}

// TestSecondLookAtMostOnceInTwoSeconds of an instance, also when it fails.
func TestSecondLookAtMostOnceInTwoSeconds(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		grace time.Duration // in which the token before was never read
		fails error
	}{"answered": {}, "unavailable": {0, vault.ErrUnavailable}, "throttled": {0, vault.ErrThrottled}, "unavailable, in grace": {time.Hour, vault.ErrUnavailable}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, _ := startSystem(t).instance(t, "demo", "active")
			token := x.nextToken(tt.grace).GetValue()
			x.cold()
			x.wantVerify(token, "MATCH_CURRENT/3")
			var asked []time.Time
			x.vault.SetBefore(func(context.Context, string, secret.Key) error {
				asked = append(asked, x.clock.Now())
				return tt.fails
			})
			for range 200 { // 20 s, in which no read of its own is due
				if got := x.verify(wrong); got != noMatch && tt.grace == 0 {
					t.Errorf("got %s, want NO_MATCH", got)
				}
				x.wantVerify(token, "MATCH_CURRENT/3")
				x.clock.advance(100 * time.Millisecond)
			}
			within := 0
			for i := range asked[1:] {
				if asked[i+1].Sub(asked[i]) < 2*time.Second {
					within++
				}
			}
			if len(asked) < 9 || within > 0 {
				t.Errorf("got %d looks in 20 s, %d of them within 2 s of another, want 9", len(asked), within)
			}
		})
	}
}

// TestOneLookForAThousandTokens that come together.
func TestOneLookForAThousandTokens(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		cold  bool
		fails error
		want  int
	}{
		"remembered": {want: 1},
		"outage":     {fails: vault.ErrUnavailable, want: 1},
		"cold":       {cold: true, want: 4}, // the list and the token in grace too
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, _ := startSystem(t).instance(t, "demo", "active")
			x.nextToken(time.Hour)
			if tt.cold {
				x.cold()
			}
			x.clock.advance(3 * time.Second)
			x.vault.SetBefore(func(context.Context, string, secret.Key) error { return tt.fails })
			if got := x.lookups(func() {
				var calls sync.WaitGroup
				for n := range 1000 {
					calls.Go(func() { x.wantVerify(fmt.Sprint(wrong, n), noMatch) })
				}
				calls.Wait()
			}); len(got) != tt.want {
				t.Errorf("the vault was asked for %v, want %d requests", got, tt.want)
			}
		})
	}
}

// held makes the next Get of the subject wait for release, or for the end of its
// context. reached is closed when it waits.
func (x *subject) held() (reached chan struct{}, release func()) {
	reached, gate := make(chan struct{}), make(chan struct{})
	var first atomic.Bool
	x.vault.SetBefore(func(ctx context.Context, op string, key secret.Key) error {
		if op != "Get" || key != x.key || !first.CompareAndSwap(false, true) {
			return nil
		}
		close(reached)
		select {
		case <-gate:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	release = sync.OnceFunc(func() { close(gate) })
	x.t.Cleanup(release)
	return reached, release
}

// TestNewTokenWaitsForTheLookUnderWay that a wrong one caused, and matches; the token
// that is remembered does not wait.
func TestNewTokenWaitsForTheLookUnderWay(t *testing.T) {
	t.Parallel()
	for name, hurried := range map[string]bool{"whose caller waits": false, "whose caller's time is over": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, token := startSystem(t).instance(t, "demo", "active")
			x.setOutside("new")
			x.clock.advance(2 * time.Second)
			reached, release := x.held()
			first := *x
			if hurried {
				var cancel context.CancelFunc
				first.ctx, cancel = context.WithTimeout(x.ctx, 500*time.Millisecond)
				defer cancel()
			}
			var calls, waits sync.WaitGroup
			defer calls.Wait()
			calls.Go(func() { first.verify(wrong) })
			<-reached
			waits.Go(func() { x.wantVerify("new", "MATCH_CURRENT/0") })
			x.wantVerify(token, "MATCH_CURRENT/2")
			if hurried {
				calls.Wait()
			}
			release()
			waits.Wait()
		})
	}
}

// TestTokenInGraceIsReadAgain right after a look at it ended with the time of a wrong
// token's caller: no limit refuses a token that matches.
func TestTokenInGraceIsReadAgain(t *testing.T) {
	t.Parallel()
	x, before := startSystem(t).instance(t, "demo", "active")
	token := x.nextToken(time.Hour).GetValue()
	x.cold()
	x.wantVerify(token, "MATCH_CURRENT/3")
	_, release := x.held()
	ctx, cancel := context.WithTimeout(x.ctx, 100*time.Millisecond)
	defer cancel()
	_, _ = x.c.VerifyToken(ctx, &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: wrong})
	release()
	x.wantVerify(before, "MATCH_PREVIOUS/2 for 1h0m0s")
}

// TestNewTokenWaitsForItsTurn before the vault, behind the look that another caller's
// wrong token caused.
func TestNewTokenWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	for name, age := range map[string]time.Duration{"remembered": 2 * time.Second, "remembered for longer than the bound": pastBound} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, token := startKeyVault(t).instance(t, "demo", "active")
			x.policy += "  - identity: spiffe://console.exto/gateway\n    allow: [verify]\n"
			x.withBudget(0.4)
			y := *x
			y.c = x.as("gateway")
			y.wantVerify(token, "MATCH_CURRENT/2") // takes what can be had at once
			x.setOutside("new")
			x.clock.advance(age)
			reached, release := x.held()
			release()
			var calls sync.WaitGroup
			calls.Go(func() { x.verify(wrong) })
			<-reached
			y.wantVerify("new", "MATCH_CURRENT/0")
			calls.Wait()
		})
	}
}

// withBudget serves the subject from a Key Vault by another broker, which may send so
// many reads a second.
func (x *subject) withBudget(readsPerSecond float64) {
	x.t.Helper()
	x.own = func() vault.Vault {
		p, transport := x.fake.Broker(), x.fake.Transport()
		transport.MaxIdleConnsPerHost = 64
		v, err := keyvault.Open(x.t.Context(), keyvault.Config{
			URL: x.fake.URL(), ReadsPerSecond: readsPerSecond, WritesPerSecond: 1000, Logger: x.logger(), Transport: transport,
			Credential: func() (azcore.TokenCredential, error) {
				return azidentity.NewClientSecretCredential(p.TenantID, p.ClientID, p.ClientSecret, &azidentity.ClientSecretCredentialOptions{
					ClientOptions: azcore.ClientOptions{Transport: &http.Client{Transport: transport}},
				})
			},
			Now: x.clock.Now, Wait: x.clock.wait,
		})
		if err != nil {
			x.t.Fatal(err)
		}
		return v
	}
	x.cold()
}

// sent counts the requests of the vault's journal for names that begin so.
func (s *system) sent(prefix string) (n int) {
	for _, r := range s.fake.Journal() {
		if strings.HasPrefix(r.Name, prefix) {
			n++
		}
	}
	return n
}

// coldGets reads so many secrets as worker that no broker has read before.
func (s *system) coldGets(t *testing.T, c secretsv1.SecretsBrokerServiceClient, name string, n int) {
	t.Helper()
	for i := range n {
		id := fmt.Sprint(name, "-", i)
		s.fake.PersonSet("instance-"+id+"-dburi", uri(i), nil)
		if out, err := c.GetSecret(callContext(t), &secretsv1.GetSecretRequest{Ref: ref(id, uriKind)}); err != nil || out.GetValue() != uri(i) {
			t.Errorf("Get of %s: got %v, %v", id, out.GetMetadata(), err)
		}
	}
}

// TestFloodOfWrongTokens for one instance: its right tokens match throughout, and others
// read what they have not read before.
func TestFloodOfWrongTokens(t *testing.T) {
	t.Parallel()
	x := startKeyVault(t).token(t, "demo")
	before := x.nextToken(0).GetValue()
	x.clock.advance(time.Second)
	token := x.nextToken(24 * time.Hour).GetValue()
	x.withBudget(20)
	reader := x.as(worker)
	for round := range 20 { // over more than the bound
		var calls sync.WaitGroup
		for n := range 200 {
			calls.Go(func() { x.wantVerify(fmt.Sprint(wrong, n), noMatch) })
			if n%4 == 0 {
				calls.Go(func() { x.wantVerify(token, "MATCH_CURRENT/2") })
				calls.Go(func() {
					if got := x.verify(before); !strings.HasPrefix(got, "MATCH_PREVIOUS/1 for ") {
						t.Errorf("the token in grace: got %s", got)
					}
				})
			}
		}
		x.coldGets(t, reader, fmt.Sprint("cold-", round), 1)
		calls.Wait()
		x.clock.advance(2*time.Second + 1)
	}
	if got := x.sent(x.key.String()); got > 50 {
		t.Errorf("got %d requests in 20 rounds, want at most one look in each, and few for the token in grace", got)
	}
}

// flood has wrong tokens of so many made-up instances verified, over connections that
// take a thousand calls at once. All of them are at the vault's budget when it returns, or
// were refused a place there; end ends those that wait there, wait lets them be answered.
func (s *system) flood(t *testing.T, name string, n int) (end, wait func()) {
	ctx, cancel := context.WithCancel(callContext(t))
	arrived := make(chan struct{}, 2*n)
	s.vault.SetBefore(func(_ context.Context, _ string, key secret.Key) error {
		if strings.HasPrefix(key.String(), "instance-"+name) {
			arrived <- struct{}{}
		}
		return nil
	})
	var calls sync.WaitGroup
	for first := 0; first < n; first += 1000 {
		c := s.as(consoleAPI)
		for i := first; i < min(n, first+1000); i++ {
			calls.Go(func() {
				_, err := c.VerifyToken(ctx, &secretsv1.VerifyTokenRequest{InstanceId: fmt.Sprint(name, i), Token: wrong})
				if err != nil {
					arrived <- struct{}{}
				}
			})
		}
	}
	for range n {
		<-arrived
	}
	s.vault.SetBefore(nil)
	end = sync.OnceFunc(func() { cancel(); calls.Wait() })
	t.Cleanup(end)
	return end, calls.Wait
}

// TestFloodOfMadeUpInstances: while it lasts, others read what they have not read before,
// and the tokens of instances that the broker knows match, new ones at once.
func TestFloodOfMadeUpInstances(t *testing.T) {
	t.Parallel()
	for name, spent := range map[string]bool{"the first ones": false, "when there were many before": true} {
		if race.Enabled && !spent {
			continue // the same calls, and fewer
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, token := startKeyVault(t).instance(t, "demo", "active")
			y, _ := x.instance(t, "outside", "outside")
			x.withBudget(40)
			y.reconnect()
			reader := x.as(worker)
			x.wantVerify(token, "MATCH_CURRENT/2")
			y.wantVerify("from-outside", "MATCH_CURRENT/0")
			x.setOutside("new")
			y.setOutside("new")
			x.clock.advance(time.Second)
			if spent {
				_, wait := x.flood(t, "earlier-", 205)
				wait()
			}
			const size = 1200
			end, _ := x.flood(t, "made-up-", size)
			before := x.sent("instance-made-up-")
			first := func(what string) {
				t.Helper()
				if got := x.sent("instance-made-up-") - before; got > size/2 {
					t.Errorf("got %d requests of the flood before %s", got, what)
				}
			}
			x.wantVerify(token, "MATCH_CURRENT/2")
			first("a token that is remembered")
			x.coldGets(t, reader, "cold", 10)
			first("the reads of another caller")
			x.wantVerify("new", "MATCH_CURRENT/0")
			first("a new token of a known instance")
			y.wantVerify("new", "MATCH_CURRENT/0")
			first("a new token of an instance that is known by one from outside")
			end()
			x.coldGets(t, reader, "after", 1)
		})
	}
}

// TestVerifyInAnOutage goes by what was read or written in the last 15 min, but for a
// grace that is over. A wrong token does not make one call ask twice.
func TestVerifyInAnOutage(t *testing.T) {
	t.Parallel()
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		for name, restart := range map[string]bool{"written": false, "read": true} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				x, first := start(t).instance(t, "demo", "active")
				y, unknown := x.token(t, "ending"), x.token(t, "unknown")
				ended := y.nextToken(0).GetValue()
				second := x.nextToken(time.Hour).GetValue()
				third := y.nextToken(10 * time.Minute).GetValue()
				if restart {
					x.cold()
					y.c, unknown.c = x.c, x.c
					x.wantVerify(second, "MATCH_CURRENT/3")
					x.wantVerify(first, "MATCH_PREVIOUS/2 for 1h0m0s")
					y.wantVerify(wrong, noMatch)
				}
				x.failing("Get", "Versions")
				x.clock.advance(10*time.Minute - 1)
				y.wantVerify(ended, "MATCH_PREVIOUS/1 for 1ns")
				x.clock.advance(1)
				y.wantVerify(ended, noMatch)
				y.wantVerify(third, "MATCH_CURRENT/2")
				x.clock.advance(2 * time.Second)
				if got := y.lookups(func() { y.wantVerify(wrong, noMatch) }); len(got) != 1 {
					t.Errorf("the vault was asked for %v, want one look that fails", got)
				}
				x.clock.advance(5*time.Minute - 2*time.Second)
				x.wantVerify(second, "MATCH_CURRENT/3")
				x.wantVerify(first, "MATCH_PREVIOUS/2 for 45m0s")
				x.wantVerify(wrong, noMatch)
				unknown.wantVerify(wrong, "VAULT_UNAVAILABLE")
				x.clock.advance(1)
				for _, token := range []string{first, second, wrong} {
					x.wantVerify(token, "VAULT_UNAVAILABLE")
				}
				x.vault.SetBefore(nil)
				x.wantVerify(second, "MATCH_CURRENT/3")
			})
		}
	})
}

// TestVerifyWhenTheBrokerIsRefused: nothing matches by memory any more, also when the
// vault is out after that.
func TestVerifyWhenTheBrokerIsRefused(t *testing.T) {
	t.Parallel()
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		for name, tt := range map[string]struct {
			age   time.Duration
			token string // that makes the broker ask; empty: the right one
		}{"a read that is due": {pastBound, ""}, "a second look": {3 * time.Second, wrong}} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				x, token := start(t).instance(t, "demo", "active")
				x.cold()
				x.wantVerify(token, "MATCH_CURRENT/2")
				x.clock.advance(tt.age)
				refuses := func(context.Context, string, secret.Key) error { return vault.ErrRefused }
				if x.fake != nil {
					x.fake.Revoke(x.fake.Broker(), keyvaultfake.OpGet)
					refuses = nil
				}
				x.vault.SetBefore(refuses)
				x.wantVerify(or(tt.token, token), "VAULT_REFUSED")
				x.wantVerify(token, "VAULT_REFUSED")
				x.failing("Get")
				x.wantVerify(token, "VAULT_UNAVAILABLE")
				x.wantVerify(wrong, "VAULT_UNAVAILABLE")
			})
		}
	})
}

// TestLookUpsLeaveRoom: as many tokens that match nothing as one connection bears, none
// of which the vault answers, keep no other call of it out.
func TestLookUpsLeaveRoom(t *testing.T) {
	t.Parallel()
	madeUp := func(n int) string { return fmt.Sprint("made-up-", n) }
	for name, test := range map[string]struct {
		instance func(n int) string
		earlier  int           // tokens that matched nothing
		running  time.Duration // since the start
	}{
		"instances that there are not": {madeUp, 205, 0},
		"they are the first, later on": {madeUp, 0, 6 * time.Minute},
		"one instance":                 {func(int) string { return "demo" }, 0, 0},
	} {
		if race.Enabled && test.earlier > 0 {
			continue // the same calls, and more
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startSystem(t)
			x, token := s.instance(t, "demo", "active")
			x.clock.advance(test.running)
			x.wantVerify(token, "MATCH_CURRENT/2")
			x.clock.advance(2*time.Second + 1)
			_, wait := s.flood(t, "earlier-", test.earlier)
			wait()
			hold := make(chan struct{})
			s.vault.SetBefore(func(context.Context, string, secret.Key) error {
				<-hold
				return nil
			})
			const size = 2100
			var calls sync.WaitGroup
			var answered atomic.Int64
			for n := range size {
				calls.Go(func() {
					_, _ = x.c.VerifyToken(x.ctx, &secretsv1.VerifyTokenRequest{InstanceId: test.instance(n), Token: fmt.Sprint(wrong, n)})
					answered.Add(1)
				})
			}
			eventually(t, "most are answered", func() bool { return answered.Load() >= size-800 })
			x.wantVerify(token, "MATCH_CURRENT/2")
			close(hold)
			calls.Wait()
		})
	}
}

// TestMatchIsRefusedByNoLimit: whatever else its caller has under way, a token that
// matches is verified. Another one is told of the limit.
func TestMatchIsRefusedByNoLimit(t *testing.T) {
	t.Parallel()
	for name, bounds := range map[string]server.Bounds{"calls": {Calls: 1}, "bytes": {Held: 40 << 10}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startWithBounds(t, bounds)
			x, before := s.instance(t, "demo", "active")
			token := x.nextToken(time.Hour).GetValue()
			x.wantVerify(before, "MATCH_PREVIOUS/2 for 1h0m0s")
			set, hold := make(chan struct{}), make(chan struct{})
			s.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
				if op == "Set" {
					close(set)
					<-hold
				}
				return nil
			})
			var put sync.WaitGroup
			put.Go(func() {
				_, _ = x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: ref("other", uriKind), Value: "postgres://db/" + strings.Repeat("a", 24_000)})
			})
			<-set
			x.wantVerify(token, "MATCH_CURRENT/3")
			x.wantVerify(before, "MATCH_PREVIOUS/2 for 1h0m0s")
			for _, id := range []string{"demo", "unknown"} {
				_, err := x.c.VerifyToken(x.ctx, &secretsv1.VerifyTokenRequest{InstanceId: id, Token: wrong})
				wantQuota(t, err, "")
			}
			_, err := x.c.GetSecret(x.ctx, &secretsv1.GetSecretRequest{Ref: x.ref})
			wantQuota(t, err, "")
			close(hold)
			put.Wait()
		})
	}
}

// TestLookUnderWayIsTooOldAtItsEnd: a token that came while a look was under way, which
// began before the token did, and ended more than 2 s after, is looked up once more.
func TestLookUnderWayIsTooOldAtItsEnd(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	x, _ := s.instance(t, "demo", "active")
	x.clock.advance(2*time.Second + 1)
	answered, open := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
		once.Do(func() {
			close(answered)
			<-open
		})
		return err
	})
	var calls sync.WaitGroup
	calls.Go(func() { x.wantVerify(wrong, noMatch) })
	<-answered
	x.setOutside("new")
	calls.Go(func() { x.wantVerify("new", "MATCH_CURRENT/0") })
	eventually(t, "both are under way", func() bool { return s.face.Usage(spiffe(consoleAPI)).Calls == 2 })
	x.clock.advance(2 * time.Second)
	close(open)
	calls.Wait()
}
