package server_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
)

// out makes all calls of the vault end with err; nil: no more.
func (x *subject) out(err error) {
	x.vault.SetBefore(func(context.Context, string, secret.Key) error { return err })
}

// TestOutage: who named no bound gets the value for 15 minutes more, who named one
// gets nothing older; and whatever was set for the broker counts.
func TestOutage(t *testing.T) {
	notRacing(t)
	t.Parallel()
	onEachVault(t, testOutage)
}

func testOutage(t *testing.T, start func(*testing.T) *system) {
	type row struct {
		max, age time.Duration
		source   secretsv1.FreshnessSource // 0: refused
		reason   secret.Reason             // "": that of the outage
	}
	always := []row{
		{0, 0, 0, secret.StalenessUnsatisfiable},
		{10 * time.Second, 10 * time.Second, fromMemory, ""},
		{10 * time.Second, 10*time.Second + 1, 0, secret.StalenessUnsatisfiable},
		{2 * time.Minute, 2 * time.Minute, fromMemory, ""},
		{2 * time.Minute, 2*time.Minute + 1, 0, secret.StalenessUnsatisfiable},
	}
	for name, test := range map[string]struct {
		ttl, stale time.Duration
		rows       []row
	}{
		"as it comes": {0, 0, []row{
			{byDefault, 30 * time.Second, fromMemory, ""},
			{byDefault, 30*time.Second + 1, inOutage, ""},
			{byDefault, 15 * time.Minute, inOutage, ""},
			{byDefault, 15*time.Minute + 1, 0, ""},
		}},
		"set": {10 * time.Second, time.Minute, []row{
			{byDefault, 10 * time.Second, fromMemory, ""},
			{byDefault, 10*time.Second + 1, inOutage, ""},
			{byDefault, time.Minute, inOutage, ""},
			{byDefault, time.Minute + 1, 0, ""},
		}},
		"never": {0, broker.NoStaleOnError, []row{
			{byDefault, 30 * time.Second, fromMemory, ""},
			{byDefault, 30*time.Second + 1, 0, ""},
		}},
	} {
		for outage, reason := range map[error]secret.Reason{vault.ErrUnavailable: secret.VaultUnavailable, vault.ErrThrottled: secret.VaultThrottled} {
			t.Run(fmt.Sprint(name, ", ", reason), func(t *testing.T) {
				t.Parallel()
				s := start(t)
				s.heart = func(c *broker.Config) { c.CacheTTL, c.StaleOnError = test.ttl, test.stale }
				s.restart()
				x := s.in(t, "demo", "active")
				for _, row := range append(always, test.rows...) {
					for _, version := range []string{"", x.current} {
						asOf := x.look()
						x.out(outage)
						x.clock.advance(row.age)
						if row.source != 0 {
							x.wantFrom(row.max, version, uri(2), row.source, asOf)
						} else {
							x.wantNo(row.max, version, secret.Reason(or(string(row.reason), string(reason))))
						}
						x.vault.SetBefore(nil)
						x.clock.advance(time.Minute)
						out, err := x.getWithin(byDefault, version) // the first one after it
						if f := out.GetFreshness(); err != nil || f.GetSource() == inOutage || !f.GetAsOf().AsTime().Equal(x.clock.Now()) {
							t.Fatalf("got %v, %v when the vault is back", f, err)
						}
					}
				}
			})
		}
	}
}

// TestBoundOfWhatWasNeverRead: what a caller that sets a bound is told of an outage does
// not depend on what memory holds.
func TestBoundOfWhatWasNeverRead(t *testing.T) {
	t.Parallel()
	for outage, reason := range map[error]secret.Reason{vault.ErrUnavailable: secret.VaultUnavailable, vault.ErrThrottled: secret.VaultThrottled} {
		x := startSystem(t).in(t, "demo", "absent")
		x.out(outage)
		for max, want := range map[time.Duration]secret.Reason{byDefault: reason, 0: secret.StalenessUnsatisfiable, time.Hour: secret.StalenessUnsatisfiable} {
			_, err := x.getWithin(max, "")
			wantReason(t, err, want, "")
		}
	}
}

// TestDeletionBeatsEveryAllowance, and so does one of which nobody knows yet whether
// it happened.
func TestDeletionBeatsEveryAllowance(t *testing.T) {
	t.Parallel()
	onEachVault(t, testDeletionBeatsEveryAllowance)
}

func testDeletionBeatsEveryAllowance(t *testing.T, start func(*testing.T) *system) {
	personDeletes := func(x *subject) {
		if _, err := x.store.Delete(x.ctx, x.key); err != nil {
			x.t.Fatal(err)
		}
		x.settle()
	}
	for name, remove := range map[string]func(x *subject){
		"deleted": func(x *subject) { x.delete() },
		"cut off": func(x *subject) {
			x.failing("Delete")
			x.hurried.Store(true)
			wantReason(x.t, writeCalls["delete"](x, x.ctx, ""), secret.VaultUnavailable, secret.Applied)
		},
		"unknown": func(x *subject) {
			x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
				if op == "Update" {
					x.out(vault.ErrUnavailable)
					return vault.Uncertain(vault.ErrUnavailable)
				}
				return err
			})
			x.hurried.Store(true)
			wantReason(x.t, writeCalls["delete"](x, x.ctx, ""), secret.VaultUnavailable, secret.Unknown)
		},
		"by a person": func(x *subject) {
			personDeletes(x)
			x.wantNo(0, "", secret.SecretNotFound)
		},
		"by a person, seen by a put": func(x *subject) {
			personDeletes(x)
			x.failing("Recover")
			x.hurried.Store(true)
			wantReason(x.t, writeCalls["put"](x, x.ctx, ""), secret.VaultUnavailable, secret.NotApplied)
		},
		"by a person, described": func(x *subject) {
			personDeletes(x)
			if o := operations["describe"](x); o.m.GetState() != deleted {
				x.t.Fatalf("got %v, %v", o.m, o.err)
			}
		},
	} {
		for _, outage := range []error{nil, vault.ErrUnavailable} {
			t.Run(fmt.Sprint(name, ", ", outage), func(t *testing.T) {
				t.Parallel()
				x := start(t).in(t, "demo", "active")
				x.look()
				remove(x)
				x.out(outage)
				reasons := []secret.Reason{secret.SecretNotFound}
				if outage != nil {
					reasons = append(reasons, secret.VaultUnavailable)
				}
				for _, later := range []time.Duration{0, 6 * time.Second, time.Minute, 10 * time.Minute} {
					x.clock.advance(later)
					for _, max := range []time.Duration{byDefault, time.Hour} {
						for _, version := range []string{"", x.current, x.first} {
							x.wantNo(max, version, reasons...)
						}
					}
				}
			})
		}
	}
}

// TestGraceEndBeatsEveryAllowance: until its very end the replaced version comes from
// memory, and then from nowhere.
func TestGraceEndBeatsEveryAllowance(t *testing.T) {
	t.Parallel()
	onEachVault(t, testGraceEndBeatsEveryAllowance)
}

func testGraceEndBeatsEveryAllowance(t *testing.T, start func(*testing.T) *system) {
	for name, restarted := range map[string]bool{"rotated by it": false, "read by it": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", "active")
			x.rotateGrace(3, 10*time.Minute)
			asOf := x.clock.Now()
			if restarted {
				x.restart()
				x.reconnect()
				x.wantFrom(byDefault, x.current, uri(2), fromVault, asOf)
			}
			x.out(vault.ErrUnavailable)
			x.wantFrom(byDefault, x.current, uri(2), fromMemory, asOf)
			x.clock.advance(10*time.Minute - 1)
			x.wantFrom(byDefault, x.current, uri(2), inOutage, asOf)
			x.wantFrom(time.Hour, x.current, uri(2), fromMemory, asOf)
			x.clock.advance(1)
			x.wantNo(byDefault, x.current, secret.VersionExpired)
			x.wantNo(time.Hour, x.current, secret.VersionExpired)
			x.wantFrom(time.Hour, "", uri(3), fromMemory, asOf)
			x.vault.SetBefore(nil)
			x.wantNo(0, x.current, secret.VersionExpired)
			x.rotateGrace(4, 0) // without any
			x.wantNo(time.Hour, x.current, secret.VersionExpired)
		})
	}
}

// TestGraceThatEndsEarlyIsNotRemembered: a put, or a delete with a recover, ends it.
func TestGraceThatEndsEarlyIsNotRemembered(t *testing.T) {
	t.Parallel()
	onEachVault(t, testGraceThatEndsEarlyIsNotRemembered)
}

func testGraceThatEndsEarlyIsNotRemembered(t *testing.T, start func(*testing.T) *system) {
	for name, end := range map[string]func(x *subject) error{
		"put":                   func(x *subject) error { return operations["put"](x).err },
		"rotate":                func(x *subject) error { return operations["rotate"](x).err },
		"deleted and recovered": func(x *subject) error { x.delete(); return operations["recover"](x).err },
		"a person's put, seen": func(x *subject) error {
			x.person(uri(4))
			_, err := x.getWithin(0, "")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", "active")
			x.rotateGrace(5, time.Hour)
			x.wantFrom(byDefault, x.current, uri(2), fromMemory, x.clock.Now())
			x.clock.advance(time.Second)
			if err := end(x); err != nil {
				t.Fatal(err)
			}
			for _, version := range []string{x.current, "", x.current} { // the read between remembers what is current
				if version == "" {
					_, _ = x.getWithin(0, "")
					continue
				}
				x.wantNo(time.Hour, version, secret.VersionExpired)
				x.wantNo(byDefault, version, secret.VersionExpired)
			}
			x.clock.advance(time.Minute)
			x.out(vault.ErrUnavailable)
			x.wantNo(byDefault, x.current, secret.VersionExpired, secret.VaultUnavailable)
			x.wantNo(time.Hour, x.current, secret.VersionExpired, secret.StalenessUnsatisfiable)
		})
	}
}

// TestKeyVaultCannotBeReached: in whichever way, the value is served from memory,
// and from the vault as soon as that is back.
func TestKeyVaultCannotBeReached(t *testing.T) {
	t.Parallel()
	answer := func(op keyvaultfake.Op, status int) func(*subject) {
		return func(x *subject) {
			if op == keyvaultfake.OpToken {
				x.fake.ExpireTokens()
			}
			x.fake.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
				if r.Op == op {
					return keyvaultfake.Fault{Status: status}
				}
				return keyvaultfake.Fault{}
			})
		}
	}
	for name, test := range map[string]struct {
		broken func(*subject)
		slow   bool // a while passes until the vault is asked again
	}{
		"down": {func(x *subject) { x.fake.SetDown(true) }, false},
		"500":  {answer(keyvaultfake.OpGet, 500), false},
		"503":  {answer(keyvaultfake.OpGet, 503), false},
		"429":  {answer(keyvaultfake.OpGet, 429), true},
		"no token service": {func(x *subject) {
			x.fake.ExpireTokens()
			x.fake.SetTokenServiceDown(true)
		}, true},
		"token service 500": {answer(keyvaultfake.OpToken, 500), true},
		"token service 429": {answer(keyvaultfake.OpToken, 429), true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := startKeyVault(t).in(t, "demo", "active")
			asOf := x.look()
			x.clock.advance(time.Minute)
			test.broken(x)
			x.wantFrom(byDefault, "", uri(2), inOutage, asOf)
			x.wantFrom(10*time.Minute, "", uri(2), fromMemory, asOf)
			x.fake.OnRequest(nil)
			x.fake.SetDown(false)
			x.fake.SetTokenServiceDown(false)
			for {
				out, err := x.getWithin(byDefault, "")
				if err != nil || out.GetValue() != uri(2) {
					t.Fatalf("got %v, %v, want the value", out.GetFreshness(), err)
				}
				if source := out.GetFreshness().GetSource(); source != inOutage {
					break
				} else if !test.slow {
					t.Fatalf("got %v when the vault is back", source)
				}
			}
		})
	}
}

// TestKeyVaultRefuses: an answer is no outage. It is told at once, and what was
// remembered is not served any more, whatever becomes of the vault.
func TestKeyVaultRefuses(t *testing.T) {
	notRacing(t)
	t.Parallel()
	fault := func(op keyvaultfake.Op, f keyvaultfake.Fault) func(*subject) {
		return func(x *subject) {
			x.fake.ExpireTokens()
			x.fake.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
				if r.Op == op && !r.Challenge {
					return f
				}
				return keyvaultfake.Fault{}
			})
		}
	}
	get := func(x *subject) error { _, err := x.getWithin(byDefault, ""); return err }
	revoke := func(x *subject) { x.fake.Revoke(x.fake.Broker()) }
	for name, test := range map[string]struct {
		refuse func(*subject)
		call   func(*subject) error
		reason secret.Reason
	}{
		"403":              {revoke, get, secret.VaultRefused},
		"401":              {fault(keyvaultfake.OpGet, keyvaultfake.Fault{Status: 401}), get, secret.VaultRefused},
		"token refused":    {fault(keyvaultfake.OpToken, keyvaultfake.Fault{Status: 401, Inner: "invalid_client"}), get, secret.VaultRefused},
		"403 to a version": {revoke, func(x *subject) error { _, err := x.getWithin(0, x.first); return err }, secret.VaultRefused},
		"403 to a put":     {revoke, func(x *subject) error { return writeCalls["put"](x, x.ctx, "") }, secret.VaultRefused},
		"403 to describe":  {revoke, func(x *subject) error { return operations["describe"](x).err }, secret.VaultRefused},
		"deleted":          {func(x *subject) { x.fake.PersonDelete(x.key.String()) }, get, secret.SecretNotFound},
		"disabled":         {func(x *subject) { x.fake.PersonUpdate(x.key.String(), "", false, nil) }, get, secret.SecretDisabled},
		"purged": {func(x *subject) {
			x.fake.PersonDelete(x.key.String())
			x.settle()
			x.fake.PersonPurge(x.key.String())
		}, get, secret.SecretNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := startKeyVault(t).in(t, "demo", "active")
			x.look()
			x.clock.advance(time.Minute)
			test.refuse(x)
			if f := failed(t, test.call(x)); f.reason != test.reason {
				t.Fatalf("got %v, want %s", f.status, test.reason)
			}
			x.fake.SetDown(true)
			x.clock.advance(6 * time.Second)
			for _, max := range []time.Duration{byDefault, 10 * time.Minute} {
				x.wantNo(max, "", secret.VaultUnavailable, secret.VaultRefused, test.reason)
			}
		})
	}
}

// TestWritesInAnOutage: what was written is served as what was read is, and a write
// that was not applied takes nothing from memory.
func TestWritesInAnOutage(t *testing.T) {
	t.Parallel()
	onEachVault(t, testWritesInAnOutage)
}

func testWritesInAnOutage(t *testing.T, start func(*testing.T) *system) {
	for name, value := range map[string]string{"put": uri(3), "rotate": uri(3), "refused put": uri(2), "refused delete": uri(2)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", "active")
			asOf := x.look()
			if write, refused := strings.CutPrefix(name, "refused "); refused {
				x.failing("Set", "Update")
				x.hurried.Store(true)
				wantReason(t, writeCalls[write](x, x.ctx, ""), secret.VaultUnavailable, secret.NotApplied)
			} else if err := writeCalls[write](x, x.ctx, ""); err != nil {
				t.Fatal(err)
			}
			x.clock.advance(time.Minute)
			x.out(vault.ErrUnavailable)
			x.wantFrom(byDefault, "", value, inOutage, asOf)
		})
	}
}

// TestReadBudgetIsSpent: then what is remembered is served, as in an outage.
func TestReadBudgetIsSpent(t *testing.T) {
	t.Parallel()
	s := startKeyVault(t)
	reads := s.shortOfReads(1)
	x := s.cold(t, "demo")
	asOf := x.look()
	ctx, leave := context.WithCancel(x.ctx)
	var others sync.WaitGroup
	defer others.Wait()
	defer leave()
	for _, id := range []string{"a", "b", "c", "d", "e"} { // who have the next turns
		other := s.as("instance/" + id)
		others.Go(func() { _, _ = other.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref(id, uriKind)}) })
	}
	reads.placed.await(x, 6, "reads that wait")
	s.clock.advance(time.Minute)
	x.wantFrom(byDefault, "", uri(2), inOutage, asOf)
}

// TestVaultHangs: nobody who can be answered from memory waits for it until his
// deadline.
func TestVaultHangs(t *testing.T) {
	t.Parallel()
	onEachVault(t, testVaultHangs)
}

func testVaultHangs(t *testing.T, start func(*testing.T) *system) {
	s := start(t)
	x, off := s.in(t, "demo", "active"), s.in(t, "off", "disabled")
	off.wantNo(0, "", secret.SecretDisabled)
	asOf := x.look()
	x.clock.advance(time.Minute)
	x.person(uri(3))
	reached, release := x.hang("Get", false)
	patient := make(chan error, 2)
	ctx, cancel := context.WithTimeout(x.ctx, 20*time.Second)
	defer cancel()
	wait := func(in *secretsv1.GetSecretRequest) {
		go func() {
			_, err := x.c.GetSecret(ctx, in)
			patient <- err
		}()
	}
	wait(&secretsv1.GetSecretRequest{Ref: off.ref}) // it has nothing to fall back on
	<-reached
	x.wantFrom(byDefault, "", uri(2), inOutage, asOf)
	x.wantFrom(byDefault, x.current, uri(2), inOutage, asOf)
	x.wantFrom(byDefault, "", uri(2), inOutage, asOf)
	select {
	case err := <-patient:
		t.Errorf("got %v while the vault hangs, want it to wait for the vault", err)
	default:
	}
	release()
	out, err := x.getWithin(byDefault, "")
	if err != nil || out.GetValue() != uri(3) || out.GetFreshness().GetSource() == inOutage {
		t.Errorf("got %q, %v, %v when the vault is back", out.GetValue(), out.GetFreshness(), err)
	}
}
