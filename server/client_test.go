package server_test

import (
	"errors"
	"testing"
	"time"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/secret"
)

// library is the client library with the SPIFFE ID of this path.
func (s *system) library(path string) *client.Client {
	s.t.Helper()
	pair := s.certificate("spiffe://console.exto/" + path)
	c, err := client.New(s.addr, client.Config{
		CertFile: s.write("client.pem", pair.CertPEM()),
		KeyFile:  s.write("client-key.pem", s.keyPEM(pair)),
		CAFile:   s.write("client-ca.pem", s.ca.CertPEM()),
	})
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
