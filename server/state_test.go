package server_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

const (
	uriKind   = secretsv1.SecretKind_SECRET_KIND_DATABASE_URI
	tokenKind = secretsv1.SecretKind_SECRET_KIND_REGISTRATION_TOKEN
	active    = secretsv1.SecretState_SECRET_STATE_ACTIVE
	disabled  = secretsv1.SecretState_SECRET_STATE_DISABLED
	deleted   = secretsv1.SecretState_SECRET_STATE_DELETED
)

func uri(n int) string { return fmt.Sprintf("postgres://app:pw-%d@db/orders", n) }

// subject is a secret in one state: two versions were put, unless it is absent.
type subject struct {
	*system
	t       *testing.T
	ctx     context.Context
	c       secretsv1.SecretsBrokerServiceClient
	ref     *secretsv1.SecretRef
	key     secret.Key
	first   string // version of uri(1)
	current string // version of uri(2)
}

var states = []string{"absent", "active", "outside", "disabled", "deleted", "deleted outside", "marked"}

// in brings a secret of a system into a state.
func (s *system) in(t *testing.T, id, state string) *subject {
	t.Helper()
	x := &subject{system: s, t: t, ctx: callContext(t), c: s.as(consoleAPI), ref: ref(id, uriKind), key: key(t, id, secret.DatabaseURI)}
	if state == "absent" {
		return x
	}
	x.first = x.put(1).GetMetadata().GetVersion()
	if state == "outside" {
		x.current = x.setOutside(uri(2))
		return x
	}
	x.current = x.put(2).GetMetadata().GetVersion()
	switch state {
	case "disabled":
		x.patch(func(p *vault.Patch) { p.Enabled = false })
	case "deleted":
		x.delete()
	case "deleted outside":
		if _, err := s.store.Delete(x.ctx, x.key); err != nil {
			t.Fatal(err)
		}
		x.settle()
	case "marked": // killed between the mark and the vault's delete
		x.delete()
		if err := s.store.Recover(x.ctx, x.key); err != nil {
			t.Fatal(err)
		}
	}
	return x
}

// settle waits for the end of a state between, in which what a person did is not
// to be seen yet.
func (x *subject) settle() {
	x.t.Helper()
	if err := x.store.Settle(x.ctx, x.key); err != nil {
		x.t.Fatal(err)
	}
}

func (x *subject) put(n int) *secretsv1.PutSecretResponse {
	x.t.Helper()
	out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(n)})
	if err != nil {
		x.t.Fatal(err)
	}
	x.clock.advance(time.Second)
	return out
}

func (x *subject) delete() {
	x.t.Helper()
	if _, err := x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref}); err != nil {
		x.t.Fatal(err)
	}
	x.clock.advance(time.Second)
}

// setOutside writes a version as a person would.
func (x *subject) setOutside(value string) string {
	x.t.Helper()
	p, err := x.store.Set(x.ctx, x.key, vault.NewVersion{Value: secret.NewValue(value)})
	if err != nil {
		x.t.Fatal(err)
	}
	x.clock.advance(time.Second)
	return p.Version
}

// patch changes the current version as a person would.
func (x *subject) patch(change func(*vault.Patch)) {
	x.t.Helper()
	p, _, err := x.store.Get(x.ctx, x.key, "")
	if err != nil {
		x.t.Fatal(err)
	}
	patch := vault.Patch{Enabled: p.Enabled, Tags: p.Tags}
	change(&patch)
	if _, err := x.store.Update(x.ctx, x.key, p.Version, patch); err != nil {
		x.t.Fatal(err)
	}
}

func (x *subject) get(version string) (*secretsv1.GetSecretResponse, error) {
	return x.c.GetSecret(x.ctx, &secretsv1.GetSecretRequest{Ref: x.ref, Version: version, MaxStaleness: durationpb.New(0)})
}

// wantValue checks what a read gives now.
func (x *subject) wantValue(version, value string) {
	x.t.Helper()
	out, err := x.get(version)
	if err != nil || out.GetValue() != value {
		x.t.Fatalf("Get %q: got %v, %v, want %s", version, out.GetMetadata(), err, value)
	}
}

func (x *subject) wantGet(version string, reason secret.Reason) {
	x.t.Helper()
	_, err := x.get(version)
	wantReason(x.t, err, reason, "")
}

// outcome is what an operation gives in a state: a reason, or the metadata.
type outcome struct {
	m         *secretsv1.SecretMetadata
	value     string
	unchanged bool
	previous  *secretsv1.SecretMetadata
	err       error
}

var operations = map[string]func(x *subject) outcome{
	"put": func(x *subject) outcome {
		out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(3)})
		return outcome{m: out.GetMetadata(), unchanged: out.GetUnchanged(), err: err}
	},
	"put same": func(x *subject) outcome {
		out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(2)})
		return outcome{m: out.GetMetadata(), unchanged: out.GetUnchanged(), err: err}
	},
	"put must_not_exist": func(x *subject) outcome {
		out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(3), Precondition: &secretsv1.PutSecretRequest_MustNotExist{MustNotExist: true}})
		return outcome{m: out.GetMetadata(), err: err}
	},
	"put on the current version": func(x *subject) outcome {
		out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(3), Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: or(x.current, "x")}})
		return outcome{m: out.GetMetadata(), err: err}
	},
	"put on another version": func(x *subject) outcome {
		out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(2), Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: or(x.first, "x")}})
		return outcome{m: out.GetMetadata(), err: err}
	},
	"get":         func(x *subject) outcome { return x.read("") },
	"get current": func(x *subject) outcome { return x.read(or(x.current, "x")) },
	"get first":   func(x *subject) outcome { return x.read(or(x.first, "x")) },
	"get unknown": func(x *subject) outcome { return x.read("0123456789abcdef0123456789abcdef") },
	"rotate":      func(x *subject) outcome { return x.rotate(&secretsv1.RotateSecretRequest{NewValue: uri(3)}) },
	"rotate same": func(x *subject) outcome { return x.rotate(&secretsv1.RotateSecretRequest{NewValue: uri(2)}) },
	"rotate or create": func(x *subject) outcome {
		return x.rotate(&secretsv1.RotateSecretRequest{NewValue: uri(3), AllowMissing: true})
	},
	"rotate on current": func(x *subject) outcome {
		return x.rotate(&secretsv1.RotateSecretRequest{NewValue: uri(2), MustMatchVersion: or(x.current, "x"), AllowMissing: true})
	},
	"rotate on another": func(x *subject) outcome {
		return x.rotate(&secretsv1.RotateSecretRequest{NewValue: uri(3), MustMatchVersion: or(x.first, "x"), AllowMissing: true})
	},
	"delete":          func(x *subject) outcome { return x.remove(&secretsv1.DeleteSecretRequest{}) },
	"delete if there": func(x *subject) outcome { return x.remove(&secretsv1.DeleteSecretRequest{AllowMissing: true}) },
	"delete on current": func(x *subject) outcome {
		return x.remove(&secretsv1.DeleteSecretRequest{MustMatchVersion: or(x.current, "x")})
	},
	"delete on another": func(x *subject) outcome {
		return x.remove(&secretsv1.DeleteSecretRequest{MustMatchVersion: or(x.first, "x")})
	},
	"recover": func(x *subject) outcome {
		out, err := x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref})
		return outcome{m: out.GetMetadata(), err: err}
	},
	"describe": func(x *subject) outcome {
		out, err := x.c.DescribeSecret(x.ctx, &secretsv1.DescribeSecretRequest{Ref: x.ref})
		return outcome{m: out.GetMetadata(), value: fmt.Sprintf("%s %d", out.GetRedactedValue(), len(out.GetVersions())), err: err}
	},
	"list":         func(x *subject) outcome { return x.listed(false) },
	"list deleted": func(x *subject) outcome { return x.listed(true) },
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func (x *subject) read(version string) outcome {
	out, err := x.get(version)
	return outcome{m: out.GetMetadata(), value: out.GetValue(), err: err}
}

func (x *subject) rotate(in *secretsv1.RotateSecretRequest) outcome {
	in.Ref = x.ref
	out, err := x.c.RotateSecret(x.ctx, in)
	return outcome{m: out.GetMetadata(), value: out.GetValue(), previous: out.GetPrevious(), err: err}
}

func (x *subject) remove(in *secretsv1.DeleteSecretRequest) outcome {
	in.Ref = x.ref
	out, err := x.c.DeleteSecret(x.ctx, in)
	return outcome{m: out.GetMetadata(), err: err}
}

func (x *subject) listed(showDeleted bool) outcome {
	out, err := x.c.ListSecrets(x.ctx, &secretsv1.ListSecretsRequest{InstanceId: x.ref.GetInstanceId(), ShowDeleted: showDeleted})
	if len(out.GetSecrets()) > 1 {
		x.t.Fatalf("got %d secrets, want one at most", len(out.GetSecrets()))
	}
	if err == nil && len(out.GetSecrets()) == 1 {
		return outcome{m: out.GetSecrets()[0]}
	}
	return outcome{err: err}
}

// cells is the table of what each operation does in each state, in the order of
// states: a reason; or state/generation, then what else the answer holds; or "-"
// for an answer without metadata.
var cells = map[string][7]string{
	//                             absent              active              outside             disabled           deleted             deleted outside     marked
	"put":                        {"ACTIVE/1", "ACTIVE/3", "ACTIVE/2", "SECRET_DISABLED", "ACTIVE/3", "ACTIVE/3", "ACTIVE/3"},
	"put same":                   {"ACTIVE/1", "ACTIVE/2 unchanged", "ACTIVE/0 unchanged", "SECRET_DISABLED", "ACTIVE/3", "ACTIVE/3", "ACTIVE/3"},
	"put must_not_exist":         {"ACTIVE/1", "SECRET_EXISTS", "SECRET_EXISTS", "SECRET_EXISTS", "ACTIVE/3", "ACTIVE/3", "ACTIVE/3"},
	"put on the current version": {"VERSION_MISMATCH", "ACTIVE/3", "ACTIVE/2", "ACTIVE/3", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH"},
	"put on another version":     {"VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH"},
	"get":                        {"SECRET_NOT_FOUND", "ACTIVE/2 " + uri(2), "ACTIVE/0 " + uri(2), "SECRET_DISABLED", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND"},
	"get current":                {"SECRET_NOT_FOUND", "ACTIVE/2 " + uri(2), "ACTIVE/0 " + uri(2), "SECRET_DISABLED", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND"},
	"get first":                  {"SECRET_NOT_FOUND", "ACTIVE/1 " + uri(1), "ACTIVE/1 " + uri(1), "ACTIVE/1 " + uri(1), "SECRET_NOT_FOUND", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND"},
	"get unknown":                {"SECRET_NOT_FOUND", "VERSION_NOT_FOUND", "VERSION_NOT_FOUND", "VERSION_NOT_FOUND", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND"},
	"rotate":                     {"SECRET_NOT_FOUND", "ACTIVE/3 previous 2", "ACTIVE/2 previous 0", "SECRET_DISABLED", "SECRET_DELETED", "SECRET_DELETED", "SECRET_DELETED"},
	"rotate same":                {"SECRET_NOT_FOUND", "VALUE_UNCHANGED", "VALUE_UNCHANGED", "SECRET_DISABLED", "SECRET_DELETED", "SECRET_DELETED", "SECRET_DELETED"},
	"rotate or create":           {"ACTIVE/1", "ACTIVE/3 previous 2", "ACTIVE/2 previous 0", "SECRET_DISABLED", "ACTIVE/3", "ACTIVE/3", "ACTIVE/3"},
	"rotate on current":          {"VERSION_MISMATCH", "VALUE_UNCHANGED", "VALUE_UNCHANGED", "ACTIVE/3 previous 2", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH"},
	"rotate on another":          {"VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH"},
	"delete":                     {"SECRET_NOT_FOUND", "DELETED/2", "DELETED/0", "DELETED/2", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND"},
	"delete if there":            {"-", "DELETED/2", "DELETED/0", "DELETED/2", "DELETED/2", "DELETED/2", "DELETED/2"},
	"delete on current":          {"SECRET_NOT_FOUND", "DELETED/2", "DELETED/0", "DELETED/2", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND"},
	"delete on another":          {"SECRET_NOT_FOUND", "VERSION_MISMATCH", "VERSION_MISMATCH", "VERSION_MISMATCH", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND", "SECRET_NOT_FOUND"},
	"recover":                    {"SECRET_NOT_FOUND", "SECRET_NOT_DELETED", "SECRET_NOT_DELETED", "SECRET_NOT_DELETED", "ACTIVE/2", "ACTIVE/2", "ACTIVE/2"},
	"describe":                   {"SECRET_NOT_FOUND", "ACTIVE/2 postgres://app:***@db/orders 2", "ACTIVE/0 postgres://app:***@db/orders 2", "DISABLED/2  2", "DELETED/2  1", "DELETED/2  1", "DELETED/2  1"},
	"list":                       {"-", "ACTIVE/2", "ACTIVE/0", "DISABLED/2", "-", "-", "-"},
	"list deleted":               {"-", "ACTIVE/2", "ACTIVE/0", "DISABLED/2", "DELETED/2", "DELETED/2", "DELETED/2"},
}

func (o outcome) String(t *testing.T) string {
	t.Helper()
	if o.err != nil {
		return string(failed(t, o.err).reason)
	}
	if o.m == nil {
		return "-"
	}
	s := fmt.Sprintf("%s/%d", o.m.GetState().String()[len("SECRET_STATE_"):], o.m.GetGeneration())
	if o.unchanged {
		s += " unchanged"
	}
	if o.value != "" {
		s += " " + o.value
	}
	if o.previous != nil {
		s += fmt.Sprintf(" previous %d", o.previous.GetGeneration())
		if o.previous.GetExpireTime() == nil {
			s += " without end"
		}
	}
	return s
}

func TestEachCellOfTheStateTable(t *testing.T) {
	notRacing(t)
	t.Parallel()
	if len(cells) != len(operations) {
		t.Fatalf("got %d rows for %d operations", len(cells), len(operations))
	}
	writes := map[string]bool{"put": true, "rot": true, "del": true, "rec": true}
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		for i, state := range states {
			t.Run(state, func(t *testing.T) {
				t.Parallel()
				s := start(t)
				for name, run := range operations {
					t.Run(name, func(t *testing.T) {
						x := s.in(t, strings.ReplaceAll(strings.ReplaceAll(name, " ", "-"), "_", "-"), state)
						before := x.stored()
						got := run(x)
						if g, want := got.String(t), cells[name][i]; g != want {
							t.Fatalf("got %q (%v), want %q", g, got.err, want)
						}
						if got.err != nil {
							f := failed(t, got.err)
							if want := secret.NotApplied; writes[name[:3]] && f.commit != want {
								t.Errorf("got commit state %q, want %q", f.commit, want)
							} else if !writes[name[:3]] && f.commit != "" {
								t.Errorf("got commit state %q of a read", f.commit)
							}
							if after := x.stored(); before != after && state != "marked" {
								t.Errorf("a refused call changed the store from %s to %s", before, after)
							}
							return
						}
						if m := got.m; m != nil {
							x.checkMetadata(m, name)
						}
					})
				}
			})
		}
	})
}

// checkMetadata checks what holds for all metadata.
func (x *subject) checkMetadata(m *secretsv1.SecretMetadata, operation string) {
	x.t.Helper()
	if m.GetKey() != x.key.String() || m.GetRef().GetInstanceId() != x.ref.GetInstanceId() || m.GetRef().GetKind() != uriKind {
		x.t.Errorf("got %v, want it of %s", m, x.key)
	}
	if want := operation == "list" || operation == "list deleted"; (m.GetVersion() == "") != want {
		x.t.Errorf("got version %q", m.GetVersion())
	}
	if (m.GetGeneration() == 0) != (m.GetCreatedBy() == "") || m.GetGeneration() > 0 && m.GetCreatedBy() != "spiffe://console.exto/"+consoleAPI {
		x.t.Errorf("got created_by %q at generation %d", m.GetCreatedBy(), m.GetGeneration())
	}
	if m.GetCreateTime() == nil || (m.GetState() == deleted) != (m.GetDeleteTime() != nil) || m.GetExpireTime() != nil && operation != "get first" {
		x.t.Errorf("got times %v", m)
	}
}

// stored is all that the store holds of the secret, for comparison.
func (x *subject) stored() string {
	x.t.Helper()
	if x.fake != nil {
		gone := x.fake.State(x.key.String()) == keyvaultfake.Deleting || x.fake.State(x.key.String()) == keyvaultfake.Deleted
		return fmt.Sprint(gone, x.fake.Versions(x.key.String()))
	}
	live, err := x.store.Versions(x.ctx, x.key)
	gone, goneErr := x.store.GetDeleted(x.ctx, x.key)
	return fmt.Sprint(live, err, gone, goneErr)
}

func (x *subject) rotateGrace(n int, grace time.Duration) *secretsv1.RotateSecretResponse {
	x.t.Helper()
	out, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: uri(n), GracePeriod: durationpb.New(grace)})
	if err != nil {
		x.t.Fatal(err)
	}
	return out
}

func TestGraceEndsAtItsTime(t *testing.T) {
	t.Parallel()
	onEachVault(t, testGraceEndsAtItsTime)
}

func testGraceEndsAtItsTime(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	out := x.rotateGrace(3, time.Minute)
	if got, want := out.GetPrevious().GetExpireTime().AsTime(), x.clock.Now().Add(time.Minute); !got.Equal(want) {
		t.Errorf("got end %v, want %v", got, want)
	}
	x.clock.advance(time.Minute - time.Millisecond)
	x.wantValue(x.current, uri(2))
	x.clock.advance(time.Millisecond)
	x.wantGet(x.current, secret.VersionExpired)
	x.wantValue(x.first, uri(1)) // replaced by a put: it has no end
	x.wantValue("", uri(3))
}

func TestRotateWithoutGraceExpiresAtOnce(t *testing.T) {
	t.Parallel()
	onEachVault(t, testRotateWithoutGraceExpiresAtOnce)
}

func testRotateWithoutGraceExpiresAtOnce(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	if got := x.rotateGrace(3, 0).GetPrevious().GetExpireTime().AsTime(); !got.Equal(x.clock.Now()) {
		t.Errorf("got end %v, want the moment of the rotate %v", got, x.clock.Now())
	}
	x.wantGet(x.current, secret.VersionExpired)
}

func TestGraceIsEndedBy(t *testing.T) {
	notRacing(t)
	t.Parallel()
	onEachVault(t, testGraceIsEndedBy)
}

func testGraceIsEndedBy(t *testing.T, start func(*testing.T) *system) {
	for name, end := range map[string]func(x *subject){
		"rotate":        func(x *subject) { x.rotateGrace(4, time.Hour) },
		"put":           func(x *subject) { x.put(4) },
		"outside write": func(x *subject) { x.setOutside(uri(4)) },
		"delete": func(x *subject) {
			x.delete()
			if _, err := x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref}); err != nil {
				x.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", "active")
			x.rotateGrace(3, time.Hour)
			x.wantValue(x.current, uri(2))
			end(x)
			x.wantGet(x.current, secret.VersionExpired)
			out, err := x.c.DescribeSecret(x.ctx, &secretsv1.DescribeSecretRequest{Ref: x.ref})
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range out.GetVersions() {
				if v.GetVersion() == x.current && (v.GetExpireTime() == nil || v.GetExpireTime().AsTime().After(x.clock.Now())) {
					t.Errorf("got expire_time %v, want one that is past", v.GetExpireTime())
				}
			}
		})
	}
}

func TestPutOverDeletedServesNothingFromBefore(t *testing.T) {
	t.Parallel()
	onEachVault(t, testPutOverDeletedServesNothingFromBefore)
}

func testPutOverDeletedServesNothingFromBefore(t *testing.T, start func(*testing.T) *system) {
	for _, state := range []string{"deleted", "deleted outside", "marked"} {
		t.Run(state, func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", state)
			third := x.put(3).GetMetadata().GetVersion()
			x.wantGet(x.first, secret.VersionExpired)
			x.wantGet(x.current, secret.VersionExpired)
			outside := x.setOutside(uri(4))
			x.put(5)
			x.wantValue(third, uri(3))
			x.wantValue(outside, uri(4))
			x.wantGet(x.first, secret.VersionExpired) // the bound is carried on
		})
	}
	t.Run("generation 0 from before", func(t *testing.T) {
		t.Parallel()
		x := start(t).in(t, "demo", "outside")
		x.delete()
		x.put(3)
		x.wantGet(x.current, secret.VersionExpired)
	})
}

func TestRecoverRestoresWhatAPersonDisabled(t *testing.T) {
	t.Parallel()
	onEachVault(t, testRecoverRestoresWhatAPersonDisabled)
}

func testRecoverRestoresWhatAPersonDisabled(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "disabled")
	x.delete()
	out, err := x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref})
	if err != nil || out.GetMetadata().GetState() != disabled || out.GetMetadata().GetDeleteTime() != nil {
		t.Fatalf("got %v, %v, want it DISABLED again", out, err)
	}
	x.wantGet("", secret.SecretDisabled)
}

func TestOutsideHands(t *testing.T) {
	notRacing(t)
	t.Parallel()
	onEachVault(t, testOutsideHands)
}

func testOutsideHands(t *testing.T, start func(*testing.T) *system) {
	tests := map[string]func(t *testing.T, x *subject){
		"set after a rotate counts on": func(t *testing.T, x *subject) {
			x.setOutside(uri(7))
			if m := x.put(8).GetMetadata(); m.GetGeneration() != 3 {
				t.Errorf("got generation %d, want 3", m.GetGeneration())
			}
		},
		"disable and enable": func(t *testing.T, x *subject) {
			x.patch(func(p *vault.Patch) { p.Enabled = false })
			x.wantGet("", secret.SecretDisabled)
			if _, err := x.store.Update(x.ctx, x.key, x.current, vault.Patch{Enabled: true}); err != nil {
				t.Fatal(err)
			}
			x.wantValue("", uri(2))
		},
		"recovered by hand after the broker's delete": func(t *testing.T, x *subject) {
			x.delete()
			if err := x.store.Recover(x.ctx, x.key); err != nil {
				t.Fatal(err)
			}
			x.wantGet("", secret.SecretNotFound)
			all, err := x.store.Versions(x.ctx, x.key)
			if err != nil {
				t.Fatal(err)
			}
			var tags vault.Tags
			for _, v := range all {
				if v.Version == x.current {
					tags = v.Tags
				}
			}
			for _, enabled := range []bool{true, false} {
				if _, err := x.store.Update(x.ctx, x.key, x.current, vault.Patch{Enabled: enabled, Tags: tags}); err != nil {
					t.Fatal(err)
				}
				if enabled {
					x.wantValue("", uri(2))
				} else {
					x.wantGet("", secret.SecretNotFound)
				}
			}
		},
		"delete and recover": func(t *testing.T, x *subject) {
			if _, err := x.store.Delete(x.ctx, x.key); err != nil {
				t.Fatal(err)
			}
			x.wantGet("", secret.SecretNotFound)
			if err := x.store.Recover(x.ctx, x.key); err != nil {
				t.Fatal(err)
			}
			x.wantValue("", uri(2))
		},
		"tags replaced": func(t *testing.T, x *subject) {
			x.patch(func(p *vault.Patch) { p.Tags = vault.Tags{"owner": "me"} })
			out, err := x.get("")
			if err != nil || out.GetMetadata().GetGeneration() != 0 || out.GetMetadata().GetCreatedBy() != "" {
				t.Fatalf("got %v, %v, want generation 0", out.GetMetadata(), err)
			}
			// The broker remembers that generation 2 was given away.
			if m := x.put(3).GetMetadata(); m.GetGeneration() != 3 {
				t.Errorf("got generation %d, want 3", m.GetGeneration())
			}
			p, _, err := x.store.Get(x.ctx, x.key, "")
			if err != nil || p.Tags["owner"] != "me" {
				t.Errorf("got tags %v, %v, want others' carried over", p.Tags, err)
			}
		},
		"purge": func(t *testing.T, x *subject) {
			x.delete()
			x.clock.advance(91 * 24 * time.Hour)
			x.wantGet("", secret.SecretNotFound)
			if m := x.put(3).GetMetadata(); m.GetGeneration() != 1 {
				t.Errorf("got generation %d after a purge, want 1", m.GetGeneration())
			}
		},
		"copied under another name": func(t *testing.T, x *subject) {
			x.patch(func(p *vault.Patch) { p.Tags["exto-key"] = "instance-other-dburi" })
			x.wantGet("", secret.KeyMismatch)
			_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(3)})
			wantReason(t, err, secret.KeyMismatch, secret.NotApplied)
		},
		"a newer format": func(t *testing.T, x *subject) {
			x.patch(func(p *vault.Patch) { p.Tags["exto-format"] = "2" })
			x.wantValue("", uri(2))
			_, err := x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref})
			wantReason(t, err, secret.KeyMismatch, secret.NotApplied)
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, start(t).in(t, "demo", "active"))
		})
	}
}

func TestTagsOfOthersAreCarriedAsFarAsThereIsRoom(t *testing.T) {
	t.Parallel()
	onEachVault(t, testTagsOfOthersAreCarriedAsFarAsThereIsRoom)
}

func testTagsOfOthersAreCarriedAsFarAsThereIsRoom(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "absent")
	tags := vault.Tags{}
	for i := range 15 {
		tags[fmt.Sprintf("team-%02d", i)] = "x"
	}
	if _, err := x.store.Set(x.ctx, x.key, vault.NewVersion{Value: secret.NewValue(uri(1)), Tags: tags, ContentType: "text/uri"}); err != nil {
		t.Fatal(err)
	}
	x.clock.advance(time.Second)
	x.put(2)
	p, _, err := x.store.Get(x.ctx, x.key, "")
	if err != nil || len(p.Tags) != 15 || p.Tags["team-00"] != "x" || p.Tags["team-14"] != "" || p.ContentType != "text/uri" {
		t.Errorf("got %v, %v, want 15 tags, the first of others' and the content type among them", p, err)
	}
	if log := x.log.String(); !contains(log, "team-14") {
		t.Errorf("the log does not name the tag that was dropped: %s", log)
	}
}

func TestGetConditions(t *testing.T) {
	t.Parallel()
	onEachVault(t, testGetConditions)
}

func testGetConditions(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	get := func(in *secretsv1.GetSecretRequest) (*secretsv1.GetSecretResponse, error) {
		in.Ref = x.ref
		return x.c.GetSecret(x.ctx, in)
	}
	out, err := get(&secretsv1.GetSecretRequest{KnownVersion: x.current})
	if err != nil || !out.GetNotModified() || out.GetValue() != "" || out.GetMetadata().GetVersion() != x.current {
		t.Errorf("known current version: got %v, %v, want not modified", out.GetMetadata(), err)
	}
	if out, err = get(&secretsv1.GetSecretRequest{KnownVersion: x.first}); err != nil || out.GetNotModified() || out.GetValue() != uri(2) {
		t.Errorf("known older version: got %v, %v, want the value", out.GetMetadata(), err)
	}
	if out, err = get(&secretsv1.GetSecretRequest{MinGeneration: 2, MaxStaleness: durationpb.New(0)}); err != nil || out.GetFreshness().GetSource() != secretsv1.FreshnessSource_FRESHNESS_SOURCE_LIVE || !out.GetFreshness().GetAsOf().AsTime().Equal(x.clock.Now()) {
		t.Errorf("min_generation 2: got %v, %v, want it live, as of now", out.GetFreshness(), err)
	}
	_, err = get(&secretsv1.GetSecretRequest{MinGeneration: 3})
	wantReason(t, err, secret.StalenessUnsatisfiable, "")
	if !contains(err.Error(), "generation 2") {
		t.Errorf("got %v, want the generation found", err)
	}
	x.setOutside(uri(5))
	if out, err = get(&secretsv1.GetSecretRequest{MinGeneration: 99}); err != nil || out.GetValue() != uri(5) {
		t.Errorf("generation 0: got %v, want it to meet any bound", err)
	}
}
