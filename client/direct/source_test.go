package direct_test

import (
	"errors"
	"testing"
	"time"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
)

const soon = 20 * time.Millisecond

// TestSource: what is rotated arrives, an outage keeps the last value and says how old
// it is, a deletion is told, and all of it by reads alone.
func TestSource(t *testing.T) {
	t.Parallel()
	b := newBoth(t)
	v1 := b.put("postgres://one@db/o")
	s, err := client.NewSource(t.Context(), b.direct, b.key, client.SourceOptions{Interval: soon})
	if err != nil {
		t.Fatal(err)
	}
	if held := s.Value(); held.Version != v1 || held.Value.Reveal() != "postgres://one@db/o" || held.Generation != 1 {
		t.Fatalf("got %+v, want the first value at once", held)
	}
	first := s.Value().AsOf
	await(t, s, "a later read of the same version", func(h client.Held) bool { return h.AsOf.After(first) })
	v2 := b.rotate("postgres://two@db/o", 0)
	await(t, s, "the rotated value", func(h client.Held) bool {
		return h.Version == v2 && h.Value.Reveal() == "postgres://two@db/o" && h.CreatedBy == worker.Caller
	})

	b.fake.SetDown(true)
	old := await(t, s, "why it is not known to be current", func(h client.Held) bool { return errors.Is(h.Err, client.ErrUnavailable) })
	if old.Version != v2 || old.Value.IsEmpty() || time.Since(old.AsOf) <= 0 {
		t.Errorf("got %+v in the outage, want the last value and how old it is", old)
	}
	if again := s.Value(); !again.AsOf.Equal(old.AsOf) {
		t.Errorf("got as of %v in the outage, want %v still", again.AsOf, old.AsOf)
	}
	b.fake.SetDown(false)
	await(t, s, "the end of the outage", func(h client.Held) bool { return h.Err == nil && h.AsOf.After(old.AsOf) })

	b.delete()
	gone := await(t, s, "the deletion", func(h client.Held) bool { return errors.Is(h.Err, client.ErrNotFound) })
	if gone.Value.Reveal() != "postgres://two@db/o" {
		t.Error("the last value is gone, want it kept")
	}
}

// TestUnauthorized: who is refused need not wait for the interval.
func TestUnauthorized(t *testing.T) {
	t.Parallel()
	b := newBoth(t)
	v1 := b.put("postgres://one@db/o")
	s, err := client.NewSource(t.Context(), b.direct, b.key, client.SourceOptions{Interval: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	v2 := b.rotate("postgres://two@db/o", 0)
	held, err := s.Unauthorized(t.Context(), v1)
	if err != nil || held.Version != v2 {
		t.Errorf("got version %s, %v, want %s", held.Version, err, v2)
	}
}

// TestInstance holds the three secrets by three reads.
func TestInstance(t *testing.T) {
	t.Parallel()
	f := start(t)
	id, err := secret.ParseInstanceID("acme")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"instance-acme", "instance-acme-dburi", "instance-acme-oidc-secret"} {
		f.PersonSet(name, "value of "+name, nil)
	}
	v := open(t, f, config(t, f, f.Broker()))
	instance, err := client.NewInstance(t.Context(), v, id, client.InstanceOptions{SourceOptions: client.SourceOptions{Interval: time.Hour}})
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]*client.Source{
		"instance-acme": instance.Token, "instance-acme-dburi": instance.DatabaseURI, "instance-acme-oidc-secret": instance.OIDCClientSecret,
	} {
		if got := s.Value(); got.Value.Reveal() != "value of "+name || got.Generation != 0 {
			t.Errorf("%s: got %+v, want its value", name, got)
		}
	}
	if got := count(f, keyvaultfake.OpGet); got != 3 {
		t.Errorf("got %d reads, want 3", got)
	}
}
