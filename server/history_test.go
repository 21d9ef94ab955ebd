package server_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// operate does one operation under a request id: p, d or c, for put, delete and
// recover. It gives the version.
func (x *subject) operate(letter byte, id string) (version string, err error) {
	switch letter {
	case 'p':
		out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: "put-" + id, RequestId: id})
		return out.GetMetadata().GetVersion(), err
	case 'd':
		out, err := x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref, RequestId: id})
		return out.GetMetadata().GetVersion(), err
	default:
		out, err := x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref, RequestId: id})
		return out.GetMetadata().GetVersion(), err
	}
}

// TestEveryRequestIDIsRememberedForExactlyEight goes through a row of operations
// and after each of them repeats those before: the last eight before it give their
// results again, the ninth is a new request. Deletes and recovers share one
// version, which has a write of its own to name besides them.
func TestEveryRequestIDIsRememberedForExactlyEight(t *testing.T) {
	notRacing(t)
	t.Parallel()
	onEachVault(t, testEveryRequestIDIsRememberedForExactlyEight)
}

func testEveryRequestIDIsRememberedForExactlyEight(t *testing.T, start func(*testing.T) *system) {
	for _, row := range []string{
		"p dcdcdcdcdcdcdcdcdcdcdc",
		"p dcdcdcdcdcp dcdcdcdcdcdc",
		"pppppppppppp",
		"pd pd pd pd pd pd pd",
		"pdcp dcp dcp dcp dcp dcp",
		"o dcdcdcdcdcdcdcdcdcdcdc", // on a version that a person wrote
		"p o dcdcdcdcdcp dcdcdc",
	} {
		t.Run(row, func(t *testing.T) {
			t.Parallel()
			x := start(t).token(t, "demo")
			type done struct {
				letter      byte
				id, version string
			}
			var ops []done
			for _, letter := range []byte(row) {
				switch letter {
				case ' ':
					continue
				case 'o':
					x.setOutside("outside")
					continue
				}
				op := done{letter: letter, id: uuid.NewString()}
				var err error
				if op.version, err = x.operate(letter, op.id); err != nil {
					t.Fatalf("operation %d, %c: %v", len(ops), letter, err)
				}
				x.clock.advance(time.Second)
				ops = append(ops, op)
				for further, i := 0, len(ops)-1; i >= 0 && further <= 8; further, i = further+1, i-1 {
					got, err := x.operate(ops[i].letter, ops[i].id)
					if err != nil || got != ops[i].version {
						t.Fatalf("operation %d, %c, after %d further ones: got %q, %v, want its result again: %q", i, ops[i].letter, further, got, err, ops[i].version)
					}
				}
				if i := len(ops) - 10; i >= 0 {
					// Another RPC tells a remembered id from a forgotten one, and what it is
					// refused for changes nothing.
					_, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, MustMatchVersion: "another", AllowMissing: true, RequestId: ops[i].id})
					wantReason(t, err, secret.VersionMismatch, secret.NotApplied)
					_, err = x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, MustMatchVersion: "another", AllowMissing: true, RequestId: ops[i+1].id})
					wantReason(t, err, secret.RequestIDReused, secret.NotApplied)
				}
			}
		})
	}
}

// TestDeleteAfterAPersonEnabledADeletedOne keeps the request id of the first
// delete, whose mark the second one replaces.
func TestDeleteAfterAPersonEnabledADeletedOne(t *testing.T) {
	t.Parallel()
	onEachVault(t, testDeleteAfterAPersonEnabledADeletedOne)
}

func testDeleteAfterAPersonEnabledADeletedOne(t *testing.T, start func(*testing.T) *system) {
	x := start(t).in(t, "demo", "active")
	first := uuid.NewString()
	if _, err := x.operate('d', first); err != nil {
		t.Fatal(err)
	}
	x.settle()
	gone, err := x.store.GetDeleted(x.ctx, x.key)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.store.Recover(x.ctx, x.key); err != nil {
		t.Fatal(err)
	}
	if _, err := x.store.Update(x.ctx, x.key, x.current, vault.Patch{Enabled: true, Tags: gone.Tags}); err != nil {
		t.Fatal(err)
	}
	x.wantValue("", uri(2))
	second := uuid.NewString()
	for _, id := range []string{second, first, second} {
		if got, err := x.operate('d', id); err != nil || got != x.current {
			t.Errorf("got %q, %v, want the result of the delete", got, err)
		}
	}
}

// TestTagsThatAPersonBroke: whatever stands in the broker's tags, the secret can
// be read and written, and its tags stay within the vault's limits.
func TestTagsThatAPersonBroke(t *testing.T) {
	notRacing(t)
	t.Parallel()
	onEachVault(t, testTagsThatAPersonBroke)
}

func testTagsThatAPersonBroke(t *testing.T, start func(*testing.T) *system) {
	long := fmt.Sprintf("%0500d", 7)
	for name, tags := range map[string]vault.Tags{
		"the greatest epoch":      {"exto-generation": "3", "exto-epoch": "9223372036854775807 x"},
		"the greatest generation": {"exto-generation": "9223372036854775807"},
		"negative numbers":        {"exto-generation": "-1", "exto-epoch": "-1 x", "exto-first": "-1"},
		"long ids": {
			"exto-generation": "3", "exto-operation": "p:" + long, "exto-epoch": " " + long,
			"exto-operations-1": "d:" + long + ":1", "exto-operations-2": "d:1:" + long,
			"exto-deleted": "2026-01-01T00:00:00Z enabled " + long[:400], "exto-previous": long[:480] + " 2026-01-01T00:00:00Z",
		},
		"unknown letters": {"exto-generation": "3", "exto-operation": "ß:1", "exto-operations-1": ":::,,x:y:z,\x00"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := start(t).in(t, "demo", "active")
			x.patch(func(p *vault.Patch) { p.Tags = tags })
			x.wantValue("", uri(2))
			for _, letter := range []byte("dcdcd") {
				if _, err := x.operate(letter, uuid.NewString()); err != nil {
					t.Fatalf("%c: %v", letter, err)
				}
			}
			if m := x.put(3).GetMetadata(); m.GetGeneration() < 3 {
				t.Errorf("got generation %d, want it to go on from 2", m.GetGeneration())
			}
			if m := x.put(4).GetMetadata(); m.GetGeneration() < 4 {
				t.Errorf("got generation %d, want it to go on", m.GetGeneration())
			}
		})
	}
}

// TestCopiedTagsSayNothingOfThisSecret: a version that somebody copied from
// another secret, with its tags, and then wrote over.
func TestCopiedTagsSayNothingOfThisSecret(t *testing.T) {
	t.Parallel()
	onEachVault(t, testCopiedTagsSayNothingOfThisSecret)
}

func testCopiedTagsSayNothingOfThisSecret(t *testing.T, start func(*testing.T) *system) {
	s := start(t)
	other := s.in(t, "other", "deleted")
	other.put(3)
	other.put(4)
	from, _, err := s.store.Get(other.ctx, other.key, "")
	if err != nil {
		t.Fatal(err)
	}
	x := s.in(t, "demo", "active")
	if _, err := s.store.Set(x.ctx, x.key, vault.NewVersion{Value: secret.NewValue(uri(4)), Tags: from.Tags}); err != nil {
		t.Fatal(err)
	}
	x.clock.advance(time.Second)
	x.wantGet("", secret.KeyMismatch)
	for _, instance := range []string{"", "demo"} {
		l, err := x.c.ListSecrets(x.ctx, &secretsv1.ListSecretsRequest{InstanceId: instance})
		if err != nil || len(l.GetSecrets()) == 0 || l.GetSecrets()[0].GetGeneration() != 0 {
			t.Errorf("List of instance %q: got %v, %v, want it listed at generation 0", instance, l, err)
		}
	}
	x.setOutside(uri(5))
	if m := x.put(6).GetMetadata(); m.GetGeneration() != 3 {
		t.Errorf("got generation %d, want 3: that of the copied tags is another secret's", m.GetGeneration())
	}
	x.wantValue(x.first, uri(1)) // the bound of the copied tags is another secret's too
}
