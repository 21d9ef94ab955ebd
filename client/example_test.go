package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/secret"
)

// Values that a program has from its own life.
var (
	c   *client.Client
	ctx context.Context
	key secret.Key
)

func ExampleNew() {
	c, err := client.New("broker.example:7443", client.Config{
		CertFile: "/etc/tls/worker.pem",
		KeyFile:  "/etc/tls/worker-key.pem",
		CAFile:   "/etc/tls/ca.pem",
	})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
}

// A write of unknown outcome is made again with the same request id: it happens
// once.
func ExampleClient_Put() {
	value := secret.NewValue("postgres://app:password@db-7/orders")
	put, err := c.Put(ctx, key, value, client.PutOptions{})
	if e, ok := errors.AsType[*client.Error](err); ok && e.CommitState == secret.Unknown {
		put, err = c.Put(ctx, key, value, client.PutOptions{RequestID: e.RequestID})
	}
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(put.Key, "is at generation", put.Generation)
}

// A read, change and write that does not overwrite what another wrote meanwhile.
func ExampleClient_Put_mustMatchVersion() {
	got, err := c.Get(ctx, key, client.GetOptions{})
	if err != nil {
		log.Fatal(err)
	}
	changed := secret.NewValue(got.Value.Reveal() + "?sslmode=verify-full")
	_, err = c.Put(ctx, key, changed, client.PutOptions{MustMatchVersion: got.Version})
	if errors.Is(err, client.ErrVersionMismatch) {
		log.Print("somebody else changed it: read it again")
	}
}

func ExampleClient_Get() {
	id, err := secret.ParseInstanceID("acme-prod")
	if err != nil {
		log.Fatal(err)
	}
	key, err := secret.NewKey(id, secret.DatabaseURI)
	if err != nil {
		log.Fatal(err)
	}
	got, err := c.Get(ctx, key, client.GetOptions{})
	switch {
	case errors.Is(err, client.ErrNotFound):
		log.Print("this instance has no database yet")
	case err != nil:
		log.Fatal(err)
	default:
		connect(got.Value.Reveal())
	}
}

// A cheap refresh: the value travels only when it is another one.
func ExampleClient_Get_knownVersion() {
	held, err := c.Get(ctx, key, client.GetOptions{})
	if err != nil {
		log.Fatal(err)
	}
	now, err := c.Get(ctx, key, client.GetOptions{
		KnownVersion: held.Version,
		MaxStaleness: new(time.Duration), // ask the vault
	})
	if err == nil && !now.NotModified {
		connect(now.Value.Reveal())
	}
}

// The instance has an hour to fetch its new token; until then both are good.
func ExampleClient_Rotate() {
	rotated, err := c.Rotate(ctx, key, client.RotateOptions{GracePeriod: time.Hour, AllowMissing: true})
	if err != nil {
		log.Fatal(err)
	}
	if rotated.Previous != nil {
		fmt.Println("the old one is good until", rotated.Previous.ExpireTime)
	}
}

func ExampleClient_List() {
	for m, err := range c.List(ctx, client.ListOptions{ShowDeleted: true}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(m.Key, m.State, m.Generation)
	}
}

func connect(uri string) { _ = uri }
