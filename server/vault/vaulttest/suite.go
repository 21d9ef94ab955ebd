// Package vaulttest is for tests: the suite that every vault passes, and a vault
// that fails on demand for the tests of what stands above one.
package vaulttest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// Run holds a vault against every sentence of the interface. open makes a vault
// for one test, which closes it; vaults may share what they keep, since every
// test uses keys of its own. Of a vault that discards only what it promises is
// asked.
func Run(t *testing.T, open func(t *testing.T) vault.Vault) {
	var s suite
	tests := []struct {
		name     string
		test     func(*testing.T, vault.Vault)
		discards bool // also for a vault that discards
	}{
		{"Info", s.info, true},
		{"Check", s.check, true},
		{"Set", s.set, true},
		{"SetAndGet", s.setAndGet, false},
		{"Values", s.values, false},
		{"Absent", s.absent, true},
		{"Versions", s.versions, false},
		{"Update", s.update, false},
		{"Disabled", s.disabled, false},
		{"TagLimits", s.tagLimits, true},
		{"TagsAreCopied", s.tagsAreCopied, false},
		{"SoftDelete", s.softDelete, false},
		{"Recover", s.recover, false},
		{"RecoverKeepsDisabled", s.recoverKeepsDisabled, false},
		{"Settle", s.settle, true},
		{"DeleteForgets", s.deleteForgets, true},
		{"List", s.list, false},
		{"ListMovesWithDelete", s.listMovesWithDelete, false},
		{"ListIsEmpty", s.listIsEmpty, true},
		{"BadSkip", s.badSkip, true},
		{"KindsAreApart", s.kindsAreApart, false},
		{"ConcurrentSets", s.concurrentSets, false},
		{"ConcurrentDeletes", s.concurrentDeletes, false},
		{"CancelledContext", s.cancelled, true},
		{"Close", s.close, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			v := open(t)
			t.Cleanup(func() { _ = v.Close() })
			if v.Info().Discards && !tt.discards {
				t.Skip("this vault discards")
			}
			tt.test(t, v)
		})
	}
}

type suite struct{}

var versionForm = regexp.MustCompile(`^[0-9A-Za-z]{1,32}$`)

func (suite) info(t *testing.T, v vault.Vault) {
	info := v.Info()
	if info.Name == "" {
		t.Error("no name")
	}
	if hasLocation := !info.Location.Equal(slog.Attr{}); hasLocation == info.Discards {
		t.Errorf("got location %v with discards %v, want one exactly of what keeps something", info.Location, info.Discards)
	}
	if again := v.Info(); again.Name != info.Name || !again.Location.Equal(info.Location) || again.Discards != info.Discards {
		t.Errorf("got %v, then %v", info, again)
	}
}

func (suite) check(t *testing.T, v vault.Vault) {
	if err := v.Check(t.Context()); err != nil {
		t.Errorf("got %v, want nil", err)
	}
}

func (suite) set(t *testing.T, v vault.Vault) {
	key := newKey(t, secret.DatabaseURI)
	tags := vault.Tags{"a": "1"}
	p, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("postgres://db/1"), ContentType: "text/plain", Tags: tags})
	if err != nil {
		t.Fatal(err)
	}
	if !versionForm.MatchString(p.Version) {
		t.Errorf("got version %q", p.Version)
	}
	want := vault.Properties{Key: key, Version: p.Version, Enabled: true, Created: p.Created, ContentType: "text/plain", Tags: tags}
	wantProperties(t, p, want)
	wantSeconds(t, p.Created)
}

func (suite) setAndGet(t *testing.T, v vault.Vault) {
	key := newKey(t, secret.DatabaseURI)
	first := set(t, v, key, "one", vault.Tags{"n": "1"})
	wantGet(t, v, key, "", first, "one")
	second := set(t, v, key, "two", nil)
	if first.Version == second.Version {
		t.Fatalf("both versions are %q", first.Version)
	}
	wantGet(t, v, key, "", second, "two")
	wantGet(t, v, key, first.Version, first, "one")
	wantGet(t, v, key, second.Version, second, "two")

	// The same value again is a version of its own.
	third := set(t, v, key, "two", nil)
	if third.Version == second.Version {
		t.Error("the same value made no new version")
	}
	if second.Created.Before(first.Created) || third.Created.Before(second.Created) {
		t.Error("a later version was created earlier")
	}
}

func (suite) values(t *testing.T, v vault.Vault) {
	for name, value := range map[string]string{
		"largest":  strings.Repeat("x", 25_000),
		"text":     "Grüße, 世界\n\t\"'\\ %s <&>",
		"one byte": "x",
	} {
		key := newKey(t, secret.OIDCClientSecret)
		p := set(t, v, key, value, nil)
		if _, got, err := v.Get(t.Context(), key, p.Version); err != nil || !got.Equal(secret.NewValue(value)) {
			t.Errorf("%s: got another value, error %v", name, err)
		}
	}
}

func (suite) absent(t *testing.T, v vault.Vault) {
	ctx, key := t.Context(), newKey(t, secret.DatabaseURI)
	_, _, err := v.Get(ctx, key, "")
	wantError(t, "Get", err, vault.ErrNotFound)
	_, _, err = v.Get(ctx, key, noVersion())
	wantError(t, "Get of a version", err, vault.ErrNotFound)
	_, err = v.Versions(ctx, key)
	wantError(t, "Versions", err, vault.ErrNotFound)
	_, err = v.Update(ctx, key, noVersion(), vault.Patch{Enabled: true})
	wantError(t, "Update", err, vault.ErrNotFound)
	_, err = v.GetDeleted(ctx, key)
	wantError(t, "GetDeleted", err, vault.ErrNotFound)
	wantError(t, "Recover", v.Recover(ctx, key), vault.ErrNotFound)
	if !v.Info().Discards {
		_, err = v.Delete(ctx, key)
		wantError(t, "Delete", err, vault.ErrNotFound)
	}
}

func (suite) versions(t *testing.T, v vault.Vault) {
	key := newKey(t, secret.DatabaseURI)
	want := map[string]vault.Properties{}
	for n := range 30 { // more than a page of Key Vault's
		p := set(t, v, key, fmt.Sprint("value ", n), vault.Tags{"n": fmt.Sprint(n)})
		want[p.Version] = p
	}
	wantVersions(t, v, key, want)

	// A key whose name begins alike has versions of its own.
	id, err := secret.ParseInstanceID(key.InstanceID().String() + "0")
	if err != nil {
		t.Fatal(err)
	}
	neighbour := must(secret.NewKey(id, secret.DatabaseURI))
	p := set(t, v, neighbour, "other", nil)
	wantVersions(t, v, neighbour, map[string]vault.Properties{p.Version: p})
	wantVersions(t, v, key, want)

	_, _, err = v.Get(t.Context(), key, p.Version)
	wantError(t, "Get of a neighbour's version", err, vault.ErrNotFound)
	for _, version := range []string{noVersion(), "0", strings.Repeat("z", 32)} {
		_, _, err = v.Get(t.Context(), key, version)
		wantError(t, "Get of version "+version, err, vault.ErrNotFound)
	}
}

func (suite) update(t *testing.T, v vault.Vault) {
	key := newKey(t, secret.DatabaseURI)
	older, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("one"), ContentType: "text/one", Tags: vault.Tags{"a": "1", "b": "2"}})
	if err != nil {
		t.Fatal(err)
	}
	current := set(t, v, key, "two", vault.Tags{"c": "3"})

	for _, tt := range []struct {
		before vault.Properties
		value  string
		tags   vault.Tags
	}{
		{older, "one", vault.Tags{"b": "3", "d": ""}},
		{older, "one", nil},
		{current, "two", vault.Tags{"e": "5"}},
		{current, "two", nil},
	} {
		want := tt.before
		want.Tags = tt.tags
		got, err := v.Update(t.Context(), key, tt.before.Version, vault.Patch{Enabled: true, Tags: tt.tags})
		if err != nil {
			t.Fatal(err)
		}
		wantProperties(t, got, want)
		wantGet(t, v, key, tt.before.Version, want, tt.value)
	}
	current.Tags = nil
	wantGet(t, v, key, "", current, "two")
	_, err = v.Update(t.Context(), key, noVersion(), vault.Patch{Enabled: true})
	wantError(t, "Update of no version", err, vault.ErrNotFound)
}

func (suite) disabled(t *testing.T, v vault.Vault) {
	ctx, key := t.Context(), newKey(t, secret.DatabaseURI)
	older := set(t, v, key, "one", nil)
	current := set(t, v, key, "two", vault.Tags{"a": "1"})

	off, err := v.Update(ctx, key, current.Version, vault.Patch{Enabled: false, Tags: current.Tags})
	if err != nil {
		t.Fatal(err)
	}
	current.Enabled = false
	wantProperties(t, off, current)
	for _, version := range []string{"", current.Version} {
		p, value, err := v.Get(ctx, key, version)
		wantError(t, "Get", err, vault.ErrDisabled)
		if p.Version != "" || p.Tags != nil || !value.IsEmpty() {
			t.Errorf("got %v beside ErrDisabled, want nothing", p)
		}
	}
	wantGet(t, v, key, older.Version, older, "one")
	wantVersions(t, v, key, map[string]vault.Properties{older.Version: older, current.Version: current})

	// An update finds a disabled version; one that leaves it so, too.
	if _, err := v.Update(ctx, key, current.Version, vault.Patch{Enabled: false}); err != nil {
		t.Fatal(err)
	}
	current.Tags = nil
	wantVersions(t, v, key, map[string]vault.Properties{older.Version: older, current.Version: current})
	on, err := v.Update(ctx, key, current.Version, vault.Patch{Enabled: true})
	if err != nil {
		t.Fatal(err)
	}
	current.Enabled = true
	wantProperties(t, on, current)
	wantGet(t, v, key, "", current, "two")

	// A new version over a disabled one is enabled.
	if _, err := v.Update(ctx, key, current.Version, vault.Patch{}); err != nil {
		t.Fatal(err)
	}
	third := set(t, v, key, "three", nil)
	wantGet(t, v, key, "", third, "three")
	_, _, err = v.Get(ctx, key, current.Version)
	wantError(t, "Get of the disabled version", err, vault.ErrDisabled)
}

func (suite) tagLimits(t *testing.T, v vault.Vault) {
	ctx, key := t.Context(), newKey(t, secret.DatabaseURI)
	most := vault.Tags{}
	for n := range versions.MaxTags {
		most[fmt.Sprintf("%02d", n)+strings.Repeat("n", versions.MaxTagChars-2)] = strings.Repeat("v", versions.MaxTagChars)
	}
	more := maps.Clone(most)
	more["one more"] = ""
	tooMany := map[string]vault.Tags{
		"too many":       more,
		"name too long":  {strings.Repeat("n", versions.MaxTagChars+1): ""},
		"value too long": {"n": strings.Repeat("v", versions.MaxTagChars+1)},
	}

	p, err := v.Set(ctx, key, vault.NewVersion{Value: secret.NewValue("x"), Tags: most})
	if err != nil {
		t.Fatalf("Set with the most tags: %v", err)
	}
	wantTags(t, p.Tags, most)
	for name, tags := range tooMany {
		if _, err := v.Set(ctx, key, vault.NewVersion{Value: secret.NewValue("y"), Tags: tags}); err == nil || vault.IsUncertain(err) {
			t.Errorf("Set, %s: got %v, want a certain error", name, err)
		}
	}
	if v.Info().Discards {
		return
	}
	for name, tags := range tooMany {
		if _, err := v.Update(ctx, key, p.Version, vault.Patch{Enabled: true, Tags: tags}); err == nil || vault.IsUncertain(err) {
			t.Errorf("Update, %s: got %v, want a certain error", name, err)
		}
	}
	wantGet(t, v, key, "", p, "x") // none of them did anything
}

func (suite) tagsAreCopied(t *testing.T, v vault.Vault) {
	key, tags := newKey(t, secret.DatabaseURI), vault.Tags{"a": "1"}
	p := set(t, v, key, "x", tags)
	tags["a"] = "2"
	want := p
	want.Tags = vault.Tags{"a": "1"}
	wantGet(t, v, key, "", want, "x")
	p.Tags["a"] = "3"
	wantGet(t, v, key, "", want, "x")
}

func (suite) softDelete(t *testing.T, v vault.Vault) {
	ctx, key := t.Context(), newKey(t, secret.DatabaseURI)
	older := set(t, v, key, "one", nil)
	current := set(t, v, key, "two", vault.Tags{"a": "1"})

	deleted, err := v.Delete(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	wantProperties(t, deleted.Properties, current)
	wantSeconds(t, deleted.DeletedAt)
	if !deleted.PurgeAt.After(deleted.DeletedAt) {
		t.Errorf("got purge at %v, want it after %v", deleted.PurgeAt, deleted.DeletedAt)
	}
	again, err := v.GetDeleted(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	wantProperties(t, again.Properties, current)
	if !again.DeletedAt.Equal(deleted.DeletedAt) || !again.PurgeAt.Equal(deleted.PurgeAt) {
		t.Errorf("GetDeleted: got %v and %v, want %v and %v", again.DeletedAt, again.PurgeAt, deleted.DeletedAt, deleted.PurgeAt)
	}

	for _, version := range []string{"", current.Version, older.Version} {
		_, _, err := v.Get(ctx, key, version)
		wantError(t, "Get", err, vault.ErrNotFound)
	}
	_, err = v.Versions(ctx, key)
	wantError(t, "Versions", err, vault.ErrNotFound)
	_, err = v.Update(ctx, key, current.Version, vault.Patch{Enabled: true})
	wantError(t, "Update", err, vault.ErrNotFound)
	_, err = v.Delete(ctx, key)
	wantError(t, "Delete", err, vault.ErrNotFound)
	_, err = v.Set(ctx, key, vault.NewVersion{Value: secret.NewValue("three")})
	wantError(t, "Set", err, vault.ErrDeleted)
	if vault.IsUncertain(err) {
		t.Error("Set on a deleted name is uncertain")
	}
}

func (suite) recover(t *testing.T, v vault.Vault) {
	ctx, key := t.Context(), newKey(t, secret.DatabaseURI)
	older := set(t, v, key, "one", vault.Tags{"a": "1"})
	current := set(t, v, key, "two", nil)
	all := map[string]vault.Properties{older.Version: older, current.Version: current}
	wantError(t, "Recover of a live name", v.Recover(ctx, key), vault.ErrNotFound)
	for range 2 {
		if _, err := v.Delete(ctx, key); err != nil {
			t.Fatal(err)
		}
		if err := v.Recover(ctx, key); err != nil {
			t.Fatal(err)
		}
		wantGet(t, v, key, "", current, "two")
		wantGet(t, v, key, older.Version, older, "one")
		wantVersions(t, v, key, all)
		_, err := v.GetDeleted(ctx, key)
		wantError(t, "GetDeleted of a recovered name", err, vault.ErrNotFound)
		wantError(t, "Recover of a recovered name", v.Recover(ctx, key), vault.ErrNotFound)
	}
	third := set(t, v, key, "three", nil)
	all[third.Version] = third
	wantGet(t, v, key, "", third, "three")
	wantVersions(t, v, key, all)
}

func (suite) recoverKeepsDisabled(t *testing.T, v vault.Vault) {
	ctx, key := t.Context(), newKey(t, secret.DatabaseURI)
	p := set(t, v, key, "one", nil)
	if _, err := v.Update(ctx, key, p.Version, vault.Patch{Tags: vault.Tags{"why": "a test"}}); err != nil {
		t.Fatal(err)
	}
	deleted, err := v.Delete(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	if deleted.Enabled || deleted.Tags["why"] != "a test" {
		t.Errorf("got enabled %v and tags %v, want the version as it was", deleted.Enabled, deleted.Tags)
	}
	if err := v.Recover(ctx, key); err != nil {
		t.Fatal(err)
	}
	_, _, err = v.Get(ctx, key, "")
	wantError(t, "Get", err, vault.ErrDisabled)
}

func (suite) settle(t *testing.T, v vault.Vault) {
	ctx, key := t.Context(), newKey(t, secret.DatabaseURI)
	wantError(t, "Settle of an absent name", v.Settle(ctx, key), vault.ErrNotFound)
	p := set(t, v, key, "one", vault.Tags{"a": "1"})
	if v.Info().Discards {
		return
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"live", func() error { return nil }},
		{"deleted", func() error { _, err := v.Delete(ctx, key); return err }},
		{"recovered", func() error { return v.Recover(ctx, key) }},
	} {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if err := v.Settle(ctx, key); err != nil {
			t.Errorf("Settle of a %s name: got %v, want nil", step.name, err)
		}
	}
	wantGet(t, v, key, "", p, "one") // and changed nothing
}

// deleteForgets: what discards has nothing to purge.
func (suite) deleteForgets(t *testing.T, v vault.Vault) {
	key := newKey(t, secret.DatabaseURI)
	set(t, v, key, "one", nil)
	d, err := v.Delete(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if d.Key != key || !versionForm.MatchString(d.Version) || d.DeletedAt.IsZero() || d.PurgeAt.IsZero() != v.Info().Discards {
		t.Errorf("got %+v", d)
	}
}

func (suite) list(t *testing.T, v vault.Vault) {
	ctx := t.Context()
	want := map[secret.Key]vault.Properties{}
	wantDeleted := map[secret.Key]vault.Deleted{}
	for n := range 60 {
		key := newKey(t, secret.Kinds()[n%3])
		set(t, v, key, "old", vault.Tags{"old": "1"})
		p := set(t, v, key, "new", vault.Tags{"n": fmt.Sprint(n)})
		if n%2 == 0 {
			p.Version = ""
			want[key] = p
			continue
		}
		d, err := v.Delete(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		d.Version = ""
		wantDeleted[key] = d
	}
	for key := range wantDeleted { // lists may miss what is in a state between
		if err := v.Settle(ctx, key); err != nil {
			t.Fatal(err)
		}
	}
	for _, max := range []int{1, 7, 25, 1000} {
		live := map[secret.Key]vault.Properties{}
		for _, p := range listAll(t, v.List, max, func(p vault.Page) []vault.Properties { return p.Live }) {
			if _, twice := live[p.Key]; twice {
				t.Errorf("pages of %d: %s is there twice", max, p.Key)
			}
			live[p.Key] = p
		}
		for key, p := range want {
			wantProperties(t, live[key], p)
		}
		deleted := map[secret.Key]vault.Deleted{}
		for _, d := range listAll(t, v.ListDeleted, max, func(p vault.Page) []vault.Deleted { return p.Deleted }) {
			if _, twice := deleted[d.Key]; twice {
				t.Errorf("pages of %d: deleted %s is there twice", max, d.Key)
			}
			deleted[d.Key] = d
		}
		for key, d := range wantDeleted {
			got := deleted[key]
			wantProperties(t, got.Properties, d.Properties)
			if !got.DeletedAt.Equal(d.DeletedAt) || !got.PurgeAt.Equal(d.PurgeAt) {
				t.Errorf("%s: got deleted at %v, purge at %v, want %v, %v", key, got.DeletedAt, got.PurgeAt, d.DeletedAt, d.PurgeAt)
			}
			if _, both := live[key]; both {
				t.Errorf("%s is deleted and listed as live", key)
			}
		}
		for key := range want {
			if _, both := deleted[key]; both {
				t.Errorf("%s is live and listed as deleted", key)
			}
		}
	}
}

// listMovesWithDelete: a name that goes while a list is read disturbs nothing
// but itself, even when the list stands at it.
func (suite) listMovesWithDelete(t *testing.T, v vault.Vault) {
	ctx := t.Context()
	keep := map[secret.Key]bool{}
	for range 10 {
		key := newKey(t, secret.DatabaseURI)
		set(t, v, key, "x", nil)
		keep[key] = true
	}
	seen := map[secret.Key]int{}
	for skip := ""; ; {
		page, err := v.List(ctx, skip, 2)
		if err != nil {
			t.Fatal(err)
		}
		for n, p := range page.Live {
			seen[p.Key]++
			if n == len(page.Live)-1 && keep[p.Key] {
				if _, err := v.Delete(ctx, p.Key); err != nil {
					t.Fatal(err)
				}
			}
		}
		if skip = page.Next; skip == "" {
			break
		}
	}
	for key := range keep {
		if seen[key] != 1 {
			t.Errorf("%s was listed %d times, want once", key, seen[key])
		}
	}
}

func (suite) listIsEmpty(t *testing.T, v vault.Vault) {
	if !v.Info().Discards {
		return // others may keep what another test stored
	}
	set(t, v, newKey(t, secret.DatabaseURI), "x", nil)
	for name, list := range map[string]func(context.Context, string, int) (vault.Page, error){"List": v.List, "ListDeleted": v.ListDeleted} {
		if page, err := list(t.Context(), "", 10); err != nil || len(page.Live)+len(page.Deleted) > 0 || page.Next != "" {
			t.Errorf("%s: got %v, %v, want an empty page", name, page, err)
		}
	}
}

func (suite) badSkip(t *testing.T, v vault.Vault) {
	for _, skip := range []string{"garbage", "\x00", "https://elsewhere.example/?$skiptoken=x", strings.Repeat("A", 10_000)} {
		_, err := v.List(t.Context(), skip, 10)
		wantError(t, fmt.Sprintf("List with skip %.20q", skip), err, vault.ErrSkip)
		_, err = v.ListDeleted(t.Context(), skip, 10)
		wantError(t, fmt.Sprintf("ListDeleted with skip %.20q", skip), err, vault.ErrSkip)
	}
}

func (suite) kindsAreApart(t *testing.T, v vault.Vault) {
	key := newKey(t, secret.RegistrationToken)
	want := map[secret.Key]vault.Properties{}
	for _, kind := range secret.Kinds() {
		k := must(secret.NewKey(key.InstanceID(), kind))
		want[k] = set(t, v, k, kind.String(), nil)
	}
	for k, p := range want {
		wantGet(t, v, k, "", p, k.Kind().String())
	}
	if _, err := v.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	delete(want, key)
	for k, p := range want {
		wantGet(t, v, k, "", p, k.Kind().String())
	}
}

func (suite) concurrentSets(t *testing.T, v vault.Vault) {
	key := newKey(t, secret.DatabaseURI)
	const callers = 32
	done := make([]vault.Properties, callers)
	var wg sync.WaitGroup
	for n := range callers {
		wg.Go(func() {
			p, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue(fmt.Sprint("value ", n))})
			if err != nil {
				t.Errorf("Set %d: %v", n, err)
			}
			done[n] = p
		})
	}
	wg.Wait()
	want := map[string]vault.Properties{}
	for n, p := range done {
		want[p.Version] = p
		wantGet(t, v, key, p.Version, p, fmt.Sprint("value ", n))
	}
	if len(want) != callers {
		t.Fatalf("got %d versions, want %d", len(want), callers)
	}
	wantVersions(t, v, key, want)
	current, _, err := v.Get(t.Context(), key, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := want[current.Version]; !ok {
		t.Errorf("the current version %s was set by nobody", current.Version)
	}
}

func (suite) concurrentDeletes(t *testing.T, v vault.Vault) {
	key := newKey(t, secret.DatabaseURI)
	set(t, v, key, "x", nil)
	errs := make([]error, 8)
	var wg sync.WaitGroup
	for n := range errs {
		wg.Go(func() { _, errs[n] = v.Delete(t.Context(), key) })
	}
	wg.Wait()
	var deleted int
	for _, err := range errs {
		if err == nil {
			deleted++
			continue
		}
		wantError(t, "Delete", err, vault.ErrNotFound)
	}
	if deleted != 1 {
		t.Errorf("%d deletes succeeded, want 1", deleted)
	}
}

func (suite) cancelled(t *testing.T, v vault.Vault) {
	keeps := !v.Info().Discards
	live, deleted, absent := newKey(t, secret.DatabaseURI), newKey(t, secret.DatabaseURI), newKey(t, secret.DatabaseURI)
	p := set(t, v, live, "x", vault.Tags{"a": "1"})
	set(t, v, deleted, "x", nil)
	if _, err := v.Delete(t.Context(), deleted); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, err := range calls(ctx, v, live, p.Version) {
		wantError(t, name, err, context.Canceled)
		if vault.IsUncertain(err) {
			t.Errorf("%s: uncertain, want a certain error", name)
		}
	}
	_, err := v.Set(ctx, absent, vault.NewVersion{Value: secret.NewValue("y")})
	wantError(t, "Set", err, context.Canceled)
	wantError(t, "Recover", v.Recover(ctx, deleted), context.Canceled)
	wantError(t, "Settle", v.Settle(ctx, deleted), context.Canceled)
	if keeps { // and none of them did anything
		wantVersions(t, v, live, map[string]vault.Properties{p.Version: p})
		_, _, err = v.Get(t.Context(), absent, "")
		wantError(t, "Get of what was not set", err, vault.ErrNotFound)
		if _, err := v.GetDeleted(t.Context(), deleted); err != nil {
			t.Errorf("GetDeleted of what was not recovered: %v", err)
		}
	}
}

func (suite) close(t *testing.T, v vault.Vault) {
	key := newKey(t, secret.DatabaseURI)
	p := set(t, v, key, "x", nil)
	info := v.Info()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	for name, err := range calls(t.Context(), v, key, p.Version) {
		wantError(t, name, err, vault.ErrUnavailable)
		if vault.IsUncertain(err) {
			t.Errorf("%s: uncertain, want a certain error", name)
		}
	}
	if got := v.Info(); got.Name != info.Name || got.Discards != info.Discards {
		t.Errorf("Info after Close: got %v, want %v", got, info)
	}
}

// calls makes each of a vault's calls once and gives its error.
func calls(ctx context.Context, v vault.Vault, key secret.Key, version string) map[string]error {
	errs := map[string]error{}
	_, errs["Set"] = v.Set(ctx, key, vault.NewVersion{Value: secret.NewValue("y")})
	_, _, errs["Get"] = v.Get(ctx, key, "")
	_, errs["Versions"] = v.Versions(ctx, key)
	_, errs["Update"] = v.Update(ctx, key, version, vault.Patch{})
	_, errs["Delete"] = v.Delete(ctx, key)
	_, errs["GetDeleted"] = v.GetDeleted(ctx, key)
	errs["Recover"] = v.Recover(ctx, key)
	_, errs["List"] = v.List(ctx, "", 1)
	_, errs["ListDeleted"] = v.ListDeleted(ctx, "", 1)
	errs["Check"] = v.Check(ctx)
	return errs
}

// newKey names a secret that nobody else has.
func newKey(t *testing.T, kind secret.Kind) secret.Key {
	t.Helper()
	id, err := secret.ParseInstanceID(uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	return must(secret.NewKey(id, kind))
}

func noVersion() string { return strings.ReplaceAll(uuid.NewString(), "-", "") }

func set(t *testing.T, v vault.Vault, key secret.Key, value string, tags vault.Tags) vault.Properties {
	t.Helper()
	p, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue(value), Tags: tags})
	if err != nil {
		t.Fatalf("Set: %v", err)
	}
	return p
}

func listAll[T any](t *testing.T, list func(context.Context, string, int) (vault.Page, error), max int, items func(vault.Page) []T) (all []T) {
	t.Helper()
	for skip := ""; ; {
		page, err := list(t.Context(), skip, max)
		if err != nil {
			t.Fatal(err)
		}
		if got := items(page); len(got) > max {
			t.Fatalf("got a page of %d, want at most %d", len(got), max)
		}
		if len(page.Live)+len(page.Deleted) != len(items(page)) {
			t.Fatal("a page has items of the other list")
		}
		all = append(all, items(page)...)
		if page.Next == "" {
			return all
		}
		if page.Next == skip {
			t.Fatal("a page leads to itself")
		}
		skip = page.Next
	}
}

func wantGet(t *testing.T, v vault.Vault, key secret.Key, version string, want vault.Properties, wantValue string) {
	t.Helper()
	p, value, err := v.Get(t.Context(), key, version)
	if err != nil {
		t.Errorf("Get of version %q: %v", version, err)
		return
	}
	wantProperties(t, p, want)
	if value.Reveal() != wantValue {
		t.Errorf("Get of version %q: got another value than was stored", version)
	}
}

func wantVersions(t *testing.T, v vault.Vault, key secret.Key, want map[string]vault.Properties) {
	t.Helper()
	all, err := v.Versions(t.Context(), key)
	if err != nil {
		t.Errorf("Versions: %v", err)
		return
	}
	if len(all) != len(want) {
		t.Errorf("got %d versions, want %d", len(all), len(want))
	}
	for version, p := range want {
		at := slices.IndexFunc(all, func(p vault.Properties) bool { return p.Version == version })
		if at < 0 {
			t.Errorf("version %s is missing", version)
			continue
		}
		wantProperties(t, all[at], p)
	}
}

func wantProperties(t *testing.T, got, want vault.Properties) {
	t.Helper()
	if got.Key != want.Key || got.Version != want.Version || got.Enabled != want.Enabled || !got.Created.Equal(want.Created) || got.ContentType != want.ContentType {
		t.Errorf("got %+v, want %+v", got, want)
	}
	wantTags(t, got.Tags, want.Tags)
}

func wantTags(t *testing.T, got, want vault.Tags) {
	t.Helper()
	if !maps.Equal(got, want) {
		t.Errorf("got tags %v, want %v", got, want)
	}
}

func wantSeconds(t *testing.T, at time.Time) {
	t.Helper()
	if at.IsZero() || at.Nanosecond() != 0 {
		t.Errorf("got %v, want a time in whole seconds", at)
	}
}

func wantError(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err) // a test's own mistake
	}
	return v
}
