package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

const (
	fromVault  = secretsv1.FreshnessSource_FRESHNESS_SOURCE_LIVE
	fromMemory = secretsv1.FreshnessSource_FRESHNESS_SOURCE_CACHE
	stale      = secretsv1.FreshnessSource_FRESHNESS_SOURCE_STALE_ON_ERROR
)

// remembered is a secret that a broker with short bounds keeps in memory.
type remembered struct {
	*cloud
	ctx        context.Context
	p          *process
	api        secretsv1.SecretsBrokerServiceClient
	kind       secretsv1.SecretKind
	ttl, stale time.Duration
}

const rememberedToken = "token-of-the-first-day"

// remember runs a broker that has read a token of the instance demo.
func remember(t *testing.T, ttl, stale time.Duration) *remembered {
	t.Helper()
	r := &remembered{cloud: secretCloud(t, devFolder(t), keyvaultfake.Config{}), ctx: callContext(t), kind: tokenKind, ttl: ttl, stale: stale}
	r.PersonSet("instance-demo", rememberedToken, nil)
	r.p = r.start("BROKER_CACHE_TTL", ttl.String(), "BROKER_STALE_ON_ERROR", stale.String())
	r.api = r.p.as("console-api")
	r.want(rememberedToken, fromVault)
	return r
}

// betweenReads is how long who reads again and again lets the broker do something else.
const betweenReads = 5 * time.Millisecond

// read is a default read, and when it began and ended.
func (r *remembered) read() (out *secretsv1.GetSecretResponse, began, ended time.Time, err error) {
	began = time.Now()
	out, err = r.api.GetSecret(r.ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", r.kind)})
	return out, began, time.Now(), err
}

// want checks a default read: what it gives, where from, and that it is not older than
// allowed.
func (r *remembered) want(value string, source secretsv1.FreshnessSource) time.Time {
	r.t.Helper()
	out, began, _, err := r.read()
	if err != nil || out.GetValue() != value || out.GetFreshness().GetSource() != source {
		r.t.Fatalf("got %v %v, %v, want %s from %v", out.GetMetadata(), out.GetFreshness(), err, value, source)
	}
	r.notTooOld(out, began)
	return out.GetFreshness().GetAsOf().AsTime()
}

// notTooOld checks the age of an answer that was asked for at some time.
func (r *remembered) notTooOld(out *secretsv1.GetSecretResponse, began time.Time) {
	r.t.Helper()
	bound := r.ttl // from the vault, too: it may have been asked for somebody else already
	if out.GetFreshness().GetSource() == stale {
		bound = r.stale
	}
	if oldest := began.Add(-bound); out.GetFreshness().GetAsOf().AsTime().Before(oldest) {
		r.t.Errorf("got %v at %v, want no older than %v", out.GetFreshness(), began.UTC(), bound)
	}
}

// until reads until an answer comes from source.
func (r *remembered) until(source secretsv1.FreshnessSource) *secretsv1.GetSecretResponse {
	r.t.Helper()
	for again := time.Tick(betweenReads); ; <-again {
		out, began, _, err := r.read()
		if r.ctx.Err() != nil {
			r.t.Fatalf("no answer %v: got %v, %v", source, out.GetFreshness(), err)
		}
		if err == nil {
			r.notTooOld(out, began)
			if out.GetFreshness().GetSource() == source {
				return out
			}
		}
	}
}

// verify checks what a token is said to be.
func (r *remembered) verify(token string, want secretsv1.VerifyResult) {
	r.t.Helper()
	out, err := r.api.VerifyToken(r.ctx, &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: token})
	if err != nil || out.GetResult() != want {
		r.t.Errorf("VerifyToken of %s: got %v, %v, want %v", token, out, err, want)
	}
}

const staleLine = `level=WARN msg="the vault cannot be reached: reads are answered from memory"`

// TestReadsGoOnInAnOutage: while the vault cannot be reached, what was read is served
// with its age, and no longer than may be. When the vault is back it is asked again.
func TestReadsGoOnInAnOutage(t *testing.T) {
	t.Parallel()
	for name, out := range map[string]func(*cloud, bool){
		"cut off":            func(c *cloud, out bool) { c.SetDown(out) },
		"errors":             func(c *cloud, out bool) { c.answer(out, http.StatusServiceUnavailable) },
		"no tokens any more": func(c *cloud, out bool) { c.SetTokenServiceDown(out); c.RevokeTokens() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := remember(t, 500*time.Millisecond, 6*time.Second)
			if strings.Contains(r.p.err.String(), staleLine) {
				t.Error("the log says that answers come from memory before an outage")
			}
			out(r.cloud, true)
			first := r.until(stale)
			asOf := first.GetFreshness().GetAsOf().AsTime()
			if first.GetValue() != rememberedToken {
				t.Errorf("got %v, want the value that was read", first.GetMetadata())
			}
			if again := r.want(rememberedToken, stale); !again.Equal(asOf) {
				t.Errorf("got as_of %v and then %v, want the same", asOf, again)
			}
			r.verify(rememberedToken, secretsv1.VerifyResult_VERIFY_RESULT_MATCH_CURRENT)
			r.verify("another", secretsv1.VerifyResult_VERIFY_RESULT_NO_MATCH)
			for _, bound := range []time.Duration{0, r.ttl} {
				_, err := r.api.GetSecret(r.ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", r.kind), MaxStaleness: durationpb.New(bound)})
				if reason, _ := told(err); reason != "STALENESS_UNSATISFIABLE" || status.Code(err) != codes.Unavailable {
					t.Errorf("no older than %v: got %v, want STALENESS_UNSATISFIABLE", bound, err)
				}
			}
			// Who allows more gets it, also now.
			wide := must2(r.api.GetSecret(r.ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", r.kind), MaxStaleness: durationpb.New(time.Minute)}))(t)
			if wide.GetFreshness().GetSource() != fromMemory || !wide.GetFreshness().GetAsOf().AsTime().Equal(asOf) {
				t.Errorf("no older than a minute: got %v, want it from memory", wide.GetFreshness())
			}
			for again := time.Tick(betweenReads); ; <-again {
				got, began, ended, err := r.read()
				if err == nil {
					if got.GetFreshness().GetSource() != stale || !got.GetFreshness().GetAsOf().AsTime().Equal(asOf) {
						t.Fatalf("got %v, want what was read at %v", got.GetFreshness(), asOf)
					}
					r.notTooOld(got, began)
					continue
				}
				if reason, _ := told(err); reason != "VAULT_UNAVAILABLE" || !ended.After(asOf.Add(r.stale)) {
					t.Fatalf("%v after the vault was asked: got %v, want VAULT_UNAVAILABLE, and not before %v", ended.Sub(asOf), err, r.stale)
				}
				break
			}
			if _, err := r.api.VerifyToken(r.ctx, &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: rememberedToken}); status.Code(err) != codes.Unavailable {
				t.Errorf("VerifyToken: got %v, want UNAVAILABLE", err)
			}
			if n := strings.Count(r.p.err.String(), staleLine); n != 1 {
				t.Errorf("the log says %d times that answers come from memory, want once: %s", n, r.p.err)
			}
			out(r.cloud, false)
			back := r.until(fromVault)
			if back.GetValue() != rememberedToken || !back.GetFreshness().GetAsOf().AsTime().After(asOf.Add(r.stale)) {
				t.Errorf("got %v, want it asked for anew", back.GetFreshness())
			}
		})
	}
}

// TestOutageThatEnds: the vault is asked again within its bound, and what it says then
// counts.
func TestOutageThatEnds(t *testing.T) {
	t.Parallel()
	r := remember(t, 300*time.Millisecond, time.Hour)
	r.SetDown(true)
	r.until(stale)
	r.PersonSet("instance-demo", "token-of-the-second-day", nil)
	r.SetDown(false)
	if out := r.until(fromVault); out.GetValue() != "token-of-the-second-day" {
		t.Errorf("got %v, want what is there now", out.GetMetadata())
	}
	r.verify("token-of-the-second-day", secretsv1.VerifyResult_VERIFY_RESULT_MATCH_CURRENT)
	r.verify(rememberedToken, secretsv1.VerifyResult_VERIFY_RESULT_NO_MATCH)
	// What the broker may not have any more is not served, not even in an outage.
	r.Revoke(r.Broker())
	for again := time.Tick(betweenReads); ; <-again {
		out, began, _, err := r.read()
		if err != nil {
			if reason, _ := told(err); reason != "VAULT_REFUSED" {
				t.Errorf("got %v, want VAULT_REFUSED", err)
			}
			break
		}
		if r.notTooOld(out, began); out.GetFreshness().GetSource() == stale {
			t.Fatalf("got %v, want nothing stale from a vault that refuses", out.GetFreshness())
		}
	}
	r.SetDown(true)
	if out, _, _, err := r.read(); err == nil {
		t.Errorf("got %v, want nothing that was refused since", out.GetFreshness())
	}
}

// TestNoStaleAnswers: with no allowance an outage ends the reads with the bound.
func TestNoStaleAnswers(t *testing.T) {
	t.Parallel()
	r := remember(t, 300*time.Millisecond, 0)
	r.SetDown(true)
	for again := time.Tick(betweenReads); ; <-again {
		out, began, ended, err := r.read()
		if err != nil {
			if reason, _ := told(err); reason != "VAULT_UNAVAILABLE" {
				t.Errorf("got %v after %v, want VAULT_UNAVAILABLE", err, ended.Sub(began))
			}
			return
		}
		if r.notTooOld(out, began); out.GetFreshness().GetSource() != fromMemory {
			t.Fatalf("got %v in an outage", out.GetFreshness())
		}
	}
}

// TestStoppedProcess: what a process remembers grows old while it is stopped.
func TestStoppedProcess(t *testing.T) {
	t.Parallel()
	const ttl = time.Second
	for name, outage := range map[string]bool{"with the vault": false, "in an outage": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bound := 10 * ttl
			if outage {
				bound = 2 * ttl
			}
			r := remember(t, ttl, bound)
			signal := func(sig syscall.Signal) {
				if err := r.p.cmd.Process.Signal(sig); err != nil {
					t.Fatal(err)
				}
			}
			signal(syscall.SIGSTOP)
			r.PersonSet("instance-demo", "token-of-the-second-day", nil)
			r.SetDown(outage)
			// It does not answer, for longer than it may remember.
			short, cancel := context.WithTimeout(r.ctx, 3*ttl)
			defer cancel()
			if _, err := r.api.ListSecrets(short, &secretsv1.ListSecretsRequest{InstanceId: "other"}); status.Code(err) != codes.DeadlineExceeded {
				t.Fatalf("got %v of a process that is stopped, want DEADLINE_EXCEEDED", err)
			}
			signal(syscall.SIGCONT)
			if outage {
				if _, _, _, err := r.read(); err == nil {
					t.Error("got an answer that is older than any bound")
				} else if reason, _ := told(err); reason != "VAULT_UNAVAILABLE" {
					t.Errorf("got %v, want VAULT_UNAVAILABLE", err)
				}
				return
			}
			r.want("token-of-the-second-day", fromVault)
			r.verify(rememberedToken, secretsv1.VerifyResult_VERIFY_RESULT_NO_MATCH)
			r.verify("token-of-the-second-day", secretsv1.VerifyResult_VERIFY_RESULT_MATCH_CURRENT)
		})
	}
}

// TestBadBounds: a start with a bound that makes no sense ends with one line.
func TestBadBounds(t *testing.T) {
	t.Parallel()
	dir := devFolder(t)
	for variable, values := range map[string][]string{
		"BROKER_CACHE_TTL":      {"0s", "0", "-1s", "soon", "30"},
		"BROKER_STALE_ON_ERROR": {"-1s", "-1ns", "long", "15"},
	} {
		for _, value := range values {
			for _, args := range [][]string{{}, {fmt.Sprintf("--%s=%s", flagOf(variable), value)}} {
				t.Run(fmt.Sprint(variable, "=", value, args), func(t *testing.T) {
					t.Parallel()
					env := environ(settings(dir), variable, value, "SECRET_STORE_PROVIDER", "noop")
					if len(args) > 0 {
						env = environ(settings(dir), "SECRET_STORE_PROVIDER", "noop")
					}
					code, stdout, stderr := runBroker(t, dir, env, append([]string{"serve"}, args...)...)
					if code != 1 || stdout != "" || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, variable) || !strings.Contains(stderr, "set it to") {
						t.Errorf("got exit code %d, standard output %q and standard error %q, want 1 and one line that names %s", code, stdout, stderr, variable)
					}
				})
			}
		}
	}
}

// flagOf is the flag of a variable.
func flagOf(variable string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(variable, "BROKER_")), "_", "-")
}
