package server_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/internal/race"
	"github.com/exto/secrets-broker/secret"
)

// TestRandomFaults does random operations on one secret while random requests to
// the vault are cut, fail or are committed late. Each is repeated with its request
// id until its outcome is known. Then a read gives what was written last, a deleted
// value is never read, and nothing was written twice but one write sent twice.
func TestRandomFaults(t *testing.T) {
	t.Parallel()
	seeds := uint64(40)
	if race.Enabled {
		seeds = 4
	}
	if more, err := strconv.ParseUint(os.Getenv("BROKER_TEST_SEEDS"), 10, 64); err == nil {
		seeds = more // make soak
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(seed, 11))
			x := startKeyVault(t).in(t, "demo", "absent")
			var mu sync.Mutex
			var log []string
			late := time.Time{} // until when something may still arrive
			x.fake.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
				mu.Lock()
				defer mu.Unlock()
				if r.Challenge || !isEffect(string(r.Op)) || random.IntN(3) > 0 {
					return keyvaultfake.Fault{}
				}
				faults := []keyvaultfake.Fault{{Cut: true}, {CutAfter: true}, {Status: 503}, {Status: 409}}
				if r.Op == keyvaultfake.OpSet {
					after := time.Duration(1+random.IntN(90)) * time.Second
					faults = append(faults, keyvaultfake.Fault{LateCommit: after}, keyvaultfake.Fault{LateCommit: after})
				}
				n := random.IntN(len(faults))
				if d := faults[n].LateCommit; d > 0 {
					if at := x.clock.Now().Add(d); at.After(late) {
						late = at
					}
				}
				log = append(log, fmt.Sprintf("  %s %+v", r.Op, faults[n]))
				return faults[n]
			})
			draw := func(n int) int { // a repair in the background may meet the hook meanwhile
				mu.Lock()
				defer mu.Unlock()
				return random.IntN(n)
			}
			fail := func(format string, args ...any) {
				t.Helper()
				mu.Lock()
				defer mu.Unlock()
				for _, l := range log {
					t.Log(l)
				}
				for _, v := range x.versions() {
					t.Logf("version %.4s %v created %v %s gen %s epoch %s op %s deleted %q", v.ID, v.Enabled, v.Created.Unix(), v.Value, v.Tags["exto-generation"], v.Tags["exto-epoch"], v.Tags["exto-operation"], v.Tags["exto-deleted"])
				}
				t.Fatalf(format, args...)
			}
			value, isDeleted := "", false // what a read has to give; "": nothing
			check := func(when string) {
				out, err := x.get("")
				switch {
				case value == "" || isDeleted:
					if err == nil {
						fail("%s: got %s, want nothing: absent or deleted", when, out.GetValue())
					} else if r := failed(t, err).reason; r != secret.SecretNotFound {
						fail("%s: got %v, want SECRET_NOT_FOUND", when, err)
					}
				case err != nil || out.GetValue() != value:
					fail("%s: got %v %s, %v, want %s", when, out.GetMetadata().GetGeneration(), out.GetValue(), err, value)
				}
			}
			for n := range 25 {
				mu.Lock()
				quiet := x.clock.Now().After(late)
				mu.Unlock()
				if quiet && draw(6) == 0 {
					// Only who wrote or saw the greater version knows a late one: it has to be
					// put down before.
					for all := x.versions(); value != "" && !isDeleted && all[len(all)-1].Value != value; all = x.versions() {
						check("before a restart")
					}
					x.restart()
					x.reconnect()
				}
				id, next := uuid.NewString(), uri(100+n)
				operation := []string{"put", "put", "rotate", "delete", "recover"}[draw(5)]
				mu.Lock()
				log = append(log, fmt.Sprintf("%d: %s %s at %d", n, operation, next, x.clock.Now().Unix()))
				mu.Unlock()
				for {
					var err error
					switch operation {
					case "put":
						_, err = x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: next, RequestId: id})
					case "rotate":
						_, err = x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: next, AllowMissing: true, RequestId: id})
					case "delete":
						_, err = x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref, AllowMissing: true, RequestId: id})
					case "recover":
						_, err = x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref, RequestId: id})
					}
					if err == nil {
						switch operation {
						case "put", "rotate":
							value, isDeleted = next, false
						case "delete":
							isDeleted = value != ""
						case "recover":
							isDeleted = false
						}
						break
					}
					f := failed(t, err)
					if f.commit == secret.NotApplied && (f.reason == secret.SecretNotFound || f.reason == secret.SecretNotDeleted) {
						if operation == "recover" && isDeleted {
							// What was sent twice may arrive, without a mark, while the name is live
							// for this very recover: it is back then.
							isDeleted = f.reason != secret.SecretNotDeleted
						}
						break
					}
					if f.reason != secret.VaultUnavailable && f.reason != secret.DeadlineExceeded || x.ctx.Err() != nil {
						fail("%d, %s: got %v", n, operation, err)
					}
				}
				check(fmt.Sprintf("after %d, %s", n, operation))
				x.clock.advance(time.Duration(draw(40)) * time.Second)
				check(fmt.Sprintf("later after %d, %s", n, operation))
			}
			x.fake.OnRequest(nil)
			x.clock.advance(2 * time.Minute)
			check("at the end")
		})
	}
}
