package keyvault_test

import (
	"context"
	"errors"
	"maps"
	"testing"
	"time"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/keyvault"
)

// slow is a vault in which a delete, a recover and a purge take as long as in
// Azure, by the test's clock.
func slow(t *testing.T) (*keyvaultfake.Fake, *clock, *keyvault.Vault) {
	t.Helper()
	f, c := start(t, keyvaultfake.Config{Limits: &keyvaultfake.Limits{}})
	return f, c, open(t, config(f, c, f.Broker()))
}

// into brings a name into a state by a person's hand.
func into(f *keyvaultfake.Fake, c *clock, state keyvaultfake.NameState, name string) {
	if state == keyvaultfake.Absent {
		return
	}
	f.PersonSet(name, "one", map[string]string{"a": "1"})
	if state == keyvaultfake.Live {
		return
	}
	f.PersonDelete(name)
	if state == keyvaultfake.Deleting {
		return
	}
	c.advance(time.Minute)
	switch state {
	case keyvaultfake.Recovering:
		f.PersonRecover(name)
	case keyvaultfake.Purging:
		f.PersonPurge(name)
	}
}

func wantState(t *testing.T, f *keyvaultfake.Fake, key secret.Key, want keyvaultfake.NameState) {
	t.Helper()
	if got := f.State(key.String()); got != want {
		t.Errorf("got a name that is %s, want %s", got, want)
	}
}

func wantError(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
	if vault.IsUncertain(got) {
		t.Errorf("%s: got the unknown outcome %v, want a known one", what, got)
	}
}

// TestEachStateBetween asks every method of names in every state.
func TestEachStateBetween(t *testing.T) {
	t.Parallel()
	type answers struct {
		set, update, delete, recover, settle error
		settled                              keyvaultfake.NameState
	}
	for state, want := range map[keyvaultfake.NameState]answers{
		keyvaultfake.Absent:     {nil, vault.ErrNotFound, vault.ErrNotFound, vault.ErrNotFound, vault.ErrNotFound, keyvaultfake.Absent},
		keyvaultfake.Live:       {nil, nil, nil, vault.ErrNotFound, nil, keyvaultfake.Live},
		keyvaultfake.Deleting:   {vault.ErrDeleted, vault.ErrNotFound, vault.ErrNotFound, nil, nil, keyvaultfake.Deleted},
		keyvaultfake.Deleted:    {vault.ErrDeleted, vault.ErrNotFound, vault.ErrNotFound, nil, nil, keyvaultfake.Deleted},
		keyvaultfake.Recovering: {nil, nil, nil, vault.ErrNotFound, nil, keyvaultfake.Live},
		keyvaultfake.Purging:    {vault.ErrDeleted, vault.ErrNotFound, vault.ErrNotFound, vault.ErrNotFound, vault.ErrNotFound, keyvaultfake.Absent},
	} {
		for method, tt := range map[string]struct {
			do   func(v *keyvault.Vault, key secret.Key, version string) error
			want error
			op   keyvaultfake.Op
			then keyvaultfake.NameState
		}{
			"Set": {func(v *keyvault.Vault, key secret.Key, _ string) error {
				_, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("two")})
				return err
			}, want.set, keyvaultfake.OpSet, ""},
			"Update": {func(v *keyvault.Vault, key secret.Key, version string) error {
				_, err := v.Update(t.Context(), key, version, vault.Patch{})
				return err
			}, want.update, keyvaultfake.OpUpdate, ""},
			"Delete": {func(v *keyvault.Vault, key secret.Key, _ string) error {
				_, err := v.Delete(t.Context(), key)
				return err
			}, want.delete, keyvaultfake.OpDelete, ""},
			"Recover": {func(v *keyvault.Vault, key secret.Key, _ string) error {
				return v.Recover(t.Context(), key)
			}, want.recover, "", ""},
			"Settle": {func(v *keyvault.Vault, key secret.Key, _ string) error {
				return v.Settle(t.Context(), key)
			}, want.settle, "", want.settled},
		} {
			t.Run(method+" of "+string(state), func(t *testing.T) {
				t.Parallel()
				f, c, v := slow(t)
				key := newKey(t)
				into(f, c, state, key.String())
				version := "0123456789abcdef0123456789abcdef"
				if versions := f.Versions(key.String()); len(versions) > 0 {
					version = versions[0].ID
				}
				err := tt.do(v, key, version)
				wantError(t, method, err, tt.want)
				if tt.want == nil && err != nil {
					t.Fatal(err)
				}
				if tt.then != "" {
					wantState(t, f, key, tt.then)
				}
				if method == "Recover" && tt.want == nil {
					if _, _, err := v.Get(t.Context(), key, ""); err != nil {
						t.Errorf("Get after Recover: got %v, want nil", err)
					}
				}
				// What no waiting mends is asked once.
				if state != keyvaultfake.Recovering && tt.op != "" {
					wantSent(t, f, tt.op, 1)
				}
			})
		}
	}
}

func TestSettleChangesNothing(t *testing.T) {
	t.Parallel()
	for _, state := range []keyvaultfake.NameState{keyvaultfake.Live, keyvaultfake.Deleting, keyvaultfake.Recovering} {
		t.Run(string(state), func(t *testing.T) {
			t.Parallel()
			f, c, v := slow(t)
			key := newKey(t)
			into(f, c, state, key.String())
			ctx, effects := counted(t.Context())
			if err := v.Settle(ctx, key); err != nil {
				t.Fatal(err)
			}
			versions := f.Versions(key.String())
			if len(versions) != 1 || !versions[0].Enabled || versions[0].Value != "one" || !maps.Equal(versions[0].Tags, map[string]string{"a": "1"}) {
				t.Errorf("got %+v, want the one version as it was", versions)
			}
			if got := effects.Load(); got != 0 {
				t.Errorf("got %d calls of Effect, want none", got)
			}
		})
	}
}

func TestSettleIsNeverUncertain(t *testing.T) {
	t.Parallel()
	f, _, v := slow(t)
	key := newKey(t)
	for _, fault := range []keyvaultfake.Fault{{CutAfter: true}, {Status: 503}} {
		on(f, keyvaultfake.OpUpdate, always, fault)
		wantError(t, "Settle", v.Settle(t.Context(), key), vault.ErrUnavailable)
	}
}

// TestSetAfterRecoverWaits: right after a recover, a name can be read before it
// can be written.
func TestSetAfterRecoverWaits(t *testing.T) {
	t.Parallel()
	for _, w := range writes[:3] {
		t.Run(string(w.op), func(t *testing.T) {
			t.Parallel()
			f, c, v := slow(t)
			key := newKey(t)
			into(f, c, keyvaultfake.Recovering, key.String())
			c.advance(12 * time.Second) // it can be read
			if _, _, err := v.Get(t.Context(), key, ""); err != nil {
				t.Fatal(err)
			}
			version := f.Versions(key.String())[0].ID
			if err := w.do(t.Context(), v, key, version); err != nil {
				t.Fatal(err)
			}
			requests := sent(f, w.op)
			if first := requests[0]; first.Inner != "ObjectIsBeingRecovered" {
				t.Errorf("got %d %s at first, want ObjectIsBeingRecovered", first.Status, first.Inner)
			}
			if last := requests[len(requests)-1]; last.Status != 200 {
				t.Errorf("got %d %s at last, want 200", last.Status, last.Inner)
			}
		})
	}
}

// TestFirstIsNotWaitedOut: what is expected to be absent is not put on top of what
// comes back.
func TestFirstIsNotWaitedOut(t *testing.T) {
	t.Parallel()
	for state, want := range map[keyvaultfake.NameState]error{
		keyvaultfake.Absent:     nil,
		keyvaultfake.Deleting:   vault.ErrDeleted,
		keyvaultfake.Deleted:    vault.ErrDeleted,
		keyvaultfake.Recovering: vault.ErrDeleted,
		keyvaultfake.Purging:    vault.ErrDeleted,
	} {
		t.Run(string(state), func(t *testing.T) {
			t.Parallel()
			f, c, v := slow(t)
			key := newKey(t)
			into(f, c, state, key.String())
			_, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("two"), First: true})
			wantError(t, "Set", err, want)
			wantSent(t, f, keyvaultfake.OpSet, 1)
			if (err == nil) != (want == nil) {
				t.Errorf("got %v, want %v", err, want)
			}
		})
	}
}

// TestImpatience: who cannot wait for the end of a state between is not told that
// the name is deleted or gone, which it may not be.
func TestImpatience(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]func(context.Context) (context.Context, context.CancelFunc){
		"deadline": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 400*time.Millisecond)
		},
		"patience": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return vault.WithOrigin(ctx, vault.Origin{Patience: time.Now().Add(400 * time.Millisecond)}), func() {}
		},
	} {
		for method, do := range map[string]func(context.Context, *keyvault.Vault, secret.Key, string) error{
			"Set": writes[0].do, "Update": writes[1].do, "Delete": writes[2].do, "Recover": writes[3].do,
			"Settle": func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
				return v.Settle(ctx, key)
			},
		} {
			t.Run(method+" "+name, func(t *testing.T) {
				t.Parallel()
				f, c, v := slow(t)
				key := newKey(t)
				into(f, c, keyvaultfake.Recovering, key.String())
				ctx, cancel := limit(t.Context())
				defer cancel()
				err := do(ctx, v, key, f.Versions(key.String())[0].ID)
				wantError(t, method, err, vault.ErrUnavailable)
				if errors.Is(err, vault.ErrDeleted) || errors.Is(err, vault.ErrNotFound) {
					t.Errorf("got %v, want no judgement of the name", err)
				}
			})
		}
	}
}

// TestStateThatDoesNotEnd is given up by itself: no deadline, and yet an answer.
func TestStateThatDoesNotEnd(t *testing.T) {
	t.Parallel()
	for method, do := range map[string]func(context.Context, *keyvault.Vault, secret.Key, string) error{
		"Set": writes[0].do, "Update": writes[1].do, "Delete": writes[2].do, "Recover": writes[3].do,
		"Settle": func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
			return v.Settle(ctx, key)
		},
	} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, keyvaultfake.Config{Limits: &keyvaultfake.Limits{}, Transitions: &keyvaultfake.Transitions{Recover: 30 * time.Minute}})
			v := open(t, config(f, c, f.Broker()))
			key := newKey(t)
			into(f, c, keyvaultfake.Recovering, key.String())
			wantError(t, method, do(t.Context(), v, key, f.Versions(key.String())[0].ID), vault.ErrUnavailable)
			wantState(t, f, key, keyvaultfake.Recovering)
		})
	}
	t.Run("Recover that was taken", func(t *testing.T) {
		t.Parallel()
		f, c := start(t, keyvaultfake.Config{Limits: &keyvaultfake.Limits{}, Transitions: &keyvaultfake.Transitions{Recover: 30 * time.Minute}})
		v := open(t, config(f, c, f.Broker()))
		key := newKey(t)
		into(f, c, keyvaultfake.Deleted, key.String())
		if err := v.Recover(t.Context(), key); !errors.Is(err, vault.ErrUnavailable) || !vault.IsUncertain(err) {
			t.Errorf("got %v, want ErrUnavailable of unknown outcome", err)
		}
	})
}

// TestConflictWithoutACode is settled by looking at the name.
func TestConflictWithoutACode(t *testing.T) {
	t.Parallel()
	for _, state := range []keyvaultfake.NameState{keyvaultfake.Live, keyvaultfake.Deleting, keyvaultfake.Deleted} {
		for n, w := range writes {
			if w.op == keyvaultfake.OpRecover && state == keyvaultfake.Live {
				continue // nothing to recover
			}
			t.Run(string(w.op)+" of "+string(state), func(t *testing.T) {
				t.Parallel()
				f, c, v := slow(t)
				key := newKey(t)
				into(f, c, state, key.String())
				times := int64(1)
				if state != keyvaultfake.Live && w.op != keyvaultfake.OpRecover {
					times = always // the vault never says more
				}
				on(f, w.op, times, keyvaultfake.Fault{Status: 409})
				err := w.do(t.Context(), v, key, f.Versions(key.String())[0].ID)
				var want error
				if state != keyvaultfake.Live {
					want = []error{vault.ErrDeleted, vault.ErrNotFound, vault.ErrNotFound, nil}[n]
				}
				wantError(t, string(w.op), err, want)
				if want == nil && err != nil {
					t.Errorf("got %v, want it done", err)
				}
			})
		}
	}
}

// TestConflictOfARead: no vault is known to say so, and it is no defect.
func TestConflictOfARead(t *testing.T) {
	t.Parallel()
	f, _, v := slow(t)
	key := newKey(t)
	f.PersonSet(key.String(), "one", nil)
	on(f, keyvaultfake.OpGet, 1, keyvaultfake.Fault{Status: 409, Inner: "ObjectIsBeingRecovered"})
	if _, _, err := v.Get(t.Context(), key, ""); err != nil {
		t.Errorf("got %v, want the second answer", err)
	}
	on(f, keyvaultfake.OpGet, always, keyvaultfake.Fault{Status: 409})
	_, _, err := v.Get(t.Context(), key, "")
	wantError(t, "Get", err, vault.ErrUnavailable)
}

func TestDeletedIsRememberedUntilItIsSeen(t *testing.T) {
	t.Parallel()
	f, c, v := slow(t)
	key := newKey(t)
	_, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("one"), Tags: vault.Tags{"a": "1"}})
	if err != nil {
		t.Fatal(err)
	}
	d, err := v.Delete(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	wantState(t, f, key, keyvaultfake.Deleting)
	d.Tags["a"] = "changed by the caller"
	for range 2 {
		got, err := v.GetDeleted(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if got.Version != d.Version || !got.DeletedAt.Equal(d.DeletedAt) || !got.PurgeAt.Equal(d.PurgeAt) || got.Tags["a"] != "1" {
			t.Errorf("got %+v, want %+v", got, d)
		}
		got.Tags["a"] = "changed by the caller"
	}
	c.advance(20 * time.Second)
	wantState(t, f, key, keyvaultfake.Deleted)
	got, err := v.GetDeleted(t.Context(), key)
	if err != nil || got.Version != d.Version {
		t.Errorf("got %+v, %v, want version %s", got, err, d.Version)
	}
}

// TestDeletedIsForgotten: memory gives way to what was seen since, and to time.
func TestDeletedIsForgotten(t *testing.T) {
	t.Parallel()
	recovered := func(f *keyvaultfake.Fake, c *clock, key secret.Key) {
		c.advance(time.Second)
		f.PersonRecover(key.String())
		c.advance(time.Second)
	}
	for name, tt := range map[string]struct {
		meanwhile func(f *keyvaultfake.Fake, c *clock, key secret.Key)
		look      func(ctx context.Context, v *keyvault.Vault, key secret.Key, version string) error
	}{
		"Get": {recovered, func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
			_, _, err := v.Get(ctx, key, "")
			return err
		}},
		"Get of a disabled version": {
			func(f *keyvaultfake.Fake, c *clock, key secret.Key) {
				recovered(f, c, key)
				f.PersonUpdate(key.String(), "", false, nil)
			},
			func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
				_, _, err := v.Get(ctx, key, "")
				if errors.Is(err, vault.ErrDisabled) {
					err = nil
				}
				return err
			},
		},
		"Versions": {recovered, func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
			_, err := v.Versions(ctx, key)
			return err
		}},
		"Set":    {recovered, writes[0].do},
		"Update": {recovered, writes[1].do},
		"Settle": {recovered, func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
			return v.Settle(ctx, key)
		}},
		"Recover": {
			func(_ *keyvaultfake.Fake, c *clock, _ secret.Key) { c.advance(time.Second) },
			func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
				return v.Recover(ctx, key)
			},
		},
		"Settle of a purged name": {
			func(f *keyvaultfake.Fake, c *clock, key secret.Key) {
				c.advance(time.Second)
				f.PersonPurge(key.String())
			},
			func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
				if err := v.Settle(ctx, key); !errors.Is(err, vault.ErrNotFound) {
					return errors.Join(errors.New("it is not purged"), err)
				}
				return nil
			},
		},
		"30 s later": {
			func(f *keyvaultfake.Fake, c *clock, key secret.Key) {
				c.advance(time.Second)
				f.PersonPurge(key.String())
				c.advance(30 * time.Second)
			},
			func(context.Context, *keyvault.Vault, secret.Key, string) error { return nil },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, keyvaultfake.Config{Transitions: &keyvaultfake.Transitions{Delete: time.Second, Recover: time.Second}})
			v := open(t, config(f, c, f.Broker()))
			key := newKey(t)
			p := set(t, v, key, "one")
			if _, err := v.Delete(t.Context(), key); err != nil {
				t.Fatal(err)
			}
			if _, err := v.GetDeleted(t.Context(), key); err != nil {
				t.Fatalf("right after the delete: got %v, want nil", err)
			}
			tt.meanwhile(f, c, key)
			if err := tt.look(t.Context(), v, key, p.Version); err != nil {
				t.Fatal(err)
			}
			_, err := v.GetDeleted(t.Context(), key)
			wantError(t, "GetDeleted", err, vault.ErrNotFound)
		})
	}
}
