package brokertest_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/client/brokertest"
	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

func TestVaultOutage(t *testing.T) {
	t.Parallel()
	b := brokertest.New(t, brokertest.CacheTTL(time.Nanosecond))
	c, key := b.Client("worker"), dbKey(t)
	brokertest.MustPut(t, c, key, uri)

	over, again := b.VaultOutage(), b.VaultOutage()
	for _, end := range []func(){over, over, again} {
		got := brokertest.MustGet(t, c, key)
		wantValue(t, "in an outage", got.Value, uri)
		if got.Source != client.StaleOnError {
			t.Errorf("got source %s, want %s", got.Source, client.StaleOnError)
		}
		_, err := fresh(soon(t), c, key)
		wantError(t, "a bound that can't be met", err, client.ErrUnavailable)
		_, err = c.Put(soon(t), key, other, client.PutOptions{})
		if e, ok := errors.AsType[*client.Error](err); !ok || e.Reason != secret.VaultUnavailable || e.CommitState != secret.NotApplied {
			t.Errorf("put: got %v, want %s, %s", err, secret.VaultUnavailable, secret.NotApplied)
		}
		end()
	}
	got, err := fresh(t.Context(), c, key)
	if err != nil || got.Source != client.Live {
		t.Errorf("after the outage: got %s, %v, want %s", got.Source, err, client.Live)
	}
	brokertest.MustPut(t, c, key, other)
}

func TestBounds(t *testing.T) {
	t.Parallel()
	key := dbKey(t)
	b := brokertest.New(t, brokertest.CacheTTL(time.Nanosecond), brokertest.StaleOnError(0))
	c := b.Client("worker")
	brokertest.MustPut(t, c, key, uri)
	b.VaultOutage()
	_, err := c.Get(soon(t), key, client.GetOptions{})
	wantError(t, "no stale answers", err, client.ErrUnavailable)

	b = brokertest.New(t, brokertest.CacheTTL(time.Hour))
	c = b.Client("worker")
	brokertest.MustPut(t, c, key, uri)
	b.Person().Set(key, other)
	got := brokertest.MustGet(t, c, key)
	wantValue(t, "from memory", got.Value, uri)
	if got.Source != client.Cache {
		t.Errorf("got source %s, want %s", got.Source, client.Cache)
	}
}

func TestLatency(t *testing.T) {
	t.Parallel()
	b := brokertest.New(t)
	c, key := b.Client("worker"), dbKey(t)
	brokertest.MustGet(t, c, brokertest.MustPut(t, c, key, uri).Key) // it is connected

	b.SetLatency(time.Hour)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := c.Put(ctx, key, other, client.PutOptions{})
	e, ok := errors.AsType[*client.Error](err)
	if !ok || e.Code != codes.DeadlineExceeded || e.CommitState != secret.Unknown {
		t.Fatalf("got %v, want DEADLINE_EXCEEDED, %s", err, secret.Unknown)
	}

	// What waits comes when the latency is over, on connections that it held up in
	// their handshake too.
	gets := make(chan error, 2)
	for _, c := range []*client.Client{c, b.Client("worker")} {
		go func() {
			_, err := fresh(t.Context(), c, key)
			gets <- err
		}()
	}
	b.SetLatency(0)
	for range 2 {
		if err := <-gets; err != nil {
			t.Errorf("got %v, want the late answer", err)
		}
	}
	put, err := c.Put(t.Context(), key, other, client.PutOptions{RequestID: e.RequestID})
	if err != nil || put.Generation != 2 {
		t.Errorf("the same put again: got generation %d, %v, want 2", put.Generation, err)
	}
}

func TestRevoke(t *testing.T) {
	t.Parallel()
	b := brokertest.New(t)
	c, second, console := b.Client("worker"), b.Client("worker"), b.Client("console-api")
	key := dbKey(t)
	brokertest.MustPut(t, c, key, uri)
	brokertest.MustGet(t, second, key)

	undo := b.RevokeClient(c)
	_, err := c.Get(t.Context(), key, client.GetOptions{})
	wantError(t, "the client", err, client.ErrCallerUnknown)
	brokertest.MustGet(t, second, key)

	undoAll := b.Revoke("worker")
	for _, c := range []*client.Client{second, b.Client("worker")} {
		_, err = c.Get(t.Context(), key, client.GetOptions{})
		wantError(t, "the identity", err, client.ErrCallerUnknown)
	}
	brokertest.MustGet(t, console, key)

	undoAll()
	brokertest.MustGet(t, second, key)
	_, err = c.Get(t.Context(), key, client.GetOptions{})
	wantError(t, "the client, still", err, client.ErrCallerUnknown)
	undo()
	brokertest.MustGet(t, c, key)
}

func TestDeny(t *testing.T) {
	t.Parallel()
	b := brokertest.New(t)
	c, instance, key := b.Client("worker"), b.Instance("demo"), dbKey(t)
	brokertest.MustPut(t, c, key, uri)

	undo := b.Deny("worker", "get", "list")
	_, err := c.Get(t.Context(), key, client.GetOptions{})
	wantError(t, "get", err, client.ErrNotAllowed)
	brokertest.MustPut(t, c, key, other)
	brokertest.MustGet(t, instance, key)
	undo()
	brokertest.MustGet(t, c, key)

	undo = b.Deny("worker")
	_, err = c.Put(t.Context(), key, uri, client.PutOptions{})
	wantError(t, "put", err, client.ErrNotAllowed)
	undo()
	brokertest.MustPut(t, c, key, uri)

	undo = b.Deny("instance/{instance_id}")
	_, err = instance.Get(t.Context(), key, client.GetOptions{})
	wantError(t, "the instance", err, client.ErrNotAllowed)
	undo()
	brokertest.MustGet(t, instance, key)
}

// Streams that are open end with what allowed them.
func TestSwitchesEndStreams(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		flip func(*brokertest.Broker)
		want codes.Code
	}{
		"revoke": {func(b *brokertest.Broker) { b.Revoke("instance/demo") }, codes.Unauthenticated},
		"deny":   {func(b *brokertest.Broker) { b.Deny("instance/{instance_id}", "watch") }, codes.PermissionDenied},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := brokertest.New(t)
			stream := watch(t, b, "instance/demo", dbKey(t))
			test.flip(b)
			if _, err := stream.Recv(); status.Code(err) != test.want {
				t.Errorf("got %v, want %s", err, test.want)
			}
		})
	}
}

// watch gives a stream of a secret that is missing, after it has said so.
func watch(t *testing.T, b *brokertest.Broker, identity string, key secret.Key) secretsv1.SecretsBrokerService_WatchSecretsClient {
	t.Helper()
	target, cfg := b.Config(identity)
	cert, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(cfg.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	creds := credentials.NewTLS(&tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}})
	conn, err := grpc.NewClient(target, append(b.DialOptions(), grpc.WithTransportCredentials(creds))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ref := &secretsv1.SecretRef{InstanceId: key.InstanceID().String(), Kind: secretsv1.SecretKind(key.Kind())}
	stream, err := secretsv1.NewSecretsBrokerServiceClient(conn).WatchSecrets(t.Context(), &secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{ref}})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || first.GetType() != secretsv1.ChangeType_CHANGE_TYPE_MISSING {
		t.Fatalf("got %s, %v, want MISSING", first.GetType(), err)
	}
	return stream
}

func TestPerson(t *testing.T) {
	t.Parallel()
	b := brokertest.New(t)
	c, key, person := b.Client("worker"), dbKey(t), b.Person()
	stream := watch(t, b, "worker", key)

	over := b.VaultOutage() // no matter of a person's
	person.Set(key, uri)
	over()
	change, err := stream.Recv()
	if err != nil || change.GetType() != secretsv1.ChangeType_CHANGE_TYPE_CHANGED_OUTSIDE {
		t.Errorf("watch: got %s, %v, want CHANGED_OUTSIDE", change.GetType(), err)
	}
	got := brokertest.MustGet(t, c, key)
	wantValue(t, "set", got.Value, uri)
	if got.Generation != 0 {
		t.Errorf("got generation %d, want 0", got.Generation)
	}

	person.Set(key, other)
	eventually(t, "the broker sees it without being asked for a fresh value", func() bool {
		return brokertest.MustGet(t, c, key).Value.Reveal() == other.Reveal()
	})
	person.Disable(key)
	_, err = fresh(t.Context(), c, key)
	wantError(t, "disabled", err, client.ErrDisabled)
	person.Delete(key)
	_, err = fresh(t.Context(), c, key)
	wantError(t, "deleted", err, client.ErrNotFound)
	person.Recover(key)
	_, err = fresh(t.Context(), c, key)
	wantError(t, "recovered", err, client.ErrDisabled)
}
