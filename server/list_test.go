package server_test

import (
	"encoding/base64"
	"fmt"
	"slices"
	"testing"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

// TestListOfEachState: live ones first, then the deleted, of which some may be
// live in the vault still: a crash came between the mark and the vault's delete.
func TestListOfEachState(t *testing.T) {
	t.Parallel()
	onEachVault(t, testListOfEachState)
}

func testListOfEachState(t *testing.T, start func(*testing.T) *system) {
	s := start(t)
	// In order of name the states are mixed.
	for i, state := range []string{"marked", "active", "deleted", "outside", "marked", "disabled", "deleted outside", "active"} {
		s.in(t, fmt.Sprint("i-", i), state)
	}
	x := s.in(t, "i-9", "absent")
	live := []string{"i-1 ACTIVE/2", "i-3 ACTIVE/0", "i-5 DISABLED/2", "i-7 ACTIVE/2"}
	gone := []string{"i-0 DELETED/2", "i-4 DELETED/2", "i-2 DELETED/2", "i-6 DELETED/2"}
	for _, showDeleted := range []bool{false, true} {
		want := slices.Clone(live)
		if showDeleted {
			want = append(want, gone...)
		}
		for _, size := range []int32{0, 1, 2, 3, 5, 1000} {
			var got []string
			in := &secretsv1.ListSecretsRequest{PageSize: size, ShowDeleted: showDeleted}
			for more := true; more; more = in.PageToken != "" {
				page, err := x.c.ListSecrets(x.ctx, in)
				if err != nil {
					t.Fatal(err)
				}
				for _, m := range page.GetSecrets() {
					got = append(got, m.GetRef().GetInstanceId()+" "+outcome{m: m}.String(t))
					if (m.GetDeleteTime() != nil) != (m.GetState() == deleted) || m.GetVersion() != "" || m.GetCreateTime() == nil {
						t.Errorf("got %v", m)
					}
				}
				in.PageToken = page.GetNextPageToken()
			}
			if !slices.Equal(got, want) {
				t.Errorf("show_deleted %v, page size %d: got %v, want %v", showDeleted, size, got, want)
			}
		}
	}
}

// TestForgedPageTokens: what no ListSecrets returned, as far as that shows, is a
// bad request, and never a place in somebody else's list.
func TestForgedPageTokens(t *testing.T) {
	t.Parallel()
	onEachVault(t, testForgedPageTokens)
}

func testForgedPageTokens(t *testing.T, start func(*testing.T) *system) {
	s := start(t)
	for i := range 3 {
		s.in(t, fmt.Sprint("i-", i), "active")
	}
	x := s.in(t, "i-0", "absent")
	page, err := x.c.ListSecrets(x.ctx, &secretsv1.ListSecretsRequest{PageSize: 1})
	if err != nil || page.GetNextPageToken() == "" {
		t.Fatalf("got %v, %v, want a next page", page, err)
	}
	good := page.GetNextPageToken()
	raw, err := base64.RawURLEncoding.DecodeString(good)
	if err != nil {
		t.Fatal(err)
	}
	encoded := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	at := fmt.Sprint(x.clock.Now().Unix())
	for name, in := range map[string]*secretsv1.ListSecretsRequest{
		"garbage":             {PageToken: "garbage!"},
		"no place":            {PageToken: encoded("garbage")},
		"cut off":             {PageToken: good[:len(good)-2]},
		"two":                 {PageToken: encoded(string(raw) + string(raw))},
		"a skip of one's own": {PageToken: encoded(`{"t":` + at + `,"k":"https://example.com/secrets"}`)},
		"a skip that is no name": {PageToken: encoded(`{"t":` + at + `,"k":"` +
			base64.RawURLEncoding.EncodeToString([]byte("live ../../etc")) + `"}`)},
		"an unknown section":        {PageToken: encoded(`{"t":` + at + `,"d":true,"s":9}`), ShowDeleted: true},
		"a negative section":        {PageToken: encoded(`{"t":` + at + `,"s":-1}`)},
		"the deleted, not asked":    {PageToken: encoded(`{"t":` + at + `,"s":2}`)},
		"the marked, not asked":     {PageToken: encoded(`{"t":` + at + `,"s":1}`)},
		"no time":                   {PageToken: encoded(`{}`)},
		"a time far ahead":          {PageToken: encoded(`{"t":99999999999}`)},
		"of an instance":            {PageToken: encoded(`{"t":` + at + `,"i":"i-0","k":"1"}`)},
		"of the list of all":        {PageToken: good, InstanceId: "i-0"},
		"of another instance":       {PageToken: encoded(`{"t":` + at + `,"i":"i-1","k":"1"}`), InstanceId: "i-0"},
		"a negative place":          {PageToken: encoded(`{"t":` + at + `,"i":"i-0","k":"-1"}`), InstanceId: "i-0"},
		"a place that is no number": {PageToken: encoded(`{"t":` + at + `,"i":"i-0","k":"x"}`), InstanceId: "i-0"},
		"without show_deleted":      {PageToken: good, ShowDeleted: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, err := x.c.ListSecrets(x.ctx, in)
			if err == nil {
				t.Fatalf("got %d secrets, want it refused", len(out.GetSecrets()))
			}
			wantReason(t, err, secret.InvalidRequest, "")
			if f := failed(t, err); f.field != "page_token" {
				t.Errorf("got field %q, want page_token", f.field)
			}
		})
	}
}
