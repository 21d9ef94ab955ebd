package keyvaultfake_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

// on gives a fault to the requests of op that bear a token, the first so many.
func on(f *keyvaultfake.Fake, op keyvaultfake.Op, times int64, fault keyvaultfake.Fault) {
	var left atomic.Int64
	left.Store(times)
	f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op == op && !r.Challenge && left.Add(-1) >= 0 {
			return fault
		}
		return keyvaultfake.Fault{}
	})
}

// ops are the operations of the journal with their statuses.
func ops(f *keyvaultfake.Fake) []string {
	var got []string
	for _, r := range f.Journal() {
		got = append(got, fmt.Sprint(r.Op, " ", r.Status))
	}
	return got
}

func TestJournal(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	c := person(t, f)
	call(t, c, "set", "Name")
	call(t, c, "get", "other")
	got, want := ops(f), []string{"Set 401", "Discovery 200", "Discovery 200", "Token 200", "Set 200", "Get 404"}
	if !slices.Equal(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	requests := f.Journal()
	if r := requests[0]; !r.Challenge || r.Principal != "" || r.Name != "name" || r.Path != "/secrets/Name" || r.Seq != 1 {
		t.Errorf("got %+v, want the challenge of name", r)
	}
	if r := requests[4]; r.Challenge || r.Principal != f.Person().ClientID || r.Query.Get("api-version") == "" {
		t.Errorf("got %+v, want a request with a token", r)
	}
	expect(t, "inner", requests[5].Inner, "SecretNotFound")
	f.ResetJournal()
	call(t, c, "get", "other")
	if requests := f.Journal(); len(requests) != 1 || requests[0].Seq != 7 {
		t.Errorf("got %+v, want the seventh request alone", requests)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	for name, after := range map[string]time.Duration{"without Retry-After": 0, "with Retry-After": 1500 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := start(t, keyvaultfake.Config{Limits: &keyvaultfake.Limits{Creates: 2, Others: 3, Window: 10 * time.Second, RetryAfter: after}})
			c, ctx := person(t, f), t.Context()
			expect(t, "set", call(t, c, "set", "a"), "ok") // its challenge counts as one of the others
			f.Advance(9 * time.Second)
			expect(t, "set", call(t, c, "set", "a"), "ok")
			_, err := c.SetSecret(ctx, "a", azsecrets.SetSecretParameters{Value: new("v")}, nil)
			if !strings.Contains(err.Error(), "VaultRequestTypeLimitReached") {
				t.Errorf("got %v, want VaultRequestTypeLimitReached", err)
			}
			expect(t, "third set", result(err), "429 Throttled")
			expect(t, "get", call(t, c, "get", "a"), "ok")
			expect(t, "get", call(t, c, "get", "a"), "ok")
			_, err = c.GetSecret(ctx, "a", "", nil)
			expect(t, "third get", result(err), "429 Throttled")
			header := ""
			if after > 0 {
				header = "2"
			}
			expect(t, "Retry-After", responseHeader(err, "Retry-After"), header)
			// The window slides, and what was refused is not counted.
			f.Advance(time.Second)
			expect(t, "set", call(t, c, "set", "a"), "ok")
			expect(t, "get", call(t, c, "get", "a"), "ok")
			expect(t, "set", call(t, c, "set", "a"), "429 Throttled")
		})
	}
}

func TestStatusFaults(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	c := person(t, f)
	for _, test := range []struct {
		fault keyvaultfake.Fault
		want  string
	}{
		{keyvaultfake.Fault{Status: 429}, "429 Throttled"},
		{keyvaultfake.Fault{Status: 500}, "500 InternalServerError"},
		{keyvaultfake.Fault{Status: 503}, "503 ServiceUnavailable"},
		{keyvaultfake.Fault{Status: 409}, "409 Conflict"},
		{keyvaultfake.Fault{Status: 409, Inner: "ObjectIsBeingRecovered"}, "409 ObjectIsBeingRecovered"},
		{keyvaultfake.Fault{Status: 403, Inner: "AccessDenied"}, "403 AccessDenied"},
		{keyvaultfake.Fault{Status: 404}, "404 SecretNotFound"},
		{keyvaultfake.Fault{Delay: time.Millisecond}, "ok"},
		{keyvaultfake.Fault{Cut: true}, "no answer"},
	} {
		on(f, keyvaultfake.OpSet, 1, test.fault)
		before := len(f.Versions("name"))
		expect(t, fmt.Sprintf("%+v", test.fault), call(t, c, "set", "name"), test.want)
		if made := len(f.Versions("name")) - before; (made == 1) != (test.want == "ok") {
			t.Errorf("%+v: got %d new versions, want one if it is answered with ok", test.fault, made)
		}
		journal := f.Journal()
		if last := journal[len(journal)-1]; !last.Fault || (last.Status == 0) != test.fault.Cut {
			t.Errorf("%+v: got journal %+v, want the fault, and status 0 if it was cut", test.fault, last)
		}
	}
}

// TestRetries shows what the SDK makes of a connection that is cut after the commit.
func TestRetries(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		fault keyvaultfake.Fault
		want  int
	}{
		{keyvaultfake.Fault{Cut: true}, 1},
		{keyvaultfake.Fault{Status: 503}, 1},
		{keyvaultfake.Fault{CutAfter: true}, 2},
	} {
		f := start(t, keyvaultfake.Config{})
		c := connect(t, f, secretOf(t, f, f.Broker()), policy.RetryOptions{RetryDelay: time.Microsecond})
		on(f, keyvaultfake.OpSet, 1, test.fault)
		expect(t, "set", call(t, c, "set", "name"), "ok")
		if got := len(f.Versions("name")); got != test.want {
			t.Errorf("%+v: got %d versions, want %d", test.fault, got, test.want)
		}
	}
}

func TestHolds(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{Limits: &keyvaultfake.Limits{}}) // it polls
	c := person(t, f)
	expect(t, "set", call(t, c, "set", "name"), "ok")

	hold, seen := make(chan struct{}), make(chan struct{})
	f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op != keyvaultfake.OpSet {
			return keyvaultfake.Fault{}
		}
		close(seen)
		return keyvaultfake.Fault{Hold: hold}
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-seen
		cancel()
	}()
	_, err := c.SetSecret(ctx, "name", azsecrets.SetSecretParameters{Value: new("late")}, nil)
	expect(t, "set with a client that went away", result(err), "no answer")
	if got := len(f.Versions("name")); got != 1 {
		t.Errorf("held: got %d versions, want 1", got)
	}
	close(hold)
	for len(f.Versions("name")) < 2 { // it lands though nobody waits for it
		expect(t, "get", call(t, c, "get", "name"), "ok")
	}

	// Another client sees the write before its caller does.
	after := make(chan struct{})
	on(f, keyvaultfake.OpSet, 1, keyvaultfake.Fault{HoldAfter: after})
	done := make(chan string)
	go func() { done <- call(t, c, "set", "name") }()
	for len(f.Versions("name")) < 3 {
		expect(t, "get", call(t, c, "get", "name"), "ok")
	}
	select {
	case got := <-done:
		t.Errorf("held after: got %s, want no answer yet", got)
	default:
	}
	close(after)
	expect(t, "held after", <-done, "ok")
}

func TestDelayEndsWithTheClient(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{Limits: &keyvaultfake.Limits{}}) // it polls
	c := person(t, f)
	expect(t, "get", call(t, c, "get", "name"), "404 SecretNotFound")
	ctx, cancel := context.WithCancel(t.Context())
	f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op != keyvaultfake.OpSet {
			return keyvaultfake.Fault{}
		}
		cancel()
		return keyvaultfake.Fault{Delay: time.Hour}
	})
	_, err := c.SetSecret(ctx, "name", azsecrets.SetSecretParameters{Value: new("v")}, nil)
	expect(t, "set", result(err), "no answer")
	for call(t, c, "get", "name") != "ok" {
	}
}

func TestCloseEndsEverything(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	c := person(t, f)
	expect(t, "get", call(t, c, "get", "name"), "404 SecretNotFound")
	for _, fault := range []keyvaultfake.Fault{{Delay: time.Hour}, {Hold: make(chan struct{})}, {HoldAfter: make(chan struct{})}} {
		seen := make(chan struct{})
		f.OnRequest(func(*keyvaultfake.Request) keyvaultfake.Fault {
			close(seen)
			return fault
		})
		go func() { _, _ = c.GetSecret(t.Context(), "name", "", nil) }()
		<-seen
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	expect(t, "after Close", call(t, c, "get", "name"), "no answer")
}

func TestLateCommit(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	c := person(t, f)
	expect(t, "set", call(t, c, "set", "name"), "ok")
	on(f, keyvaultfake.OpSet, 1, keyvaultfake.Fault{LateCommit: time.Minute})
	expect(t, "late set", call(t, c, "set", "name"), "no answer")
	on(f, keyvaultfake.OpDelete, 1, keyvaultfake.Fault{LateCommit: 2 * time.Minute})
	expect(t, "late delete", call(t, c, "delete", "name"), "no answer")

	f.Advance(59 * time.Second)
	if got := len(f.Versions("name")); got != 1 {
		t.Errorf("too early: got %d versions, want 1", got)
	}
	f.Advance(time.Second)
	if got := len(f.Versions("name")); got != 2 {
		t.Errorf("in time: got %d versions, want 2", got)
	}
	due := f.Now().Add(time.Minute)
	f.Advance(time.Hour) // the delete happened when it was due, so it has ended by now
	expect(t, "state", string(f.State("name")), "deleted")
	deleted, err := c.GetDeletedSecret(t.Context(), "name", nil)
	if err != nil || deleted.DeletedDate.After(due) {
		t.Errorf("got %v, %v, want deleted by %v", deleted.DeletedDate, err, due)
	}

	// One that is refused when it lands changes nothing.
	f.PersonPurge("name")
	f.Advance(time.Minute)
	f.PersonSet("name", "v", nil)
	on(f, keyvaultfake.OpSet, 1, keyvaultfake.Fault{LateCommit: time.Second})
	expect(t, "late set", call(t, c, "set", "name"), "no answer")
	f.PersonDelete("name")
	f.Advance(time.Minute)
	if got := len(f.Versions("name")); got != 1 {
		t.Errorf("refused: got %d versions, want 1", got)
	}
}

func TestOwnClock(t *testing.T) {
	t.Parallel()
	var ahead atomic.Int64
	begin := time.Date(2031, 2, 3, 4, 5, 6, 7, time.UTC)
	f := start(t, keyvaultfake.Config{Now: func() time.Time { return begin.Add(time.Duration(ahead.Load())) }})
	c := person(t, f)
	expect(t, "set", call(t, c, "set", "name"), "ok")
	if got := f.Versions("name")[0].Created; !got.Equal(begin.Truncate(time.Second)) {
		t.Errorf("created: got %v, want %v in whole seconds", got, begin)
	}
	on(f, keyvaultfake.OpSet, 1, keyvaultfake.Fault{LateCommit: time.Minute})
	expect(t, "late set", call(t, c, "set", "name"), "no answer")
	ahead.Store(int64(time.Minute))
	f.Settle()
	if got := len(f.Versions("name")); got != 2 {
		t.Errorf("got %d versions, want 2", got)
	}
	defer func() {
		if recover() == nil {
			t.Error("Advance: got no panic, want one")
		}
	}()
	f.Advance(time.Second)
}

func TestStale(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	c, ctx := person(t, f), t.Context()
	first := f.PersonSet("name", "one", nil)
	f.OnRequest(func(*keyvaultfake.Request) keyvaultfake.Fault { return keyvaultfake.Fault{Stale: true} })
	expect(t, "get of the only version", call(t, c, "get", "name"), "404 SecretNotFound")
	expect(t, "versions", call(t, c, "versions", "name"), "ok 0")
	newest := f.PersonSet("name", "two", nil)
	f.PersonUpdate("name", first.ID, false, nil) // after the newest was made: not seen
	got, err := c.GetSecret(ctx, "name", "", nil)
	if err != nil || *got.Value != "one" {
		t.Errorf("get: got %v, %v, want the version before", got.Value, err)
	}
	expect(t, "get of the newest", result(second(c.GetSecret(ctx, "name", newest.ID, nil))), "404 SecretNotFound")
	expect(t, "versions", call(t, c, "versions", "name"), "ok 1")
	f.OnRequest(nil)
	expect(t, "versions", call(t, c, "versions", "name"), "ok 2")
	expect(t, "get", result(second(c.GetSecret(ctx, "name", first.ID, nil))), "403 SecretDisabled")
}

func TestModes(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	c := person(t, f)
	expect(t, "set", call(t, c, "set", "name"), "ok")

	f.SetReadOnly(true)
	for _, what := range []string{"set", "update", "delete", "recover", "purge"} {
		expect(t, "read-only "+what, call(t, c, what, "name"), "403 VaultReadOnly")
	}
	expect(t, "read-only get", call(t, c, "get", "name"), "ok")
	f.PersonSet("name", "v", nil)
	f.SetReadOnly(false)
	expect(t, "set", call(t, c, "set", "name"), "ok")

	f.SetDown(true)
	expect(t, "down", call(t, c, "get", "name"), "no answer")
	f.SetDown(false)
	expect(t, "up again", call(t, c, "get", "name"), "ok")

	f.SetTokenServiceDown(true)
	expect(t, "with a token", call(t, c, "get", "name"), "ok")
	other := connect(t, f, secretOf(t, f, f.Person()), once)
	expect(t, "without a token", call(t, other, "get", "name"), "no answer")
	f.SetTokenServiceDown(false)
	expect(t, "with a token again", call(t, other, "get", "name"), "ok")
}

func TestPersonPanics(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	f.PersonSet("live", "v", nil)
	f.PersonSet("deleting", "v", nil)
	f.PersonDelete("deleting")
	for name, do := range map[string]func(){
		"PersonSet":     func() { f.PersonSet("deleting", "v", nil) },
		"PersonUpdate":  func() { f.PersonUpdate("live", "no such version", true, nil) },
		"PersonDelete":  func() { f.PersonDelete("absent") },
		"PersonRecover": func() { f.PersonRecover("live") },
		"PersonPurge":   func() { f.PersonPurge("deleting") },
	} {
		func() {
			defer func() {
				if got := fmt.Sprint(recover()); !strings.Contains(got, name) {
					t.Errorf("%s: got panic %q, want one that names it", name, got)
				}
			}()
			do()
		}()
	}
	f.Advance(time.Minute)
	f.PersonRecover("deleting")
	f.Advance(12 * time.Second) // writes by others still conflict
	f.PersonUpdate("deleting", "", false, map[string]string{"k": "v"})
	if got := f.Versions("deleting")[0]; got.Enabled || got.Tags["k"] != "v" {
		t.Errorf("got %+v, want it disabled with a tag", got)
	}
}

func TestProxy(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{Name: "other"})
	f.PersonSet("name", "v", nil)
	client := throughProxy(t, f)
	for what, request := range map[string]struct {
		url, want string
	}{
		"vault":         {f.URL() + "secrets/name?api-version=7.4", "401"},
		"token service": {"https://login.microsoftonline.com/" + f.Broker().TenantID + "/v2.0/.well-known/openid-configuration", "200"},
		"other host":    {"https://example.com/", "Forbidden"},
		"other port":    {"https://other.vault.azure.net:444/", "Forbidden"},
		"plain http":    {"http://plain.example.com/", "403"},
	} {
		expect(t, what, fetch(client, request.url), request.want)
	}
	got := f.Refused()
	slices.Sort(got)
	if want := []string{"example.com", "other.vault.azure.net", "plain.example.com"}; !slices.Equal(got, want) {
		t.Errorf("refused: got %v, want %v", got, want)
	}

	// A cut goes through the proxy as a cut.
	f.OnRequest(func(*keyvaultfake.Request) keyvaultfake.Fault { return keyvaultfake.Fault{Cut: true} })
	expect(t, "cut", fetch(client, f.URL()+"secrets/name?api-version=7.4"), "connection reset by peer")
	f.OnRequest(nil)
	f.SetDown(true)
	if got := fetch(client, f.URL()); got == "401" {
		t.Errorf("down: got %s, want no answer", got)
	}

	transport := f.Transport()
	expect(t, "transport", fetch(&http.Client{Transport: transport}, "https://example.org/"), "example.org:443 is not a host of the fake")
	if got := f.Refused(); got[len(got)-1] != "example.org" {
		t.Errorf("refused: got %v, want example.org last", got)
	}
}

// fetch gives the status, or the end of the error.
func fetch(client *http.Client, url string) string {
	answer, err := client.Get(url)
	if err != nil {
		text := err.Error()
		return text[strings.LastIndex(text, ": ")+2:]
	}
	defer answer.Body.Close()
	if _, err := io.Copy(io.Discard, answer.Body); err != nil {
		return err.Error()
	}
	return fmt.Sprint(answer.StatusCode)
}
