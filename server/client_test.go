package server_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/secret"
)

// library is the client library with the SPIFFE ID of this path.
func (s *system) library(path string, opts ...grpc.DialOption) *client.Client {
	s.t.Helper()
	pair := s.certificate("spiffe://console.exto/" + path)
	name := strings.ReplaceAll(path, "/", "-") // one's own: a Client reads its files again
	c, err := client.New(s.addr, client.Config{
		CertFile: s.write(name+".pem", pair.CertPEM()),
		KeyFile:  s.write(name+"-key.pem", s.keyPEM(pair)),
		CAFile:   s.write("client-ca.pem", s.ca.CertPEM()),
	}, opts...)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() })
	return c
}

// TestClientLibrary goes through a secret's life with the library that callers
// import, against the broker itself.
func TestClientLibrary(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	c := s.library(consoleAPI)
	ctx := callContext(t)
	uri := key(t, "acme", secret.DatabaseURI)
	token := key(t, "acme", secret.RegistrationToken)
	value := secret.NewValue("mongodb://app:s3cr3t-one@a:27017,b:27017/db?replicaSet=r")

	if _, err := c.Get(ctx, uri, client.GetOptions{}); !errors.Is(err, client.ErrNotFound) {
		t.Fatalf("Get before Put: got %v, want ErrNotFound", err)
	}
	put, err := c.Put(ctx, uri, value, client.PutOptions{MustNotExist: true})
	if err != nil || put.Generation != 1 || put.Key != uri || put.State != client.Active {
		t.Fatalf("Put: got %+v, %v", put, err)
	}
	if _, err := c.Put(ctx, uri, value, client.PutOptions{MustNotExist: true}); !errors.Is(err, client.ErrExists) {
		t.Errorf("Put over it: got %v, want ErrExists", err)
	}
	if again, err := c.Put(ctx, uri, value, client.PutOptions{}); err != nil || !again.Unchanged || again.Version != put.Version {
		t.Errorf("Put of the same: got %+v, %v, want it unchanged", again, err)
	}
	_, err = c.Put(ctx, uri, secret.NewValue("postgres://h/db"), client.PutOptions{MustMatchVersion: "another"})
	var told *client.Error
	if !errors.As(err, &told) || !errors.Is(err, client.ErrVersionMismatch) || told.CommitState != secret.NotApplied || told.AuditID == "" || told.RequestID == "" {
		t.Errorf("Put on another version: got %#v, want ErrVersionMismatch, not applied, with both ids", told)
	}
	got, err := c.Get(ctx, uri, client.GetOptions{KnownVersion: put.Version})
	if err != nil || !got.NotModified || !got.Value.IsEmpty() {
		t.Errorf("Get of a known version: got %+v, %v, want not modified", got, err)
	}
	if got, err = c.Get(ctx, uri, client.GetOptions{}); err != nil || !got.Value.Equal(value) || got.Source != client.Cache {
		t.Errorf("Get: got %+v, %v, want the value, from memory", got, err)
	}

	first, err := c.Rotate(ctx, token, client.RotateOptions{AllowMissing: true})
	if err != nil || first.Previous != nil || first.Value.IsEmpty() {
		t.Fatalf("Rotate of nothing: got %+v, %v", first, err)
	}
	second, err := c.Rotate(ctx, token, client.RotateOptions{GracePeriod: time.Minute})
	if err != nil || second.Previous == nil || second.Previous.Version != first.Version || second.Previous.ExpireTime.IsZero() {
		t.Fatalf("Rotate: got %+v, %v", second, err)
	}
	if _, err := c.Get(ctx, token, client.GetOptions{Version: first.Version}); err != nil {
		t.Errorf("Get of the version in grace: %v", err)
	}
	s.clock.advance(time.Minute)
	if _, err := c.Get(ctx, token, client.GetOptions{Version: first.Version}); !errors.Is(err, client.ErrVersionExpired) {
		t.Errorf("Get after the grace: got %v, want ErrVersionExpired", err)
	}

	if m, err := c.Delete(ctx, uri, client.DeleteOptions{}); err != nil || m == nil || m.State != client.Deleted {
		t.Fatalf("Delete: got %+v, %v", m, err)
	}
	var listed []secret.Key
	for m, err := range c.List(ctx, client.ListOptions{ShowDeleted: true, PageSize: 1}) {
		if err != nil {
			t.Fatal(err)
		}
		listed = append(listed, m.Key)
	}
	if len(listed) != 2 || listed[0] != token || listed[1] != uri {
		t.Errorf("List: got %v, want the token, then the deleted URI", listed)
	}
	if _, err := c.Recover(ctx, uri, client.RecoverOptions{}); err != nil {
		t.Errorf("Recover: %v", err)
	}
	described, err := c.Describe(ctx, uri)
	if err != nil || described.RedactedValue != "mongodb://app:***@a:27017,b:27017/db?replicaSet=r" || len(described.Versions) != 1 {
		t.Errorf("Describe: got %+v, %v", described, err)
	}
	if _, err := s.library(operator).Get(ctx, uri, client.GetOptions{}); !errors.Is(err, client.ErrNotAllowed) {
		t.Errorf("Get by the operator: got %v, want ErrNotAllowed", err)
	}
}

// TestClientLibraryFollows holds secrets in memory against the broker itself.
func TestClientLibraryFollows(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	c := s.library(consoleAPI)
	ctx := callContext(t)
	uri := key(t, "acme", secret.DatabaseURI)
	token := key(t, "acme", secret.RegistrationToken)
	first, err := c.Rotate(ctx, token, client.RotateOptions{AllowMissing: true})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Verify(ctx, token.InstanceID(), first.Value); err != nil || got.Match != client.MatchCurrent {
		t.Errorf("Verify: got %+v, %v, want MATCH_CURRENT", got, err)
	}
	if got, err := c.Verify(ctx, token.InstanceID(), secret.NewValue("another")); err != nil || got.Match != client.NoMatch {
		t.Errorf("Verify of another: got %+v, %v, want NO_MATCH", got, err)
	}

	// Of each the present state, then the changes.
	seen := map[secret.Key]client.ChangeType{}
	for change, err := range c.Watch(ctx, uri, token) {
		if err != nil {
			t.Fatal(err)
		}
		if seen[change.Key] = change.Type; len(seen) == 2 {
			break
		}
	}
	if seen[uri] != client.ChangeMissing || seen[token] != client.ChangeCurrent {
		t.Errorf("Watch: got %v, want the URI missing and the token current", seen)
	}

	instance := s.library("instance/acme")
	source, err := client.NewSource(ctx, instance, token, client.SourceOptions{Interval: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	missing, err := client.NewSource(ctx, instance, uri, client.SourceOptions{Interval: time.Hour, AllowMissing: true})
	if err != nil {
		t.Fatal(err)
	}
	if held := source.Value(); !held.Value.Equal(first.Value) {
		t.Errorf("got %+v, want the first token", held)
	}

	// Rotated without grace, the instance asks when it is refused.
	second, err := c.Rotate(ctx, token, client.RotateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if held, err := source.Unauthorized(ctx, first.Version); err != nil || !held.Value.Equal(second.Value) {
		t.Errorf("Unauthorized: got %+v, %v, want the second token", held, err)
	}
	// All else comes by the watch.
	put, err := c.Put(ctx, uri, secret.NewValue("postgres://db-7/orders"), client.PutOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the URI", func() bool { held := missing.Value(); return held.Version == put.Version && held.Err == nil })
	if err := c.DeleteInstance(ctx, token.InstanceID()); err != nil {
		t.Fatal(err)
	}
	for _, one := range []*client.Source{source, missing} {
		eventually(t, "the deletion", func() bool { return errors.Is(one.Value().Err, client.ErrNotFound) })
	}
	if err := c.DeleteInstance(ctx, token.InstanceID()); err != nil {
		t.Errorf("DeleteInstance again: %v", err)
	}
	if _, err := c.Recover(ctx, token, client.RecoverOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the token again", func() bool { held := source.Value(); return held.Err == nil && held.Value.Equal(second.Value) })
}

// TestClientLibraryOutlastsARestart: a broker that goes and comes back fails no
// call that can wait, and Sources follow it again.
func TestClientLibraryOutlastsARestart(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	var addr atomic.Value // another broker has another port
	addr.Store(s.addr)
	c := s.library(consoleAPI, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", addr.Load().(string))
	}))
	ctx := callContext(t)
	token := key(t, "acme", secret.RegistrationToken)
	if _, err := c.Rotate(ctx, token, client.RotateOptions{AllowMissing: true}); err != nil {
		t.Fatal(err)
	}
	source, err := client.NewSource(ctx, c, token, client.SourceOptions{Interval: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan int64)
	go func() {
		generation := int64(1)
		for {
			select {
			case <-stop:
				done <- generation
				return
			default:
			}
			rotated, err := c.Rotate(ctx, token, client.RotateOptions{})
			if err != nil || rotated.Generation != generation+1 {
				t.Errorf("Rotate: got generation %d, %v, want %d", rotated.Generation, err, generation+1)
			}
			generation++
		}
	}()
	s.stop()
	s.restart()
	addr.Store(s.addr)
	close(stop)
	last := <-done
	eventually(t, "the last generation", func() bool { held := source.Value(); return held.Err == nil && held.Generation == last })
}
