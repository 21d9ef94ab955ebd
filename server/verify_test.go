package server_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/noop"
)

const (
	noMatch = "NO_MATCH/0"
	wrong   = "a-wrong-token"
	// pastBound is longer than the broker's own bound, within which it sees what others
	// did in the vault.
	pastBound = 31 * time.Second
)

// verify is the answer to a token in short: result/generation, and for how long yet it
// is honoured; or the reason of an error.
func (x *subject) verify(token string) string {
	x.t.Helper()
	out, err := x.c.VerifyToken(x.ctx, &secretsv1.VerifyTokenRequest{InstanceId: x.ref.GetInstanceId(), Token: token})
	if err != nil {
		return string(failed(x.t, err).reason)
	}
	s := fmt.Sprintf("%s/%d", strings.TrimPrefix(out.GetResult().String(), "VERIFY_RESULT_"), out.GetGeneration())
	if out.GetExpireTime() != nil {
		s += " for " + out.GetExpireTime().AsTime().Sub(x.clock.Now()).String()
	}
	return s
}

func (x *subject) wantVerify(token, want string) {
	x.t.Helper()
	if got := x.verify(token); got != want {
		x.t.Errorf("%s, %.12q: got %s, want %s", x.key, token, got, want)
	}
}

// lookups are the vault's methods that were called for the subject while f ran.
func (x *subject) lookups(f func()) (methods []string) {
	before := len(x.vault.Calls())
	f()
	for _, call := range x.vault.Calls()[before:] {
		if method, name, _ := strings.Cut(call, " "); name == x.key.String() {
			methods = append(methods, method)
		}
	}
	return methods
}

// nextToken rotates the subject's token, or makes the first one.
func (x *subject) nextToken(grace time.Duration) *secretsv1.RotateSecretResponse {
	x.t.Helper()
	out, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, AllowMissing: true, GracePeriod: durationOf(grace)})
	if err != nil {
		x.t.Fatal(err)
	}
	return out
}

func (x *subject) putToken(token string) string {
	x.t.Helper()
	if _, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: token}); err != nil {
		x.t.Fatal(err)
	}
	return token
}

// enable enables or disables a version as a person would.
func (x *subject) enable(version string, enabled bool) {
	x.t.Helper()
	if _, err := x.store.Update(x.ctx, x.key, version, vault.Patch{Enabled: enabled}); err != nil {
		x.t.Fatal(err)
	}
	x.clock.advance(pastBound)
}

// cold makes another broker serve the subject, which remembers nothing.
func (x *subject) cold() {
	x.t.Helper()
	x.restart()
	x.reconnect()
}

// instance is an instance whose token, of generation 2 unless it is from outside, is in
// one of states.
func (s *system) instance(t *testing.T, id, state string) (x *subject, token string) {
	t.Helper()
	x = s.token(t, id)
	if state == "absent" {
		return x, secret.MintToken().Reveal()
	}
	for range 2 {
		token = x.nextToken(0).GetValue()
		s.clock.advance(time.Second)
	}
	switch state {
	case "outside":
		token = "from-outside"
		x.setOutside(token)
	case "disabled":
		x.patch(func(p *vault.Patch) { p.Enabled = false })
	case "deleted":
		x.delete()
	case "deleted outside":
		if _, err := s.store.Delete(x.ctx, x.key); err != nil {
			t.Fatal(err)
		}
		x.settle()
	case "marked":
		x.delete()
		if err := s.store.Recover(x.ctx, x.key); err != nil {
			t.Fatal(err)
		}
	}
	return x, token
}

func TestVerifyInEachState(t *testing.T) {
	t.Parallel()
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		want := map[string]string{"active": "MATCH_CURRENT/2", "outside": "MATCH_CURRENT/0"}
		for _, state := range states {
			t.Run(state, func(t *testing.T) {
				t.Parallel()
				x, token := start(t).instance(t, "demo", state)
				for _, when := range []func(){func() { x.clock.advance(pastBound) }, x.cold, func() {}} {
					when()
					x.wantVerify(token, or(want[state], noMatch))
					x.wantVerify(wrong, noMatch)
				}
			})
		}
	})
}

// TestVerifyInGrace: the token before is honoured to the end of its grace, and not at
// it; by the broker that rotated, and by one that has to read it.
func TestVerifyInGrace(t *testing.T) {
	t.Parallel()
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		for name, restart := range map[string]bool{"from memory": false, "cold": true} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				x, before := start(t).instance(t, "demo", "active")
				token := x.nextToken(time.Minute).GetValue()
				if restart {
					x.cold()
				}
				x.wantVerify(before, "MATCH_PREVIOUS/2 for 1m0s")
				x.wantVerify(token, "MATCH_CURRENT/3")
				x.clock.advance(time.Minute - 1)
				x.wantVerify(before, "MATCH_PREVIOUS/2 for 1ns")
				x.wantVerify(token, "MATCH_CURRENT/3")
				x.wantVerify(wrong, noMatch)
				x.clock.advance(1)
				x.wantVerify(before, noMatch)
				x.wantVerify(token, "MATCH_CURRENT/3")
				x.nextToken(0)
				x.wantVerify(token, noMatch) // without grace
			})
		}
	})
}

// TestVerifyAfterTheEndOfAGrace that would still run.
func TestVerifyAfterTheEndOfAGrace(t *testing.T) {
	t.Parallel()
	type rotated = *secretsv1.RotateSecretResponse
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		for name, tt := range map[string]struct {
			end     func(x *subject, r rotated)
			current string // what is said of the token that was current
		}{
			"rotate":               {func(x *subject, _ rotated) { x.nextToken(time.Hour) }, "MATCH_PREVIOUS/3 for 1h0m0s"},
			"put":                  {func(x *subject, _ rotated) { x.putToken("abc") }, noMatch},
			"delete":               {func(x *subject, _ rotated) { x.delete() }, noMatch},
			"delete and recover":   {func(x *subject, _ rotated) { x.further(0); x.further(1) }, "MATCH_CURRENT/3"},
			"disabled by a person": {func(x *subject, r rotated) { x.enable(r.GetPrevious().GetVersion(), false) }, "MATCH_CURRENT/3"},
			"the current one disabled": {func(x *subject, _ rotated) {
				x.patch(func(p *vault.Patch) { p.Enabled = false })
				x.clock.advance(pastBound)
			}, noMatch},
			"outside write": {func(x *subject, _ rotated) {
				x.setOutside("abc")
				x.clock.advance(pastBound)
			}, noMatch},
			"outside write, looked up": {func(x *subject, _ rotated) {
				x.setOutside("abc")
				x.clock.advance(2 * time.Second)
				x.wantVerify("abc", "MATCH_CURRENT/0")
			}, noMatch},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				x, before := start(t).instance(t, "demo", "active")
				r := x.nextToken(6 * time.Hour)
				x.clock.advance(time.Second)
				x.wantVerify(before, "MATCH_PREVIOUS/2 for 5h59m59s")
				tt.end(x, r)
				for range 2 {
					x.wantVerify(before, noMatch)
					x.wantVerify(r.GetValue(), tt.current)
					x.cold()
				}
				if name == "disabled by a person" { // it is honoured while it is enabled
					x.enable(r.GetPrevious().GetVersion(), true)
					if got := x.verify(before); !strings.HasPrefix(got, "MATCH_PREVIOUS/") {
						t.Errorf("enabled again: got %s, want MATCH_PREVIOUS", got)
					}
				}
			})
		}
	})
}

// TestVerifyTokensFromOutside: they may have any form of a b64token, and only the
// very same token matches.
func TestVerifyTokensFromOutside(t *testing.T) {
	t.Parallel()
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		x := start(t).token(t, "demo")
		for _, token := range []string{"a", "a==", "AZaz09-._~+/", "AZaz09-._~+/=", "exto_rt", "a" + strings.Repeat("/", 4095), secret.MintToken().Reveal()} {
			x.setOutside(token)
			x.clock.advance(pastBound)
			x.wantVerify(token, "MATCH_CURRENT/0")
			for _, near := range []string{token + "=", token[:len(token)-1] + "-", "b" + token[1:], strings.ToLower(token), strings.ToUpper(token)} {
				if near != token {
					x.wantVerify(near, noMatch)
				}
			}
		}
	})
}

// TestVerifyWhatIsNoToken costs no request to the vault, whatever is remembered.
func TestVerifyWhatIsNoToken(t *testing.T) {
	t.Parallel()
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		x, token := start(t).instance(t, "demo", "active")
		unknown := x.token(t, "unknown")
		x.cold()
		unknown.reconnect()
		for when, prepare := range []func(){func() {}, func() {
			x.wantVerify(token, "MATCH_CURRENT/2")
			x.clock.advance(3 * time.Second)
		}} {
			prepare()
			for _, form := range []string{
				" ", "=", "====", "a=b", "=a", "a b", "a\n", "\x00", token + " ", " " + token, token + "\n", token + "\x00", "Bearer " + token,
				"é", "\ufeff" + token, token + "\u200b", "\u202e" + token, "\uff41\uff42", "e\u0301", "\U0001f511", "a\u00a0", "\ufffd", strings.Repeat("é", 3000),
				strings.Repeat("a", 4097), strings.Repeat("a", 60_000), "exto_rt_", "exto_rt_abc", token[:20] + "." + token[21:], token[:len(token)-1], token + "0", token + "=",
			} {
				for _, y := range []*subject{x, unknown} {
					if got := y.lookups(func() { y.wantVerify(form, noMatch) }); len(got) > 0 {
						t.Errorf("%d, %.12q: the vault was asked for %v", when, form, got)
					}
				}
			}
		}
		x.setOutside("not a b64token")
		x.clock.advance(pastBound)
		x.wantVerify("not a b64token", noMatch)
	})
}

func TestVerifyBadInput(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	c := s.as(consoleAPI)
	for id, token := range map[string]string{"demo": "", "": wrong, "Demo": wrong, "demo-dburi": wrong, "demo-oidc-secret": wrong, "../demo": wrong, "démo": wrong, strings.Repeat("a", 101): wrong} {
		reason, field := secret.InvalidInstanceID, "instance_id"
		if token == "" {
			reason, field = secret.InvalidValue, "token"
		}
		_, err := c.VerifyToken(callContext(t), &secretsv1.VerifyTokenRequest{InstanceId: id, Token: token})
		if f := failed(t, err); f.code != codes.InvalidArgument || f.reason != reason || f.field != field || f.commit != "" {
			t.Errorf("%.20q, %q: got %v of field %q, want %s of %s", id, token, err, f.field, reason, field)
		}
	}
	in := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "demo")
	in = protowire.AppendString(protowire.AppendTag(in, 2, protowire.BytesType), "a\xff")
	var out []byte
	conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI)))
	err := conn.Invoke(callContext(t), secretsv1.SecretsBrokerService_VerifyToken_FullMethodName, in, &out, grpc.ForceCodec(bytesCodec{}))
	if f := failed(t, err); f.code != codes.Internal || len(f.status.Details()) > 0 {
		t.Errorf("not UTF-8: got %v, want INTERNAL without details", err)
	}
	if calls := s.vault.Calls(); len(calls) > 0 {
		t.Errorf("the vault was asked: %v", calls)
	}
}

// TestVerifyKnowsWhatTheBrokerWrote: at once and without asking, even while an answer
// from before is on its way.
func TestVerifyKnowsWhatTheBrokerWrote(t *testing.T) {
	t.Parallel()
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		for name, tt := range map[string]struct {
			state       string
			write       func(x *subject) string // gives the token that is to be current
			before, now string
		}{
			"rotate":            {"active", func(x *subject) string { return x.nextToken(0).GetValue() }, noMatch, "MATCH_CURRENT/3"},
			"rotate with grace": {"active", func(x *subject) string { return x.nextToken(time.Hour).GetValue() }, "MATCH_PREVIOUS/2 for ", "MATCH_CURRENT/3"},
			"first rotate":      {"absent", func(x *subject) string { return x.nextToken(0).GetValue() }, noMatch, "MATCH_CURRENT/1"},
			"rotate of deleted": {"deleted", func(x *subject) string { return x.nextToken(time.Hour).GetValue() }, noMatch, "MATCH_CURRENT/3"},
			"put":               {"active", func(x *subject) string { return x.putToken("abc") }, noMatch, "MATCH_CURRENT/3"},
			"put over outside":  {"outside", func(x *subject) string { return x.putToken("abc") }, noMatch, "MATCH_CURRENT/3"},
			"delete":            {"active", func(x *subject) string { x.delete(); return wrong }, noMatch, noMatch},
			"recover":           {"deleted", func(x *subject) string { x.further(1); return wrong }, "MATCH_CURRENT/2", noMatch},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				x, before := start(t).instance(t, "demo", tt.state)
				x.cold()
				answered, arrive := make(chan struct{}), make(chan struct{})
				release := sync.OnceFunc(func() { close(arrive) })
				t.Cleanup(release)
				var first atomic.Bool
				x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
					if op == "Get" && first.CompareAndSwap(false, true) {
						close(answered)
						<-arrive
					}
					return err
				})
				slow := make(chan string, 1)
				go func() { slow <- x.verify(before) }()
				<-answered
				token := tt.write(x)
				check := func() {
					t.Helper()
					x.wantVerify(token, tt.now)
					if got := x.verify(before); !strings.HasPrefix(got, tt.before) {
						t.Errorf("the token before: got %s, want %s", got, tt.before)
					}
					x.wantVerify(wrong, noMatch)
				}
				// The vault's answer to a recover does not have the value.
				if got := x.lookups(check); len(got) > 0 && name != "recover" {
					t.Errorf("the vault was asked for %v", got)
				}
				release()
				<-slow
				check()
			})
		}
	})
}

// TestTokensAreNotShown in the log of everything, in answers or in metrics.
func TestTokensAreNotShown(t *testing.T) {
	notRacing(t)
	t.Parallel()
	s := newSystem(t)
	var metrics *prometheus.Registry
	s.config = func(c *server.Config) { metrics = c.Metrics.(*prometheus.Registry) }
	s.startEmbedded()
	x := s.token(t, "demo")
	tokens := []string{x.nextToken(0).GetValue(), x.nextToken(time.Hour).GetValue(), "Wrong-Kk3Jj5Hh7Gg9", "exto_rt_Ll2Pp4Oo6Ii8", "no token: Zz1Xx3Cc5", "From-Outside-Mm4Nn6Bb8"}
	x.setOutside(tokens[5])
	var told strings.Builder
	for _, fails := range []error{nil, vault.ErrUnavailable, vault.ErrRefused} {
		x.vault.SetBefore(func(context.Context, string, secret.Key) error { return fails })
		for _, token := range tokens {
			x.clock.advance(pastBound)
			for _, id := range []string{"demo", "unknown", "Bad", token} {
				out, err := x.c.VerifyToken(x.ctx, &secretsv1.VerifyTokenRequest{InstanceId: id, Token: token})
				fmt.Fprintln(&told, out, err)
				if err != nil {
					told.WriteString(everythingOf(failed(t, err).status))
				}
			}
		}
	}
	families, err := metrics.Gather()
	log := x.log.String()
	if err != nil || len(families) == 0 || !contains(log, "VerifyToken") || !contains(told.String(), "VAULT_REFUSED") {
		t.Fatalf("nothing was tested: %v", err)
	}
	for where, text := range map[string]string{"log": log, "answers": told.String(), "metrics": fmt.Sprint(families)} {
		for _, token := range tokens {
			for form, s := range encodings(token) {
				if contains(strings.ToLower(text), strings.ToLower(s)) {
					t.Errorf("the %s show a token (%.12s…), %s", where, token, form)
				}
			}
		}
	}
}

// TestWhoMayVerify: it takes the permission for registration tokens of the instance.
func TestWhoMayVerify(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	for name, rule := range map[string]string{
		"uris":               "allow: [verify]\n    kinds: [DATABASE_URI]",
		"tokens":             "allow: [verify]\n    kinds: [REGISTRATION_TOKEN]",
		"one":                "allow: [verify]\n    instances: [demo]",
		"node/{instance_id}": "allow: [verify]",
		"reader":             "allow: [get]\n    kinds: [REGISTRATION_TOKEN]",
		"two":                "allow: [verify]\n    kinds: [OIDC_CLIENT_SECRET]\n  - identity: spiffe://console.exto/two\n    allow: [get]",
	} {
		s.policy += "  - identity: spiffe://console.exto/" + name + "\n    " + rule + "\n"
	}
	s.startEmbedded()
	x, token := s.instance(t, "demo", "active")
	y := s.token(t, "unknown")
	const yes, no = "MATCH_CURRENT/2", string(secret.CallerNotAllowed)
	for caller, want := range map[string]string{ // of demo, and of an instance that there is not
		consoleAPI: yes + " " + noMatch, "tokens": yes + " " + noMatch, "one": yes + " " + no, "node/demo": yes + " " + no, "node/unknown": no + " " + noMatch,
		"uris": no + " " + no, "reader": no + " " + no, "two": no + " " + no, worker: no + " " + no, instanceDemo: no + " " + no, operator: no + " " + no,
	} {
		x.c = s.as(caller)
		y.c = x.c
		if got := x.verify(token) + " " + y.verify(token); got != want {
			t.Errorf("%s: got %s, want %s", caller, got, want)
		}
	}
}

func TestVerifyNoop(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.startOn(noop.New(s.logger()))
	x := s.token(t, "demo")
	token := x.nextToken(time.Hour).GetValue()
	warned := strings.Count(s.log.String(), "the noop secret store keeps nothing")
	x.wantVerify(token, noMatch)
	if strings.Count(s.log.String(), "the noop secret store keeps nothing") == warned {
		t.Error("the log does not warn")
	}
}
