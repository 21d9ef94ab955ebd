package keyvault_test

import (
	"maps"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

func TestTags(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	v := open(t, config(f, c, f.Broker()))
	key := newKey(t)
	most := vault.Tags{}
	for n := range versions.MaxTags {
		most[strconv.Itoa(10+n)+strings.Repeat("n", versions.MaxTagChars-2)] = strings.Repeat("v", versions.MaxTagChars)
	}
	p, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("one"), ContentType: "text/plain", Tags: most})
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, got vault.Properties, want vault.Tags) {
		t.Helper()
		if !maps.Equal(got.Tags, want) {
			t.Errorf("%s: got %d tags, want %d", what, len(got.Tags), len(want))
		}
		if got.ContentType != "text/plain" {
			t.Errorf("%s: got content type %q, want it kept", what, got.ContentType)
		}
		if stored := f.Versions(key.String())[0]; !maps.Equal(stored.Tags, want) || stored.ContentType != "text/plain" {
			t.Errorf("%s: the vault has %d tags and content type %q, want %d and text/plain", what, len(stored.Tags), stored.ContentType, len(want))
		}
	}
	check("Set", p, most)
	for _, tags := range []vault.Tags{{"only": "this"}, {}, most, nil} {
		p, err := v.Update(t.Context(), key, p.Version, vault.Patch{Enabled: true, Tags: tags})
		if err != nil {
			t.Fatal(err)
		}
		check("Update", p, tags)
	}
}

// TestTagWithoutAValue: a vault may give null for it.
func TestTagWithoutAValue(t *testing.T) {
	t.Parallel()
	v := openOn(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(`{"value":"one","id":"https://exto-test.vault.azure.net/secrets/` + strings.Split(r.URL.Path, "/")[2] + `/0123456789abcdef0123456789abcdef","attributes":{"enabled":true,"created":1},"tags":{"a":null,"b":"2"}}`))
	})
	p, _, err := v.Get(t.Context(), newKey(t), "")
	if err != nil {
		t.Fatal(err)
	}
	if want := (vault.Tags{"a": "", "b": "2"}); !maps.Equal(p.Tags, want) {
		t.Errorf("got %v, want %v", p.Tags, want)
	}
}

// TestAnswersThatLackSomething are errors.
func TestAnswersThatLackSomething(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{
		"nothing":      `{}`,
		"null":         `null`,
		"no id":        `{"value":"one","attributes":{"enabled":true,"created":1}}`,
		"no created":   `{"value":"one","id":"https://exto-test.vault.azure.net/secrets/x/0","attributes":{"enabled":true}}`,
		"wrong types":  `{"value":1,"id":2,"attributes":3}`,
		"list of null": `{"value":[null]}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := openOn(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) })
			for _, r := range reads[:2] {
				err := r.do(t.Context(), v, newKey(t))
				if err == nil {
					t.Errorf("%s: got nil, want an error", r.op)
				}
			}
			_, err := v.Set(t.Context(), newKey(t), vault.NewVersion{Value: secret.NewValue("x")})
			if !vault.IsUncertain(err) {
				t.Errorf("Set: got %v, want an unknown outcome", err)
			}
		})
	}
}
