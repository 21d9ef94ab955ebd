package keyvault_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// TestListWhileOthersWrite: what was there throughout is listed once, whatever
// becomes of the rest.
func TestListWhileOthersWrite(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	keep, come, leave, back := keys(t, 600), keys(t, 200), keys(t, 200), keys(t, 200)
	for _, key := range slices.Concat(keep, leave, back) {
		f.PersonSet(key.String(), "x", nil)
	}
	for _, key := range back {
		f.PersonDelete(key.String())
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := range come {
			set(t, v, come[n], "x")
			if _, err := v.Delete(t.Context(), leave[n]); err != nil {
				t.Error(err)
			}
			if err := v.Recover(t.Context(), back[n]); err != nil {
				t.Error(err)
			}
		}
	})
	seen, pages := map[secret.Key]int{}, 0
	for skip := ""; ; pages++ {
		page, err := v.List(t.Context(), skip, 25)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range page.Live {
			seen[p.Key]++
		}
		if skip = page.Next; skip == "" {
			break
		}
	}
	wg.Wait()
	for key, times := range seen {
		if times != 1 {
			t.Errorf("%s was listed %d times, want once", key, times)
		}
	}
	for _, key := range keep {
		if seen[key] != 1 {
			t.Errorf("%s was listed %d times, want once: it was there throughout", key, seen[key])
		}
	}
	if pages < len(keep)/25 {
		t.Errorf("got %d pages, want at least %d", pages, len(keep)/25)
	}
}

func keys(t *testing.T, n int) []secret.Key {
	t.Helper()
	all := make([]secret.Key, n)
	for i := range all {
		all[i] = newKey(t)
	}
	return all
}

// TestListNames: other names in the vault are nobody's business, and capitals are
// the same name.
func TestListNames(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	for _, name := range []string{
		"instance-a", "INSTANCE-B-DBURI", "Instance-c-Oidc-Secret",
		"instance-", "instance--a", "instance-a-", "other", "instancea", "instance-a--dburi", "x" + strings.Repeat("-", 100),
		"instance-" + strings.Repeat("a", 101),
	} {
		f.PersonSet(name, "x", nil)
	}
	want := []string{"instance-a", "instance-b-dburi", "instance-c-oidc-secret"}
	list := func(list func(context.Context, string, int) (vault.Page, error)) (got []string) {
		for skip := ""; ; {
			page, err := list(t.Context(), skip, 2)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range page.Live {
				got = append(got, p.Key.String())
			}
			for _, d := range page.Deleted {
				got = append(got, d.Key.String())
			}
			if skip = page.Next; skip == "" {
				slices.Sort(got)
				return got
			}
		}
	}
	if got := list(v.List); !slices.Equal(got, want) {
		t.Errorf("List: got %q, want %q", got, want)
	}
	for _, name := range want {
		key, err := secret.ParseKey(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, value, err := v.Get(t.Context(), key, ""); err != nil || value.Reveal() != "x" {
			t.Errorf("Get of %s: got %v, want its value", name, err)
		}
		if _, err := v.Delete(t.Context(), key); err != nil {
			t.Errorf("Delete of %s: got %v, want nil", name, err)
		}
	}
	if got := list(v.List); got != nil {
		t.Errorf("List: got %q, want none", got)
	}
	if got := list(v.ListDeleted); !slices.Equal(got, want) {
		t.Errorf("ListDeleted: got %q, want %q", got, want)
	}
}

// TestForgedSkip: no skip leads anywhere but into the list.
func TestForgedSkip(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	for n := range 60 {
		f.PersonSet(fmt.Sprintf("instance-%02d", n), "x", nil)
	}
	for _, tt := range []struct {
		skip  string
		asked bool // the vault is to judge it
	}{
		{"https://elsewhere.example/", false},
		{"https://elsewhere.example/?$skiptoken=x", false},
		{"//elsewhere.example", true},
		{"../deletedsecrets", true},
		{"garbage", true},
		{"x&api-version=0", false},
		{"x#y", false},
		{"x?y", false},
		{"@elsewhere.example", false},
		{"elsewhere.example:443", false},
		{" ", false},
		{"%2e%2e", false},
		{"\x00", false},
		{"\r\nHost: elsewhere.example", false},
		{"ä", false},
		{strings.Repeat("A", 5000), false},
		{strings.Repeat("A", 4000), true},
		{base64.RawURLEncoding.EncodeToString([]byte(`{"last":1}`)), true},
	} {
		for name, list := range map[string]func(context.Context, string, int) (vault.Page, error){"List": v.List, "ListDeleted": v.ListDeleted} {
			f.ResetJournal()
			page, err := list(t.Context(), tt.skip, 10)
			wantError(t, fmt.Sprintf("%s with skip %.40q", name, tt.skip), err, vault.ErrSkip)
			if len(page.Live)+len(page.Deleted) > 0 || page.Next != "" {
				t.Errorf("got %v beside the error, want nothing", page)
			}
			if got := len(sent(f, keyvaultfake.OpList)) + len(sent(f, keyvaultfake.OpListDeleted)); (got > 0) != tt.asked {
				t.Errorf("%s with skip %.40q: got %d requests, want some: %v", name, tt.skip, got, tt.asked)
			}
			for _, r := range f.Journal() {
				if r.Op != keyvaultfake.OpList && r.Op != keyvaultfake.OpListDeleted || r.Query.Get("api-version") == "0" || r.Query.Get("$skiptoken") != tt.skip {
					t.Errorf("got the request %s %s?%s, want the list alone", r.Method, r.Path, r.Query.Encode())
				}
			}
		}
	}
	if got := f.Refused(); len(got) > 0 {
		t.Errorf("got connections to %v, want none", got)
	}
}

// TestForeignLink: of a link to the next page nothing counts but its skip token.
func TestForeignLink(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var asked []string
	v := openOn(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r.Host+r.URL.Path+" "+r.URL.Query().Get("$skiptoken")+" "+r.URL.Query().Get("maxresults"))
		if r.URL.Query().Has("$skiptoken") {
			_, _ = w.Write([]byte(`{"value":[]}`))
			return
		}
		_, _ = w.Write([]byte(`{"value":[],"nextLink":"https://elsewhere.example/deletedsecrets?api-version=0&$skiptoken=abc&maxresults=9&more=1"}`))
	})
	page, err := v.List(t.Context(), "", 7)
	if err != nil || page.Next != "abc" {
		t.Fatalf("got %q, %v, want the skip token alone", page.Next, err)
	}
	if _, err := v.List(t.Context(), page.Next, 7); err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	_, err = v.Versions(t.Context(), key)
	wantError(t, "Versions of nothing", err, vault.ErrNotFound)
	mu.Lock()
	defer mu.Unlock()
	want := []string{
		"exto-test.vault.azure.net/secrets  7",
		"exto-test.vault.azure.net/secrets abc 7",
		"exto-test.vault.azure.net/secrets/" + key.String() + "/versions  25",
		"exto-test.vault.azure.net/secrets/" + key.String() + "/versions abc 25",
	}
	if !slices.Equal(asked, want) {
		t.Errorf("got %q, want %q", asked, want)
	}
}

func TestLinkThatCannotBeRead(t *testing.T) {
	t.Parallel()
	for _, link := range []string{"https://exto-test.vault.azure.net/secrets", "https://exto-test.vault.azure.net/secrets?$skiptoken=", ":", "https://exto-test.vault.azure.net/?$skiptoken=a%20b"} {
		v := openOn(t, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = fmt.Fprintf(w, `{"value":[],"nextLink":%q}`, link)
		})
		_, err := v.List(t.Context(), "", 7)
		wantError(t, link, err, vault.ErrUnavailable)
	}
}

// TestLinkToItself ends, and does not go round for ever.
func TestLinkToItself(t *testing.T) {
	t.Parallel()
	v := openOn(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"value":[],"nextLink":"https://exto-test.vault.azure.net/secrets/x/versions?$skiptoken=abc"}`))
	})
	_, err := v.Versions(t.Context(), newKey(t))
	wantError(t, "Versions", err, vault.ErrUnavailable)
}
