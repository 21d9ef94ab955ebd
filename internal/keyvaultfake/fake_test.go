package keyvaultfake_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"
	"go.uber.org/goleak"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, cfg keyvaultfake.Config) *keyvaultfake.Fake {
	t.Helper()
	f, err := keyvaultfake.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return f
}

// once are no retries of the SDK.
var once = policy.RetryOptions{MaxRetries: -1}

func options(t *testing.T, f *keyvaultfake.Fake, retry policy.RetryOptions) azcore.ClientOptions {
	t.Helper()
	transport := f.Transport()
	t.Cleanup(transport.CloseIdleConnections)
	return azcore.ClientOptions{Transport: &http.Client{Transport: transport}, Retry: retry}
}

// connect makes a client of the real SDK, with all its checks.
func connect(t *testing.T, f *keyvaultfake.Fake, credential azcore.TokenCredential, retry policy.RetryOptions) *azsecrets.Client {
	t.Helper()
	client, err := azsecrets.NewClient(f.URL(), credential, &azsecrets.ClientOptions{ClientOptions: options(t, f, retry)})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func secretOf(t *testing.T, f *keyvaultfake.Fake, p keyvaultfake.Principal) azcore.TokenCredential {
	t.Helper()
	credential, err := azidentity.NewClientSecretCredential(p.TenantID, p.ClientID, p.ClientSecret,
		&azidentity.ClientSecretCredentialOptions{ClientOptions: options(t, f, once)})
	if err != nil {
		t.Fatal(err)
	}
	return credential
}

// person is a client with every right and without retries.
func person(t *testing.T, f *keyvaultfake.Fake) *azsecrets.Client {
	t.Helper()
	return connect(t, f, secretOf(t, f, f.Person()), once)
}

// result is an error as status and innermost code; ok for none.
func result(err error) string {
	var refused *azcore.ResponseError
	switch {
	case err == nil:
		return "ok"
	case !errors.As(err, &refused):
		return "no answer"
	}
	var body struct {
		Error struct {
			Code  string
			Inner struct{ Code string } `json:"innererror"`
		}
	}
	if text, err := io.ReadAll(refused.RawResponse.Body); err != nil || json.Unmarshal(text, &body) != nil {
		return fmt.Sprint(refused.StatusCode, " without a body")
	}
	if body.Error.Inner.Code != "" {
		return fmt.Sprint(refused.StatusCode, " ", body.Error.Inner.Code)
	}
	return fmt.Sprint(refused.StatusCode, " ", body.Error.Code)
}

// call does one thing with a name and gives its result, of lists how many items there
// are.
func call(t *testing.T, c *azsecrets.Client, what, name string) string {
	t.Helper()
	ctx := t.Context()
	switch what {
	case "set":
		_, err := c.SetSecret(ctx, name, azsecrets.SetSecretParameters{Value: new("v")}, nil)
		return result(err)
	case "get":
		_, err := c.GetSecret(ctx, name, "", nil)
		return result(err)
	case "update":
		_, err := c.UpdateSecretProperties(ctx, name, "", azsecrets.UpdateSecretPropertiesParameters{Tags: map[string]*string{"a": new("b")}}, nil)
		return result(err)
	case "delete":
		_, err := c.DeleteSecret(ctx, name, nil)
		return result(err)
	case "deleted":
		_, err := c.GetDeletedSecret(ctx, name, nil)
		return result(err)
	case "recover":
		_, err := c.RecoverDeletedSecret(ctx, name, nil)
		return result(err)
	case "purge":
		_, err := c.PurgeDeletedSecret(ctx, name, nil)
		return result(err)
	case "versions":
		page, err := c.NewListSecretPropertiesVersionsPager(name, nil).NextPage(ctx)
		return fmt.Sprint(result(err), " ", len(page.Value))
	case "list":
		page, err := c.NewListSecretPropertiesPager(nil).NextPage(ctx)
		return fmt.Sprint(result(err), " ", len(page.Value))
	case "list deleted":
		page, err := c.NewListDeletedSecretPropertiesPager(nil).NextPage(ctx)
		return fmt.Sprint(result(err), " ", len(page.Value))
	}
	t.Fatalf("no call %q", what)
	return ""
}

func expect(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %s, want %s", what, got, want)
	}
}

func TestVersions(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	c, ctx := person(t, f), t.Context()

	first, err := c.SetSecret(ctx, "Instance-A", azsecrets.SetSecretParameters{Value: new("one"), ContentType: new("text/plain"),
		Tags: map[string]*string{"k": new("v")}, SecretAttributes: &azsecrets.SecretAttributes{Expires: new(time.Unix(1, 0))}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if id := first.ID.Version(); len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "" {
		t.Errorf("version: got %q, want 32 hexadecimal characters", id)
	}
	expect(t, "id", string(*first.ID), f.URL()+"secrets/Instance-A/"+first.ID.Version())
	if created := *first.Attributes.Created; created.Nanosecond() != 0 {
		t.Errorf("created: got %v, want whole seconds", created)
	}
	if _, err := c.SetSecret(ctx, "instance-a", azsecrets.SetSecretParameters{Value: new("")}, nil); err != nil {
		t.Fatal(err)
	}
	newest, err := c.GetSecret(ctx, "INSTANCE-A", "", nil)
	if err != nil || *newest.Value != "" {
		t.Errorf("get: got %v, %v, want the empty value of the second version", newest.Value, err)
	}
	old, err := c.GetSecret(ctx, "instance-a", first.ID.Version(), nil)
	if err != nil || *old.Value != "one" {
		t.Errorf("get: got %v, %v, want the first version, though it has expired", old.Value, err)
	}
	expect(t, "an unknown version", result(second(c.GetSecret(ctx, "instance-a", strings.Repeat("0", 32), nil))), "404 SecretNotFound")

	// A patch changes what it names.
	patched, err := c.UpdateSecretProperties(ctx, "instance-a", first.ID.Version(), azsecrets.UpdateSecretPropertiesParameters{
		SecretAttributes: &azsecrets.SecretAttributes{Enabled: new(false)}}, nil)
	if err != nil || patched.Value != nil || *patched.ContentType != "text/plain" || *patched.Tags["k"] != "v" || patched.Attributes.Expires.Unix() != 1 {
		t.Errorf("patch: got %+v, %v, want all but enabled as it was, and no value", patched.Secret, err)
	}
	expect(t, "a disabled version", result(second(c.GetSecret(ctx, "instance-a", first.ID.Version(), nil))), "403 SecretDisabled")
	expect(t, "the newest", call(t, c, "get", "instance-a"), "ok")
	if _, err := c.UpdateSecretProperties(ctx, "instance-a", "", azsecrets.UpdateSecretPropertiesParameters{
		Tags: map[string]*string{"x": new("y")}, SecretAttributes: &azsecrets.SecretAttributes{Enabled: new(false)}}, nil); err != nil {
		t.Error(err)
	}
	expect(t, "no fallback", call(t, c, "get", "instance-a"), "403 SecretDisabled")

	versions := f.Versions("instance-a")
	if len(versions) != 2 || versions[0].Value != "one" || versions[0].Enabled || versions[1].Tags["x"] != "y" || versions[1].Enabled {
		t.Errorf("got versions %+v, want two in order, both disabled", versions)
	}
	page, err := c.NewListSecretPropertiesPager(nil).NextPage(ctx)
	if err != nil || len(page.Value) != 1 || page.Value[0].ID.Version() != "" || *page.Value[0].Tags["x"] != "y" || *page.Value[0].Attributes.Enabled {
		t.Errorf("list: got %v, %v, want the name with what the newest version has", page.Value, err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestTransitions(t *testing.T) {
	t.Parallel()
	const absent, ok = "404 SecretNotFound", "ok"
	deleting, recovering, deleted := "409 ObjectIsBeingDeleted", "409 ObjectIsBeingRecovered", "409 ObjectIsDeletedButRecoverable"
	f := start(t, keyvaultfake.Config{})
	c := person(t, f)
	whats := []string{"get", "deleted", "versions", "list", "list deleted"}
	for i, step := range []struct {
		advance time.Duration
		do      string
		want    string
		state   keyvaultfake.NameState
		reads   []string
	}{
		{0, "get", absent, keyvaultfake.Absent, []string{absent, absent, "ok 0", "ok 0", "ok 0"}},
		{0, "update", absent, keyvaultfake.Absent, nil},
		{0, "delete", absent, keyvaultfake.Absent, nil},
		{0, "recover", absent, keyvaultfake.Absent, nil},
		{0, "purge", absent, keyvaultfake.Absent, nil},
		{0, "set", ok, keyvaultfake.Live, []string{ok, absent, "ok 1", "ok 1", "ok 0"}},
		{0, "recover", absent, keyvaultfake.Live, nil},
		{0, "delete", ok, keyvaultfake.Deleting, []string{absent, absent, "ok 0", "ok 0", "ok 0"}},
		{0, "set", deleting, keyvaultfake.Deleting, nil},
		{0, "update", deleting, keyvaultfake.Deleting, nil},
		{0, "delete", deleting, keyvaultfake.Deleting, nil},
		{0, "purge", deleting, keyvaultfake.Deleting, nil},
		{14 * time.Second, "recover", absent, keyvaultfake.Deleting, nil},
		{time.Second, "set", deleted, keyvaultfake.Deleted, []string{absent, ok, "ok 0", "ok 0", "ok 1"}},
		{0, "update", absent, keyvaultfake.Deleted, nil},
		{0, "delete", absent, keyvaultfake.Deleted, nil},
		{0, "recover", ok, keyvaultfake.Recovering, []string{absent, absent, "ok 0", "ok 0", "ok 0"}},
		{0, "recover", absent, keyvaultfake.Recovering, nil},
		{0, "set", recovering, keyvaultfake.Recovering, nil},
		{0, "update", recovering, keyvaultfake.Recovering, nil},
		{11 * time.Second, "delete", recovering, keyvaultfake.Recovering, nil},
		{time.Second, "set", recovering, keyvaultfake.Live, []string{ok, absent, "ok 1", "ok 1", "ok 0"}},
		{0, "update", recovering, keyvaultfake.Live, nil},
		{0, "delete", recovering, keyvaultfake.Live, nil},
		{4 * time.Second, "set", ok, keyvaultfake.Live, []string{ok, absent, "ok 2", "ok 1", "ok 0"}},
		{0, "delete", ok, keyvaultfake.Deleting, nil},
		{15 * time.Second, "purge", ok, keyvaultfake.Purging, []string{absent, absent, "ok 0", "ok 0", "ok 0"}},
		{0, "recover", absent, keyvaultfake.Purging, nil},
		{0, "purge", absent, keyvaultfake.Purging, nil},
		{9 * time.Second, "set", deleting, keyvaultfake.Purging, nil},
		{time.Second, "set", ok, keyvaultfake.Live, []string{ok, absent, "ok 1", "ok 1", "ok 0"}},
		{0, "delete", ok, keyvaultfake.Deleting, nil},
		// The retention ends.
		{90*24*time.Hour - time.Second, "deleted", ok, keyvaultfake.Deleted, nil},
		{time.Second, "deleted", absent, keyvaultfake.Absent, nil},
		{0, "set", ok, keyvaultfake.Live, nil},
	} {
		f.Advance(step.advance)
		what := fmt.Sprint("step ", i, ", ", step.do)
		expect(t, what, call(t, c, step.do, "name"), step.want)
		expect(t, what+", state", string(f.State("name")), string(step.state))
		for j, want := range step.reads {
			expect(t, what+", then "+whats[j], call(t, c, whats[j], "name"), want)
		}
	}
}

func TestDeletedBundle(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{Transitions: &keyvaultfake.Transitions{}, Retention: 7 * 24 * time.Hour, PurgeProtection: true})
	c, ctx := person(t, f), t.Context()
	made := f.PersonSet("gone", "v", map[string]string{"k": "v"})
	if _, err := c.DeleteSecret(ctx, "gone", nil); err != nil {
		t.Fatal(err)
	}
	got, err := c.GetDeletedSecret(ctx, "gone", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.Value != nil || got.ID.Version() != made.ID || *got.Tags["k"] != "v" || *got.RecoveryID != f.URL()+"deletedsecrets/gone" ||
		got.ScheduledPurgeDate.Sub(*got.DeletedDate) != 7*24*time.Hour || *got.Attributes.RecoveryLevel != "CustomizedRecoverable" {
		t.Errorf("deleted: got %+v, want version, tags and dates, without a value", got.DeletedSecret)
	}
	expect(t, "purge", call(t, c, "purge", "gone"), "403 Forbidden")
	recovered, err := c.RecoverDeletedSecret(ctx, "gone", nil)
	if err != nil || recovered.Value != nil || recovered.ID.Version() != made.ID {
		t.Errorf("recover: got %+v, %v, want the version without a value", recovered.Secret, err)
	}
	expect(t, "get", call(t, c, "get", "gone"), "ok")
	expect(t, "set", call(t, c, "set", "gone"), "ok")
}

func TestPages(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{Limits: &keyvaultfake.Limits{}})
	c, ctx := person(t, f), t.Context()
	var names, versions []string
	for i := range 60 {
		names = append(names, fmt.Sprintf("name-%02d", i))
		f.PersonSet(names[i], "v", nil)
	}
	for range 33 {
		versions = append(versions, f.PersonSet(names[0], "v", nil).ID)
	}
	versions = append(versions, f.Versions(names[0])[0].ID)

	var got []string
	pages := 0
	for pager := c.NewListSecretPropertiesPager(nil); pager.More(); pages++ {
		page, err := pager.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if next := page.NextLink; next != nil && !strings.HasPrefix(*next, "https://exto-test.vault.azure.net:443/secrets?api-version=") {
			t.Errorf("got next link %s, want one at the vault with its port", *next)
		}
		for _, it := range page.Value {
			got = append(got, it.ID.Name())
			expect(t, "id", string(*it.ID), f.URL()+"secrets/"+it.ID.Name())
		}
		if pages == 0 { // neither shifts what is left
			f.PersonDelete(names[3])
			f.PersonSet("aaa", "v", nil)
		}
	}
	if pages != 3 || !slices.Equal(got, names) {
		t.Errorf("got %d pages of %v, want 3 with all names in order", pages, got)
	}

	got, pages = nil, 0
	for pager := c.NewListSecretPropertiesVersionsPager(names[0], nil); pager.More(); pages++ {
		page, err := pager.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, it := range page.Value {
			got = append(got, it.ID.Version())
		}
	}
	if pages != 2 || slices.Equal(got, versions) {
		t.Errorf("got %d pages %v, want 2, not in order of creation", pages, got)
	}
	slices.Sort(got)
	slices.Sort(versions)
	if !slices.Equal(got, versions) {
		t.Errorf("got versions %v, want %v", got, versions)
	}
}

func TestBadRequests(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	c, ctx := person(t, f), t.Context()
	many := map[string]*string{}
	for i := range 16 {
		many[fmt.Sprint(i)] = new("v")
	}
	const value = "hunter2<&>"
	for name, in := range map[string]azsecrets.SetSecretParameters{
		"long-value":             {Value: new(strings.Repeat("v", 25*1024+1))},
		"content-type":           {Value: new(value), ContentType: new(strings.Repeat("c", 256))},
		"many-tags":              {Value: new(value), Tags: many},
		"long-tag-name":          {Value: new(value), Tags: map[string]*string{strings.Repeat("t", 513): new("")}},
		"long-tag":               {Value: new(value), Tags: map[string]*string{"t": new(strings.Repeat("ä", 513))}},
		"bad_name":               {Value: new(value)},
		"no-value":               {},
		strings.Repeat("n", 128): {Value: new(value)},
	} {
		_, err := c.SetSecret(ctx, name, in, nil)
		if in.Value != nil && !strings.Contains(err.Error(), *in.Value) {
			t.Errorf("%s: got an error without the value, want it to echo it", name)
		}
		expect(t, name, result(err), "400 BadParameter")
		expect(t, name, string(f.State(name)), "absent")
	}
	for name, in := range map[string]azsecrets.SetSecretParameters{
		"value":                  {Value: new(strings.Repeat("v", 25*1024)), ContentType: new(strings.Repeat("c", 255))},
		"tag":                    {Value: new(value), Tags: map[string]*string{strings.Repeat("ä", 512): new(strings.Repeat("ä", 512)), "null": nil}},
		strings.Repeat("n", 127): {Value: new(value)},
	} {
		expect(t, name, result(second(c.SetSecret(ctx, name, in, nil))), "ok")
	}
	f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault { return keyvaultfake.Fault{Status: 400} })
	_, err := c.SetSecret(ctx, "injected", azsecrets.SetSecretParameters{Value: new(value)}, nil)
	if !strings.Contains(err.Error(), value) {
		t.Errorf("injected: got %v, want the value in it", err)
	}
}

// TestRequests sends what the SDK never does.
func TestRequests(t *testing.T) {
	t.Parallel()
	f := start(t, keyvaultfake.Config{})
	f.PersonSet("name", "v", nil)
	p := f.Person()
	client := &http.Client{Transport: options(t, f, once).Transport.(*http.Client).Transport}
	answer, err := client.PostForm("https://login.microsoftonline.com/"+p.TenantID+"/oauth2/v2.0/token", url.Values{
		"grant_type": {"client_credentials"}, "client_id": {p.ClientID}, "client_secret": {p.ClientSecret}, "scope": {"https://vault.azure.net/.default"}})
	if err != nil {
		t.Fatal(err)
	}
	var token struct {
		AccessToken string `json:"access_token"`
	}
	err = json.NewDecoder(answer.Body).Decode(&token)
	answer.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	for _, request := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "secrets/name?api-version=7.4", "", 200},
		{"GET", "secrets/name/?api-version=2016-10-01", "", 200},
		{"GET", "secrets/name", "", 400},
		{"GET", "secrets?api-version=7.4&maxresults=1", "", 200},
		{"GET", "secrets?api-version=7.4&maxresults=26", "", 400},
		{"GET", "secrets?api-version=7.4&$skiptoken=nonsense", "", 400},
		{"GET", "secrets/a%2Fb?api-version=7.4", "", 400},
		{"PUT", "secrets/name?api-version=7.4", "{", 400},
		{"PUT", "secrets/name?api-version=7.4", `{"value": null}`, 400},
		{"PATCH", "secrets/name?api-version=7.4", `{"attributes": null, "tags": null, "contentType": null}`, 200},
		{"POST", "secrets/name/backup?api-version=7.4", "", 405},
		{"GET", "keys?api-version=7.4", "", 405},
	} {
		r, err := http.NewRequestWithContext(t.Context(), request.method, f.URL()+request.path, strings.NewReader(request.body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+token.AccessToken)
		r.Header.Set("x-ms-client-request-id", "mine")
		answer, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != request.status {
			t.Errorf("%s %s: got %d, want %d", request.method, request.path, answer.StatusCode, request.status)
		}
		journal := f.Journal()
		last := journal[len(journal)-1]
		if id := answer.Header.Get("x-ms-request-id"); id == "" || last.RequestID != id || last.ClientRequestID != "mine" || last.Status != answer.StatusCode || last.Principal != p.ClientID {
			t.Errorf("%s %s: got journal %+v, want request id %s, client request id mine", request.method, request.path, last, id)
		}
		if answer.Header.Get("x-ms-keyvault-region") == "" {
			t.Errorf("%s %s: got no region", request.method, request.path)
		}
	}
}
