package server_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

const (
	fromVault  = secretsv1.FreshnessSource_FRESHNESS_SOURCE_LIVE
	fromMemory = secretsv1.FreshnessSource_FRESHNESS_SOURCE_CACHE
	inOutage   = secretsv1.FreshnessSource_FRESHNESS_SOURCE_STALE_ON_ERROR
	// byDefault is the bound of a read that names none.
	byDefault = time.Duration(-1)
)

// getWithin is a Get with a bound.
func (x *subject) getWithin(max time.Duration, version string) (*secretsv1.GetSecretResponse, error) {
	in := &secretsv1.GetSecretRequest{Ref: x.ref, Version: version}
	if max != byDefault {
		in.MaxStaleness = durationpb.New(max)
	}
	return x.c.GetSecret(x.ctx, in)
}

// wantFrom checks what a Get with a bound gives, where that comes from and of when
// it is.
func (x *subject) wantFrom(max time.Duration, version, value string, source secretsv1.FreshnessSource, asOf time.Time) {
	x.t.Helper()
	out, err := x.getWithin(max, version)
	if f := out.GetFreshness(); err != nil || out.GetValue() != value || f.GetSource() != source || !f.GetAsOf().AsTime().Equal(asOf) {
		x.t.Fatalf("got %q, %v as of %v, %v; want %q, %v as of %v", out.GetValue(), f.GetSource(), f.GetAsOf().AsTime(), err, value, source, asOf)
	}
}

// wantNo checks that a Get with a bound gives no value, for one of these reasons.
func (x *subject) wantNo(max time.Duration, version string, reasons ...secret.Reason) {
	x.t.Helper()
	if max != byDefault { // a bound of the caller's, which an outage keeps from being met
		reasons = slices.Clone(reasons)
		for i, reason := range reasons {
			if reason == secret.VaultUnavailable || reason == secret.VaultThrottled {
				reasons[i] = secret.StalenessUnsatisfiable
			}
		}
	}
	out, err := x.getWithin(max, version)
	if err == nil {
		x.t.Fatalf("got %q, %v, want none of %v", out.GetValue(), out.GetFreshness(), reasons)
	}
	if !slices.Contains(reasons, failed(x.t, err).reason) {
		x.t.Fatalf("got %v, want one of %v", err, reasons)
	}
}

// look reads the secret in the vault, as of the time that it gives.
func (x *subject) look() time.Time {
	x.t.Helper()
	now := x.clock.Now()
	x.wantFrom(0, "", uri(2), fromVault, now)
	return now
}

// looks counts the vault calls about the secret.
func (x *subject) looks() int {
	n := 0
	for _, call := range x.vault.Calls() {
		if strings.HasSuffix(call, " "+x.key.String()) {
			n++
		}
	}
	return n
}

// person changes the value in the vault, at this moment.
func (x *subject) person(value string) {
	x.t.Helper()
	if _, err := x.store.Set(x.ctx, x.key, vault.NewVersion{Value: secret.NewValue(value)}); err != nil {
		x.t.Fatal(err)
	}
}

// TestHowOldAnAnswerMayBe: at its bound an answer comes from memory, and just after
// from the vault.
func TestHowOldAnAnswerMayBe(t *testing.T) {
	t.Parallel()
	onEachVault(t, testHowOldAnAnswerMayBe)
}

func testHowOldAnAnswerMayBe(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	for i, test := range []struct {
		max, age time.Duration
		source   secretsv1.FreshnessSource
	}{
		{byDefault, 0, fromMemory},
		{byDefault, 30*time.Second + 1, fromVault},
		{0, 0, fromVault},
		{0, time.Millisecond, fromVault},
		{time.Millisecond, time.Millisecond, fromMemory},
		{time.Millisecond, time.Millisecond + 1, fromVault},
		{10 * time.Second, 10*time.Second + 1, fromVault},
		{10 * time.Minute, 10 * time.Minute, fromMemory},
		{10 * time.Minute, 10*time.Minute + 1, fromVault},
		{byDefault, 30 * time.Second, fromMemory}, // and renewed
	} {
		for _, current := range []bool{true, false} {
			now, err := x.getWithin(0, "")
			if err != nil {
				t.Fatal(err)
			}
			version, value, asOf := now.GetMetadata().GetVersion(), now.GetValue(), x.clock.Now()
			x.person(uri(10 + i))
			if current {
				version = ""
			}
			if x.clock.advance(test.age); test.source == fromVault {
				asOf = x.clock.Now()
				if current {
					value = uri(10 + i)
				}
			}
			x.wantFrom(test.max, version, value, test.source, asOf)
		}
	}
}

// TestAsOfIsWhenTheVaultWasAsked, and not when it answered: ages count from there.
func TestAsOfIsWhenTheVaultWasAsked(t *testing.T) {
	t.Parallel()
	onEachVault(t, testAsOfIsWhenTheVaultWasAsked)
}

func testAsOfIsWhenTheVaultWasAsked(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	x.clock.advance(time.Minute)
	asOf := x.clock.Now()
	x.vault.SetAfter(func(_ context.Context, _ string, _ secret.Key, err error) error {
		x.clock.advance(7 * time.Second)
		return err
	})
	x.wantFrom(byDefault, "", uri(2), fromVault, asOf)
	x.vault.SetAfter(nil)
	x.clock.advance(23*time.Second + 1)
	x.wantFrom(byDefault, "", uri(2), fromVault, x.clock.Now())
}

// TestAbsenceIsBelievedForAMoment: that there is no such secret, or version, comes
// from memory for 5 s, or less where the caller says so.
func TestAbsenceIsBelievedForAMoment(t *testing.T) {
	t.Parallel()
	onEachVault(t, testAbsenceIsBelievedForAMoment)
}

func testAbsenceIsBelievedForAMoment(t *testing.T, start func(*testing.T) *system) {
	for _, test := range []struct {
		state, version string
		reason         secret.Reason
	}{
		{"absent", "", secret.SecretNotFound},
		{"deleted", "", secret.SecretNotFound},
		{"deleted outside", "", secret.SecretNotFound},
		{"absent", "0123456789abcdef0123456789abcdef", secret.SecretNotFound},
		{"active", "0123456789abcdef0123456789abcdef", secret.VersionNotFound},
	} {
		t.Run(test.state+" "+test.version, func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", test.state)
			want := func(max, later time.Duration, asks bool) {
				t.Helper()
				x.clock.advance(later)
				before := x.looks()
				x.wantNo(max, test.version, test.reason)
				if got := x.looks() > before; got != asks {
					t.Errorf("%v later, within %v: got vault asked %v, want %v", later, max, got, asks)
				}
			}
			want(byDefault, time.Minute, true)
			want(byDefault, 5*time.Second, false)
			want(byDefault, 1, true)
			want(time.Hour, 5*time.Second, false)
			want(time.Hour, 1, true)
			want(0, 0, true)
			want(time.Second, time.Second, false)
			want(time.Second, 1, true)
			if test.state != "absent" {
				return
			}
			x.person(uri(2))
			want(byDefault, 0, false)
			x.clock.advance(5*time.Second + 1)
			x.wantFrom(byDefault, "", uri(2), fromVault, x.clock.Now())
		})
	}
}

// TestRenewedAhead: who reads in the last quarter of an answer's time is answered
// from memory, and has it renewed once for those who come next.
func TestRenewedAhead(t *testing.T) {
	t.Parallel()
	onEachVault(t, testRenewedAhead)
}

func testRenewedAhead(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	asOf, before := x.look(), x.looks()
	x.person(uri(3))
	reached, release := x.hang("Get", true)
	x.clock.advance(22500*time.Millisecond - 1)
	x.wantFrom(byDefault, "", uri(2), fromMemory, asOf)
	x.clock.advance(7 * time.Second)
	x.wantFrom(time.Hour, "", uri(2), fromMemory, asOf) // who set a bound wants nothing newer
	for range 20 {
		x.wantFrom(byDefault, "", uri(2), fromMemory, asOf)
	}
	<-reached
	release()
	for asOf.Before(x.clock.Now()) {
		out, err := x.getWithin(byDefault, "")
		if err != nil || out.GetFreshness().GetSource() != fromMemory {
			t.Fatalf("got %v, %v, want an answer from memory", out.GetFreshness(), err)
		}
		asOf = out.GetFreshness().GetAsOf().AsTime()
	}
	x.wantFrom(byDefault, "", uri(3), fromMemory, x.clock.Now())
	if got := x.looks() - before; got != 1 {
		t.Errorf("got %d requests, want one for all", got)
	}
}

// TestEveryWriteIsSeen: whatever memory held, a read that starts after a write gets
// what that left or found.
func TestEveryWriteIsSeen(t *testing.T) {
	notRacing(t)
	t.Parallel()
	onEachVault(t, testEveryWriteIsSeen)
}

func testEveryWriteIsSeen(t *testing.T, start func(*testing.T) *system) {
	write := func(name string) func(*subject, string) error {
		return func(x *subject, id string) error { return writeCalls[name](x, x.ctx, id) }
	}
	operation := func(name string) func(*subject, string) error {
		return func(x *subject, _ string) error { return operations[name](x).err }
	}
	personPuts := func(n int) func(*subject) { return func(x *subject) { x.setOutside(uri(n)) } }
	for name, test := range map[string]struct {
		state  string
		behind func(*subject) // done in the vault before it, unseen
		write  func(*subject, string) error
		again  bool // the write was done before
		value  string
	}{
		"put":                                {"active", nil, write("put"), false, uri(3)},
		"rotate":                             {"active", nil, write("rotate"), false, uri(3)},
		"delete":                             {"active", nil, write("delete"), false, ""},
		"recover":                            {"deleted", nil, write("recover"), false, uri(2)},
		"put over deleted":                   {"deleted", nil, write("put"), false, uri(3)},
		"put over what a person deleted":     {"deleted outside", nil, write("put"), false, uri(3)},
		"put of the first":                   {"absent", nil, write("put"), false, uri(3)},
		"put, changed by a person":           {"active", personPuts(4), write("put"), false, uri(3)},
		"put of what a person put":           {"active", personPuts(3), write("put"), false, uri(3)},
		"put again, changed by a person":     {"active", personPuts(4), write("put"), true, uri(4)},
		"rotate again, changed by a person":  {"active", personPuts(4), write("rotate"), true, uri(4)},
		"recover again, changed by a person": {"deleted", personPuts(4), write("recover"), true, uri(4)},
		"delete of what a person deleted": {"active", func(x *subject) {
			if _, err := x.store.Delete(x.ctx, x.key); err != nil {
				x.t.Fatal(err)
			}
		}, operation("delete if there"), false, ""},
		"put of unknown outcome": {"active", nil, func(x *subject, id string) error {
			x.vault.SetAfter(func(_ context.Context, op string, _ secret.Key, err error) error {
				if op == "Set" {
					x.failing("Get")
					return vault.Uncertain(vault.ErrUnavailable)
				}
				return err
			})
			x.hurried.Store(true)
			wantReason(x.t, writeCalls["put"](x, x.ctx, id), secret.VaultUnavailable, secret.Unknown)
			x.wantNo(time.Hour, "", secret.VaultUnavailable)
			x.vault.SetBefore(nil)
			return nil
		}, false, uri(3)},
		"put of what a person disabled": {"active", func(x *subject) {
			x.patch(func(p *vault.Patch) { p.Enabled = false })
		}, operation("put on the current version"), false, uri(3)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t)
			x, id := s.in(t, "demo", test.state), uuid.NewString()
			if test.again {
				if err := test.write(x, id); err != nil {
					t.Fatal(err)
				}
			}
			_, _ = x.getWithin(byDefault, "")
			if test.behind != nil {
				test.behind(x)
			}
			if err := test.write(x, id); err != nil {
				t.Fatal(err)
			}
			for _, who := range []string{consoleAPI, worker} {
				x.c = s.as(who)
				for _, max := range []time.Duration{byDefault, time.Hour, 0} {
					if test.value == "" {
						x.wantNo(max, "", secret.SecretNotFound)
					} else if out, err := x.getWithin(max, ""); err != nil || out.GetValue() != test.value {
						t.Errorf("%s, within %v: got %q, %v, want %q", who, max, out.GetValue(), err, test.value)
					}
				}
			}
		})
	}
}

// barrier is a place where whoever comes waits until it is opened.
type barrier struct {
	reached, opened chan struct{}
	reach, open     func()
}

func newBarrier(t *testing.T) *barrier {
	b := &barrier{reached: make(chan struct{}), opened: make(chan struct{})}
	b.reach, b.open = sync.OnceFunc(func() { close(b.reached) }), sync.OnceFunc(func() { close(b.opened) })
	t.Cleanup(b.open)
	return b
}

func (b *barrier) pass() {
	b.reach()
	<-b.opened
}

// TestSlowReadAgainstAWrite: an answer that was on its way while the secret was
// written is not put into memory, in whatever order the two end.
func TestSlowReadAgainstAWrite(t *testing.T) {
	t.Parallel()
	onEachVault(t, testSlowReadAgainstAWrite)
}

func testSlowReadAgainstAWrite(t *testing.T, start func(*testing.T) *system) {
	for name, test := range map[string]struct{ state, write, value string }{
		"put":              {"active", "put", uri(3)},
		"rotate":           {"active", "rotate", uri(3)},
		"delete":           {"active", "delete", ""},
		"recover":          {"deleted", "recover", uri(2)},
		"put over deleted": {"deleted", "put", uri(3)},
	} {
		for _, order := range []string{"asked before it", "asked before its effect", "answered before its effect", "asked after its effect"} {
			t.Run(name+", "+order, func(t *testing.T) {
				t.Parallel()
				x := start(t).in(t, "demo", test.state)
				x.clock.advance(time.Minute) // nothing in memory is young enough
				answer, effect, done := newBarrier(t), newBarrier(t), newBarrier(t)
				x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
					if isEffect(op) && strings.HasSuffix(order, "before its effect") {
						effect.pass()
					}
					return nil
				})
				x.vault.SetAfter(func(ctx context.Context, op string, _ secret.Key, err error) error {
					if strings.HasSuffix(vault.OriginOf(ctx).Caller, worker) {
						answer.pass()
					} else if isEffect(op) && order == "asked after its effect" {
						done.pass()
					}
					return err
				})
				reader, read, wrote := x.as(worker), make(chan error, 1), make(chan error, 1)
				get := func() {
					go func() {
						_, err := reader.GetSecret(x.ctx, &secretsv1.GetSecretRequest{Ref: x.ref})
						read <- err
					}()
					<-answer.reached
				}
				write := func() { go func() { wrote <- writeCalls[test.write](x, x.ctx, "") }() }
				finish := func(ended chan error, where ...*barrier) {
					t.Helper()
					for _, b := range where {
						b.open()
					}
					if err := <-ended; err != nil && failed(t, err).reason != secret.SecretNotFound {
						t.Fatal(err)
					}
				}
				switch order {
				case "asked before it":
					get()
					write()
				case "asked after its effect":
					write()
					<-done.reached
					get()
				default:
					write()
					<-effect.reached
					get()
				}
				if order == "answered before its effect" {
					finish(read, answer)
					finish(wrote, effect)
				} else {
					finish(wrote, effect, done)
					finish(read, answer)
				}
				x.vault.SetBefore(nil)
				want := func(max time.Duration) {
					t.Helper()
					if test.value == "" {
						x.wantNo(max, "", secret.SecretNotFound, secret.VaultUnavailable)
					} else if out, err := x.getWithin(max, ""); err != nil || out.GetValue() != test.value {
						t.Errorf("within %v: got %q, %v, want %q", max, out.GetValue(), err, test.value)
					}
				}
				want(time.Hour)
				want(byDefault)
				x.clock.advance(time.Minute)
				x.failing("Get")
				want(byDefault)
				want(time.Hour)
			})
		}
	}
}
