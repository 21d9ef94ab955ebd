package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
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

// A write of which nobody knows whether it happened goes on, later or in another
// process, with the same request id: it happens once.
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

// An instance that calls the Console with its token, through rotations.
func ExampleNewSource() {
	token, err := client.NewSource(ctx, c, key, client.SourceOptions{})
	if err != nil {
		log.Fatal(err)
	}
	held := token.Value()
	for callConsole(held.Value.Reveal()) == http.StatusUnauthorized {
		refused := held.Version
		held, err = token.Unauthorized(ctx, refused)
		if held.Version == refused {
			log.Fatal("there is no other token: ", err)
		}
	}
}

// A program that connects anew whenever the secret changes.
func ExampleSource_Changed() {
	uri, err := client.NewSource(ctx, c, key, client.SourceOptions{})
	if err != nil {
		log.Fatal(err)
	}
	for {
		changed, held := uri.Changed(), uri.Value()
		if held.Err != nil {
			log.Printf("as of %s: %v", held.AsOf, held.Err)
		}
		connect(held.Value.Reveal())
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func ExampleNewInstance() {
	instance, err := client.NewInstance(ctx, c, key.InstanceID(), client.InstanceOptions{
		Optional: []secret.Kind{secret.OIDCClientSecret}, // not every instance has single sign-on
	})
	if err != nil {
		log.Fatal(err)
	}
	connect(instance.DatabaseURI.Value().Value.Reveal())
}

// What is safe to run again after a crash in the middle.
func ExampleClient_DeleteInstance() {
	if err := c.DeleteInstance(ctx, key.InstanceID()); err != nil {
		log.Fatal(err)
	}
}

// The Console API lets instances in by their tokens and never holds one.
func ExampleClient_Verify() {
	result, err := c.Verify(ctx, key.InstanceID(), secret.NewValue("the bearer token"))
	switch {
	case err != nil:
		log.Print("503: ", err)
	case !result.OK():
		log.Print("401")
	}
}

func ExampleNewVerifier() {
	verifier := client.NewVerifier(ctx, c, client.VerifierOptions{Instances: 1000})
	result, err := verifier.VerifyToken(ctx, key.InstanceID(), secret.NewValue("the bearer token"))
	if err != nil || !result.OK() {
		log.Print("not let in")
	}
}

func ExampleClient_Watch() {
	for change, err := range c.Watch(ctx, key) {
		if err != nil {
			log.Print("begin again after a moment: ", err)
			break
		}
		fmt.Println(change.Key, change.Type, change.Generation)
	}
}

// What a database row holds is a key's name.
func ExampleClient_Get_reference() {
	ref := "instance-acme-prod-dburi" // db_uri_ref
	key, err := client.ParseKey(ref)
	if err != nil {
		log.Fatal(err)
	}
	got, err := c.Get(ctx, key, client.GetOptions{})
	if err != nil {
		log.Fatal(err)
	}
	connect(got.Value.Reveal())
}

func callConsole(token string) (status int) { _ = token; return http.StatusOK }

func connect(uri string) { _ = uri }
