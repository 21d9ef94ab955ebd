package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/client/brokertest"
	"github.com/exto/secrets-broker/examples/rows"
	"github.com/exto/secrets-broker/secret"
)

const creation = `{"id": "demo", "database_uri": "postgres://app:password@db-7/orders", "oidc_client_secret": "correct horse"}`

// bench is an api on a broker and a SQLite file.
type bench struct {
	t      *testing.T
	broker *brokertest.Broker
	api    *api
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := brokertest.New(t)
	c := b.Client("console-api")
	table, err := rows.Open("sqlite:" + filepath.Join(t.TempDir(), "console.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = table.Close() })
	if err := table.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	verifier := client.NewVerifier(t.Context(), c, client.VerifierOptions{Instances: 10})
	return &bench{t, b, &api{broker: c, verifier: verifier, table: table, operator: secret.NewValue("operator")}}
}

// ask makes a request with a bearer token. For any goroutine.
func (b *bench) ask(ctx context.Context, method, path, token, body string) (int, string) {
	req := httptest.NewRequestWithContext(ctx, method, path, strings.NewReader(body))
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	w := httptest.NewRecorder()
	b.api.routes().ServeHTTP(w, req)
	return w.Code, w.Body.String()
}

func (b *bench) want(status int, method, path, token, body string) string {
	b.t.Helper()
	got, answer := b.ask(b.t.Context(), method, path, token, body)
	if got != status {
		b.t.Errorf("%s %s: got %d %s, want %d", method, path, got, answer, status)
	}
	return answer
}

func (b *bench) live() (keys []string) {
	b.t.Helper()
	for m, err := range b.api.broker.List(b.t.Context(), client.ListOptions{}) {
		if err != nil {
			b.t.Fatal(err)
		}
		keys = append(keys, m.Key.String())
	}
	return keys
}

func TestWhoMayCall(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, route := range []string{"POST /instances", "POST /instances/demo/rotate", "PUT /instances/demo/connection", "DELETE /instances/demo"} {
		method, path, _ := strings.Cut(route, " ")
		for _, token := range []string{"", "wrong", "operato", "operator2"} {
			b.want(http.StatusUnauthorized, method, path, token, creation)
		}
	}
	var out answer
	if err := json.Unmarshal([]byte(b.want(http.StatusOK, "POST", "/instances", "operator", creation)), &out); err != nil {
		t.Fatal(err)
	}
	b.want(http.StatusOK, "GET", "/v1/instances/demo/hello", out.RegistrationToken, "")
	for _, token := range []string{"", "wrong", "operator", out.RegistrationToken + "x"} {
		b.want(http.StatusUnauthorized, "GET", "/v1/instances/demo/hello", token, "")
	}
	b.want(http.StatusUnauthorized, "GET", "/v1/instances/other/hello", out.RegistrationToken, "")
	b.want(http.StatusNotFound, "GET", "/v1/instances/NONE/hello", out.RegistrationToken, "")
}

// Nobody is told that a token is wrong when nobody can know.
func TestHelloWithoutTheVault(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	over := b.broker.VaultOutage()
	defer over()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if got, answer := b.ask(ctx, "GET", "/v1/instances/demo/hello", "token", ""); got != http.StatusServiceUnavailable {
		t.Errorf("got %d %s, want 503", got, answer)
	}
}

// What is refused leaves nothing behind, and no error repeats a secret.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, body := range []string{
		"", "{", `{"id": "demo-hunter2"`, `{"hunter2": 1}`, `{"id": "demo", "database_uri": 17, "oidc_client_secret": "hunter2"}`,
		strings.Replace(creation, "postgres:", "hunter2:", 1), strings.Replace(creation, "correct horse", "hunter2\\n", 1), strings.Replace(creation, `"demo"`, `"HUNTER2"`, 1),
		`{"id": "` + strings.Repeat("x", 70<<10) + `"}`, creation + ` {"hunter2": 1}`,
	} {
		if answer := b.want(http.StatusBadRequest, "POST", "/instances", "operator", body); strings.Contains(answer, "hunter2") {
			t.Errorf("%.80s: got %s, which holds a part of it", body, answer)
		}
	}
	if keys := b.live(); len(keys) != 0 {
		t.Errorf("got secrets %v, want none", keys)
	}
	b.want(http.StatusNotFound, "POST", "/instances/demo/rotate", "operator", `{"grace": "1m"}`)
	b.want(http.StatusNotFound, "PUT", "/instances/demo/connection", "operator", `{"database_uri": "postgres://h/db"}`)
	b.want(http.StatusNoContent, "DELETE", "/instances/demo", "operator", "")
	b.want(http.StatusOK, "POST", "/instances", "operator", creation)
	for _, grace := range []string{"", "1", "-1s", "25h"} {
		b.want(http.StatusBadRequest, "POST", "/instances/demo/rotate", "operator", `{"grace": "`+grace+`"}`)
	}
	b.want(http.StatusBadRequest, "PUT", "/instances/demo/connection", "operator", `{"database_uri": "hunter2"}`)
}

// A URI that somebody deleted is not brought back by another connection, nor a
// token by a rotation.
func TestDeletedStaysDeleted(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.want(http.StatusOK, "POST", "/instances", "operator", creation)
	b.want(http.StatusNoContent, "PUT", "/instances/demo/connection", "operator", `{"database_uri": "postgres://h/db"}`)
	brokertest.MustDelete(t, b.api.broker, brokertest.MustKey(t, "demo", secret.DatabaseURI))
	brokertest.MustDelete(t, b.api.broker, brokertest.MustKey(t, "demo", secret.RegistrationToken))
	b.want(http.StatusConflict, "PUT", "/instances/demo/connection", "operator", `{"database_uri": "postgres://h/db"}`)
	b.want(http.StatusConflict, "POST", "/instances/demo/rotate", "operator", `{"grace": "1m"}`)
	if keys := b.live(); len(keys) != 1 {
		t.Errorf("got secrets %v, want the client secret alone", keys)
	}
}

// A DELETE waits for a create that is under way, whose caller may be gone by then.
// So no secret is left without a row.
func TestDeleteWaitsForCreate(t *testing.T) {
	t.Parallel()
	for _, held := range []struct {
		method string
		nth    int32
	}{{"PutSecret", 1}, {"PutSecret", 2}, {"RotateSecret", 1}} {
		t.Run(fmt.Sprintf("%s %d", held.method, held.nth), func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			id := brokertest.MustKey(t, "demo", secret.RegistrationToken).InstanceID()
			reached, release := b.holdCall(held.method, held.nth)
			ctx, leave := context.WithCancel(t.Context())
			created, deleted := make(chan int, 1), make(chan int, 1)
			go func() {
				status, _ := b.ask(ctx, "POST", "/instances", "operator", creation)
				created <- status
			}()
			<-reached
			leave()
			impatient, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if got, answer := b.ask(impatient, "DELETE", "/instances/demo", "operator", ""); got != http.StatusServiceUnavailable {
				t.Errorf("DELETE during a create: got %d %s, want 503 when the caller waits no longer", got, answer)
			}
			if row, err := b.api.table.Get(t.Context(), id); err != nil || row.State != rows.Creating {
				t.Errorf("got row %v, %v, want one that says creating", row, err)
			}
			go func() {
				status, _ := b.ask(t.Context(), "DELETE", "/instances/demo", "operator", "")
				deleted <- status
			}()
			release()
			if c, d := <-created, <-deleted; c != http.StatusOK || d != http.StatusNoContent {
				t.Errorf("got %d and %d, want 200 and 204", c, d)
			}
			b.wantNothing(id)
			b.want(http.StatusOK, "POST", "/instances", "operator", creation)
		})
	}
}

// Nor does a DELETE come between what a rotation or a connection looks at and what
// it writes.
func TestDeleteWaitsForChange(t *testing.T) {
	t.Parallel()
	for _, change := range []struct {
		held               string
		nth                int32
		method, path, body string
		want               int
	}{
		{"RotateSecret", 2, "POST", "/instances/demo/rotate", `{"grace": "1m"}`, http.StatusOK},
		{"DescribeSecret", 1, "PUT", "/instances/demo/connection", `{"database_uri": "postgres://h/db"}`, http.StatusNoContent},
	} {
		t.Run(change.held, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			reached, release := b.holdCall(change.held, change.nth)
			b.want(http.StatusOK, "POST", "/instances", "operator", creation)
			changed := make(chan int, 1)
			go func() {
				status, _ := b.ask(t.Context(), change.method, change.path, "operator", change.body)
				changed <- status
			}()
			<-reached
			impatient, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if got, answer := b.ask(impatient, "DELETE", "/instances/demo", "operator", ""); got != http.StatusServiceUnavailable {
				t.Errorf("DELETE meanwhile: got %d %s, want 503 when the caller waits no longer", got, answer)
			}
			release()
			if got := <-changed; got != change.want {
				t.Errorf("got %d, want %d", got, change.want)
			}
			b.want(http.StatusNoContent, "DELETE", "/instances/demo", "operator", "")
			b.wantNothing(brokertest.MustKey(t, "demo", secret.DatabaseURI).InstanceID())
		})
	}
}

// A create that fails leaves a row that tells of its secrets.
func TestCreateFails(t *testing.T) {
	t.Parallel()
	for permission, left := range map[string]int{"put": 0, "rotate": 2} {
		t.Run(permission, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			id := brokertest.MustKey(t, "demo", secret.RegistrationToken).InstanceID()
			undo := b.broker.Deny("console-api", permission)
			b.want(http.StatusInternalServerError, "POST", "/instances", "operator", creation)
			undo()
			if row, err := b.api.table.Get(t.Context(), id); err != nil || row.State != rows.Creating || len(b.live()) != left {
				t.Errorf("got row %v, %v, and secrets %v, want one that says creating, and %d secrets", row, err, b.live(), left)
			}
			b.want(http.StatusConflict, "POST", "/instances", "operator", creation)
			b.want(http.StatusConflict, "POST", "/instances/demo/rotate", "operator", `{"grace": "1m"}`)
			b.want(http.StatusNoContent, "DELETE", "/instances/demo", "operator", "")
			b.wantNothing(id)
			b.want(http.StatusOK, "POST", "/instances", "operator", creation)
		})
	}
}

// A create whose row somebody else replaced says so, and leaves the other row alone.
func TestCreateLosesItsRow(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := brokertest.MustKey(t, "demo", secret.RegistrationToken).InstanceID()
	reached, release := b.holdCall("RotateSecret", 1)
	created := make(chan int, 1)
	go func() {
		status, _ := b.ask(t.Context(), "POST", "/instances", "operator", creation)
		created <- status
	}()
	<-reached
	row, err := b.api.table.MarkDeleting(t.Context(), id)
	if err == nil {
		err = b.api.table.Delete(t.Context(), row)
	}
	if err == nil {
		_, err = b.api.table.Insert(t.Context(), id)
	}
	if err != nil {
		t.Fatal(err)
	}
	release()
	if got := <-created; got != http.StatusInternalServerError {
		t.Errorf("got %d, want 500", got)
	}
	if row, err := b.api.table.Get(t.Context(), id); err != nil || row.State != rows.Creating {
		t.Errorf("got row %v, %v, want one that says creating", row, err)
	}
}

// holdCall keeps one call of the api to the broker back until release: the nth one
// of this method. It is for a bench that has had no request.
func (b *bench) holdCall(method string, nth int32) (reached <-chan struct{}, release func()) {
	b.t.Helper()
	at, held := make(chan struct{}), make(chan struct{})
	var calls atomic.Int32
	target, cfg := b.broker.Config("console-api")
	c, err := client.New(target, cfg, append(b.broker.DialOptions(), grpc.WithUnaryInterceptor(
		func(ctx context.Context, name string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, o ...grpc.CallOption) error {
			if path.Base(name) == method && calls.Add(1) == nth {
				close(at)
				<-held
			}
			return invoke(ctx, name, req, reply, conn, o...)
		}))...)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = c.Close() })
	b.api.broker = c
	release = sync.OnceFunc(func() { close(held) })
	b.t.Cleanup(release)
	return at, release
}

func (b *bench) wantNothing(id secret.InstanceID) {
	b.t.Helper()
	if row, err := b.api.table.Get(b.t.Context(), id); !errors.Is(err, rows.ErrNotFound) {
		b.t.Errorf("got row %v, %v, want none", row, err)
	}
	if keys := b.live(); len(keys) != 0 {
		b.t.Errorf("got secrets %v, want none", keys)
	}
}

func TestReadOperator(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "header")
	for _, test := range []struct {
		content string
		mode    os.FileMode
		want    string // empty: an error
	}{
		{"Authorization: Bearer abc\n", 0o600, "abc"},
		{"Authorization: Bearer abc", 0o640, ""},
		{"Authorization: Bearer \n", 0o600, ""},
		{"abc\n", 0o600, ""},
	} {
		if err := os.WriteFile(file, []byte(test.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, test.mode); err != nil {
			t.Fatal(err)
		}
		got, err := readOperator(file)
		if (err == nil) != (test.want != "") || got.Reveal() != test.want || err != nil && strings.Contains(err.Error(), "abc") {
			t.Errorf("%q %o: got %q, %v, want %q", test.content, test.mode, got.Reveal(), err, test.want)
		}
	}
}
