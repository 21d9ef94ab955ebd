package direct_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/google/uuid"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/client/direct"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault/keyvault"
)

// both is a broker and a Vault that read the same vault.
type both struct {
	t      *testing.T
	fake   *keyvaultfake.Fake
	direct *direct.Vault
	broker *broker.Broker
	key    secret.Key
}

var worker = broker.Call{Caller: "spiffe://console.exto/worker", AuditID: uuid.NewString()}

func newBoth(t *testing.T) *both {
	t.Helper()
	f := start(t)
	b := &both{t: t, fake: f, direct: open(t, f, config(t, f, f.Broker())), key: keyOf(t, "instance-acme-dburi")}
	direct.SetNow(b.direct, f.Now)
	b.start()
	return b
}

// start begins with a broker that remembers nothing.
func (b *both) start() {
	b.t.Helper()
	log := slog.New(slog.NewTextHandler(b.t.Output(), nil))
	cfg := config(b.t, b.fake, b.fake.Broker())
	store, err := keyvault.Open(b.t.Context(), keyvault.Config{
		URL: b.fake.URL(), ReadsPerSecond: 100_000, WritesPerSecond: 100_000, Logger: log, Transport: cfg.Transport,
		Credential: func() (azcore.TokenCredential, error) { return cfg.Credential, nil },
	})
	if err != nil {
		b.t.Fatal(err)
	}
	heart := broker.New(broker.Config{Vault: store, Logger: log, Now: b.fake.Now})
	b.broker = heart
	b.t.Cleanup(func() {
		heart.Close(context.Background())
		_ = store.Close()
	})
}

func (b *both) put(value string) string {
	b.t.Helper()
	r, err := b.broker.Put(b.t.Context(), worker, broker.PutRequest{Key: b.key, Value: secret.NewValue(value)})
	b.check(err)
	return r.Version
}

func (b *both) rotate(value string, grace time.Duration) string {
	b.t.Helper()
	r, err := b.broker.Rotate(b.t.Context(), worker, broker.RotateRequest{Key: b.key, NewValue: secret.NewValue(value), Grace: grace})
	b.check(err)
	return r.Version
}

func (b *both) delete() {
	b.t.Helper()
	_, err := b.broker.Delete(b.t.Context(), worker, broker.DeleteRequest{Key: b.key})
	b.check(err)
}

func (b *both) check(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
	b.fake.Advance(2 * time.Second) // the vault counts whole seconds
}

func (b *both) newest() keyvaultfake.Version {
	all := b.fake.Versions(b.key.String())
	return all[len(all)-1]
}

// want checks that the two answer alike, and as wanted: with a value, or a reason.
func (b *both) want(what string, o client.GetOptions, want string) {
	b.t.Helper()
	began := time.Now()
	got, err := b.direct.Get(b.t.Context(), b.key, o)
	if err == nil && (got.AsOf.Before(began) || got.AsOf.After(time.Now()) || got.Source != client.Live) {
		b.t.Errorf("%s: got %s as of %v, want it live and since %v", what, got.Source, got.AsOf, began)
	}
	told, brokerErr := b.broker.Get(b.t.Context(), worker, broker.GetRequest{
		Key: b.key, Version: o.Version, MaxStaleness: new(time.Duration), MinGeneration: o.MinGeneration, KnownVersion: o.KnownVersion,
	})
	mine := answer(err, got.Value, got.NotModified, got.Version, got.Generation, string(got.State), got.CreateTime, got.ExpireTime, got.CreatedBy)
	brokers := answer(brokerErr, told.Value, told.NotModified, told.Version, told.Generation, "ACTIVE", told.CreateTime, told.ExpireTime, told.CreatedBy)
	if mine != brokers {
		b.t.Errorf("%s: got\n%s, want the broker's\n%s", what, mine, brokers)
	}
	switch e, _ := errors.AsType[*client.Error](err); {
	case e != nil && string(e.Reason) != want:
		b.t.Errorf("%s: got %v, want %s", what, err, want)
	case err == nil && got.Value.Reveal() != want:
		b.t.Errorf("%s: got another value, want %q", what, want)
	}
	noCanary(b.t, what, err)
}

func answer(err error, value secret.Value, more ...any) string {
	if e, ok := errors.AsType[*client.Error](err); ok {
		return string(e.Reason)
	}
	if e, ok := errors.AsType[*broker.Error](err); ok {
		return string(e.Reason)
	}
	return fmt.Sprint(err, value.Reveal(), more)
}

// TestAnswersAreTheBrokers: in each state that an instance can tell, a Vault answers
// as a broker does.
func TestAnswersAreTheBrokers(t *testing.T) {
	t.Parallel()
	const one, two, three = "postgres://one:" + canary + "@db/o", "postgres://two:" + canary + "@db/o", "postgres://three:" + canary + "@db/o"
	now := client.GetOptions{}
	of := func(version string) client.GetOptions { return client.GetOptions{Version: version} }
	b := newBoth(t)
	b.want("absent", now, "SECRET_NOT_FOUND")
	b.want("a version of what is absent", of("0123"), "SECRET_NOT_FOUND")

	v1 := b.put(one)
	b.want("put", now, one)
	b.want("known", client.GetOptions{KnownVersion: v1}, "")
	b.want("another is known", client.GetOptions{KnownVersion: "0123"}, one)
	b.want("the current by its version", client.GetOptions{Version: v1, KnownVersion: v1}, "")
	b.want("no such version", of("0123"), "VERSION_NOT_FOUND")
	b.want("what is no version", of("../x"), "VERSION_NOT_FOUND")
	b.want("its generation", client.GetOptions{MinGeneration: 1}, one)
	b.want("a later generation", client.GetOptions{MinGeneration: 2}, "STALENESS_UNSATISFIABLE")

	v2 := b.rotate(two, time.Hour)
	b.want("rotated", now, two)
	b.want("in grace", of(v1), one)
	b.want("in grace, and known", client.GetOptions{Version: v1, KnownVersion: v1}, one)
	v3 := b.rotate(three, 0)
	b.want("its grace was ended", of(v1), "VERSION_EXPIRED")
	b.want("rotated away without grace", of(v2), "VERSION_EXPIRED")

	b.fake.PersonUpdate(b.key.String(), "", false, nil)
	b.want("disabled", now, "SECRET_DISABLED")
	b.want("disabled, by its version", of(v3), "SECRET_DISABLED")
	b.want("disabled, an expired version", of(v2), "VERSION_EXPIRED")
	b.want("disabled, below the generation", client.GetOptions{MinGeneration: 9}, "STALENESS_UNSATISFIABLE")
	b.fake.PersonUpdate(b.key.String(), "", true, nil)

	v4 := b.put(one)
	b.want("replaced by a put", of(v3), three)
	b.fake.PersonUpdate(b.key.String(), v3, false, nil)
	b.want("an old one, disabled", of(v3), "SECRET_DISABLED")

	b.delete()
	b.want("deleted", now, "SECRET_NOT_FOUND")
	b.fake.PersonRecover(b.key.String())
	b.want("deleted by the mark alone", now, "SECRET_NOT_FOUND")
	b.want("deleted by the mark alone, a version", of(v3), "SECRET_NOT_FOUND")
	b.fake.PersonUpdate(b.key.String(), "", true, nil)
	b.want("enabled by hand", now, one)

	b.delete()
	b.put(two)
	b.want("put over", now, two)
	b.want("from before the delete", of(v4), "VERSION_EXPIRED")

	b.fake.PersonSet(b.key.String(), three, nil)
	b.want("outside", now, three)
	b.want("outside, any generation", client.GetOptions{MinGeneration: 99}, three)
	b.fake.PersonUpdate(b.key.String(), "", true, map[string]string{"exto-key": "instance-other-dburi"})
	b.want("copied", now, "KEY_MISMATCH")
	b.want("copied, another version", of(v4), "KEY_MISMATCH")
	b.fake.PersonDelete(b.key.String())
	b.want("deleted by a person", now, "SECRET_NOT_FOUND")
}

// TestLateVersions: one that was put down, and lies over the version that counts.
func TestLateVersions(t *testing.T) {
	t.Parallel()
	b := newBoth(t)
	b.put("postgres://one@db/o")
	late := b.newest().Tags
	v2 := b.put("postgres://two@db/o")
	b.fake.PersonSet(b.key.String(), "postgres://late@db/o", late)
	b.fake.PersonUpdate(b.key.String(), "", false, nil)
	over := b.newest().ID
	b.start()
	b.want("the one that counts", client.GetOptions{}, "postgres://two@db/o")
	b.want("by its version", client.GetOptions{Version: v2}, "postgres://two@db/o")
	b.want("the late one", client.GetOptions{Version: over}, "SECRET_DISABLED")
}
