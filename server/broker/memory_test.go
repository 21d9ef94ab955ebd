package broker_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
)

// TestRefusedWriteBringsNothingBack: a write that came upon a deleted secret, and then
// to nothing, leaves no value from before that.
func TestRefusedWriteBringsNothingBack(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	x.put(key, "one")
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		switch op {
		case "Set":
			if _, err := x.vault.Vault.Delete(context.Background(), key); err != nil {
				t.Error(err)
			}
		case "Settle":
			return vault.ErrRefused
		}
		return nil
	})
	_, err := x.Put(t.Context(), another, broker.PutRequest{Key: key, Value: secret.NewValue("two")})
	wantError(t, err, secret.VaultRefused, secret.NotApplied)
	x.wantInOutage(key, "")
}

// TestHalfALookAtADisabledSecret: once the vault says that a secret is disabled, what
// the look saw before that is not kept, though the rest of it fails.
func TestHalfALookAtADisabledSecret(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	versions := []string{x.put(key, "one"), x.put(key, "two")}
	x.advance(time.Minute)
	gets, lists := 0, 0
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		switch op {
		case "Get":
			if gets++; gets != 2 { // that of the version's value
				return nil
			}
			for _, version := range versions {
				if _, err := x.vault.Vault.Update(context.Background(), key, version, vault.Patch{}); err != nil {
					t.Error(err)
				}
			}
		case "Versions":
			if lists++; lists > 1 {
				return vault.ErrUnavailable
			}
		}
		return nil
	})
	_, err := x.Get(t.Context(), another, broker.GetRequest{Key: key, Version: versions[0]})
	wantError(t, err, secret.VaultUnavailable, "")
	if gets < 3 || lists < 2 {
		t.Errorf("got %d reads and %d lists, want a second look", gets, lists)
	}
	x.wantInOutage(key, "")
}

// personDeletes deletes a secret in the vault.
func (x *crossing) personDeletes(key secret.Key) {
	x.t.Helper()
	if _, err := x.vault.Vault.Delete(context.Background(), key); err != nil {
		x.t.Error(err)
	}
}

// wantNone reads a secret from the vault, which gives no value.
func (x *crossing) wantNone(key secret.Key) {
	x.t.Helper()
	if r, err := x.Get(x.t.Context(), another, broker.GetRequest{Key: key, MaxStaleness: within(0)}); err == nil {
		x.t.Errorf("got %q, want nothing", r.Value.Reveal())
	}
}

// TestNothingToldIsBroughtBack: once somebody was told that a secret is not to be read,
// what others had found before that is not kept, however late they come to their end.
func TestNothingToldIsBroughtBack(t *testing.T) {
	t.Parallel()
	list := func(x *crossing, key secret.Key) error {
		_, err := x.List(x.t.Context(), another, broker.ListRequest{Instance: key.InstanceID(), PageSize: 10, Visible: func(secret.Key) bool { return true }})
		return err
	}
	put := func(x *crossing, key secret.Key) error {
		_, err := x.Put(x.t.Context(), another, broker.PutRequest{Key: key, Value: secret.NewValue("two")})
		return err
	}
	describe := func(x *crossing, key secret.Key) error {
		_, err := x.Describe(x.t.Context(), another, key)
		return err
	}
	deleted := func(x *crossing, key secret.Key) { x.personDeletes(key) }
	refused := func(x *crossing, _ secret.Key) {
		x.vault.SetBefore(func(context.Context, string, secret.Key) error { return vault.ErrRefused })
	}
	for name, test := range map[string]struct {
		call func(x *crossing, key secret.Key) error
		// What happens while the call is at this operation, or its first answer on its way,
		// and then somebody reads.
		at   string
		what func(x *crossing, key secret.Key)
	}{
		"put, deleted":      {put, "Set", deleted},
		"put, refused":      {put, "Set", refused},
		"describe, refused": {describe, "", refused},
		"list, refused":     {list, "", refused},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
			x.put(key, "one")
			happens := func() {
				x.advance(time.Second)
				x.vault.SetBefore(nil)
				x.vault.SetAfter(nil)
				test.what(x, key)
				x.wantNone(key)
				x.vault.SetBefore(nil)
			}
			if test.at == "Set" {
				x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
					if op != test.at {
						return nil
					}
					happens()
					return vault.ErrUnavailable // it is not sent
				})
			} else {
				x.vault.SetAfter(func(_ context.Context, op string, k secret.Key, err error) error {
					if op == "Get" && k == key { // its answer is on its way
						happens()
					}
					return err
				})
			}
			if err := test.call(x, key); (err != nil) != (test.at == "Set") {
				t.Fatal(err)
			}
			x.wantInOutage(key, "")
		})
	}
}

// TestReadUnderWayDuringAWriteThatCameToNothing: its answer counts, although the write
// ended after it was sent, with what it had found.
func TestReadUnderWayDuringAWriteThatCameToNothing(t *testing.T) {
	t.Parallel()
	for name, value := range map[string]string{"unchanged": "one", "failed": "two"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
			x.put(key, "one")
			x.advance(time.Minute)
			sent, open := make(chan struct{}), make(chan struct{})
			var result chan got
			var once sync.Once
			x.vault.SetAfter(func(ctx context.Context, op string, _ secret.Key, err error) error {
				once.Do(func() { // the write found the secret
					x.advance(time.Second)
					result = read(t, x.Broker, broker.GetRequest{Key: key, MaxStaleness: within(0)})
					<-sent
				})
				return err
			})
			var reads atomic.Int64
			x.vault.SetBefore(func(ctx context.Context, op string, _ secret.Key) error {
				switch {
				case op == "Set":
					return vault.ErrUnavailable
				case op == "Get" && reads.Add(1) == 2:
					close(sent)
					<-open
				}
				return nil
			})
			if _, err := x.Put(t.Context(), another, broker.PutRequest{Key: key, Value: secret.NewValue(value)}); (err != nil) != (name == "failed") {
				t.Fatal(err)
			}
			x.personDeletes(key)
			close(open)
			if r := <-result; r.err == nil {
				t.Fatalf("got %q, want nothing", r.Value.Reveal())
			}
			x.wantInOutage(key, "")
		})
	}
}

// TestHalfAnAnswerIsRemembered: after the vault said to whomever that a secret is not as
// it was, and then no more, nothing is served of it.
func TestHalfAnAnswerIsRemembered(t *testing.T) {
	t.Parallel()
	for name, call := range map[string]func(x *crossing, key secret.Key) error{
		"describe": func(x *crossing, key secret.Key) error {
			_, err := x.Describe(x.t.Context(), another, key)
			return err
		},
		"delete": func(x *crossing, key secret.Key) error {
			_, err := x.Delete(x.t.Context(), another, broker.DeleteRequest{Key: key})
			return err
		},
		"rotate": func(x *crossing, key secret.Key) error {
			_, err := x.Rotate(x.t.Context(), another, broker.RotateRequest{Key: key, NewValue: secret.NewValue("two")})
			return err
		},
	} {
		for _, rest := range []string{"GetDeleted", "Versions"} {
			t.Run(name+" without "+rest, func(t *testing.T) {
				t.Parallel()
				x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
				version := x.put(key, "one")
				if rest == "GetDeleted" {
					x.personDeletes(key)
				} else if _, err := x.vault.Vault.Update(t.Context(), key, version, vault.Patch{}); err != nil {
					t.Fatal(err)
				}
				x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
					if op == rest {
						return vault.ErrUnavailable
					}
					return nil
				})
				if err := call(x, key); err == nil {
					t.Fatal("got no error")
				}
				x.wantInOutage(key, "")
			})
		}
	}
}

// TestVersionsThatThereAreNot take no place of the one in grace.
func TestVersionsThatThereAreNot(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.RegistrationToken, "demo")
	old := x.put(key, "token-one")
	x.rotate(key, secret.Value{})
	for i := range 6 {
		_, err := x.Get(t.Context(), another, broker.GetRequest{Key: key, Version: fmt.Sprintf("%032x", i)})
		wantError(t, err, secret.VersionNotFound, "")
	}
	x.vault.SetBefore(func(context.Context, string, secret.Key) error { return vault.ErrUnavailable })
	if _, err := x.Get(t.Context(), another, broker.GetRequest{Key: key, Version: old}); err != nil {
		t.Error(err)
	}
	if v, err := x.Verify(t.Context(), another, key, secret.NewValue("token-one")); err != nil || v.Result != broker.MatchPrevious {
		t.Errorf("got %v, %v, want that it matches the previous one", v, err)
	}
}

// TestReplacedVersionIsAsOldAsTheLookAtIt, however long its successor was on the way.
func TestReplacedVersionIsAsOldAsTheLookAtIt(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	old := x.put(key, "one")
	var once sync.Once
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) (err error) {
		if op == "Set" {
			once.Do(func() {
				if _, err := x.vault.Vault.Update(context.Background(), key, old, vault.Patch{}); err != nil {
					t.Error(err)
				}
				x.advance(time.Minute)
				err = vault.ErrThrottled
			})
		}
		return err
	})
	x.put(key, "two")
	_, err := x.Get(t.Context(), another, broker.GetRequest{Key: key, Version: old})
	wantError(t, err, secret.SecretDisabled, "")
}

// TestInstancesAreKnown, for how soon their tokens are looked up, also when memory let go
// of them and somebody else wrote them.
func TestInstancesAreKnown(t *testing.T) {
	t.Parallel()
	for name, write := range map[string]func(x *crossing, key secret.Key){
		"by the broker": func(x *crossing, key secret.Key) { x.put(key, "token") },
		"outside":       func(x *crossing, key secret.Key) { x.person(key, "token") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, key := newCrossing(t), keyOf(t, secret.RegistrationToken, "demo")
			write(x, key)
			x.ttl, x.stale = time.Millisecond, broker.NoStaleOnError
			x.restart()
			var asked []vault.Priority
			x.vault.SetBefore(func(ctx context.Context, op string, _ secret.Key) error {
				if op == "Get" {
					asked = append(asked, vault.OriginOf(ctx).Priority)
				}
				return nil
			})
			for len(asked) < 3 { // the cache's own clock goes on meanwhile
				if v, err := x.Verify(t.Context(), another, key, secret.NewValue("token")); err != nil || v.Result != broker.MatchCurrent {
					t.Fatal(v, err)
				}
			}
			if want := []vault.Priority{vault.Verifying, vault.VerifyingKnown, vault.VerifyingKnown}; !slices.Equal(asked, want) {
				t.Errorf("got priorities %v, want %v", asked, want)
			}
		})
	}
}

// TestDescribeWhileOthersAreWritten: that many other secrets change takes nothing from
// what is remembered of the one that is described.
func TestDescribeWhileOthersAreWritten(t *testing.T) {
	t.Parallel()
	x, key := newCrossing(t), keyOf(t, secret.DatabaseURI, "demo")
	x.put(key, "one")
	x.vault.SetBefore(func(_ context.Context, op string, k secret.Key) error {
		for i := 0; op == "Get" && k == key && i < 1000; i++ { // some that share its place
			if _, err := x.Delete(t.Context(), another, broker.DeleteRequest{Key: keyOf(t, secret.DatabaseURI, "other-%d", i), AllowMissing: true}); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	if _, err := x.Describe(t.Context(), another, key); err != nil {
		t.Error(err)
	}
	x.wantInOutage(key, "one")
}
