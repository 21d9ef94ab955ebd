package brokertest_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/client/brokertest"
	"github.com/exto/secrets-broker/secret"
)

var t *testing.T // of the test's function

func Example() {
	b := brokertest.New(t)
	c := b.Client("console-api")

	key := brokertest.MustKey(t, "demo", secret.DatabaseURI)
	brokertest.MustPut(t, c, key, secret.NewValue("postgres://app:password@db-7/orders"))

	got := brokertest.MustGet(t, b.Instance("demo"), key)
	if got.CreatedBy != "spiffe://console.exto/console-api" {
		t.Errorf("got a secret by %s", got.CreatedBy)
	}
}

// A program that makes its own client takes its settings from the test.
func ExampleBroker_Config() {
	b := brokertest.New(t)
	target, cfg := b.Config("worker")
	c, err := client.New(target, cfg, b.DialOptions()...)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
}

// What does the program do while the vault is out of reach, or once it is no
// longer trusted?
func ExampleBroker_VaultOutage() {
	b := brokertest.New(t)
	c := b.Client("worker")
	key := brokertest.MustKey(t, "demo", secret.RegistrationToken)

	over := b.VaultOutage()
	// The client repeats the call until its deadline, two minutes if it has none.
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := c.Rotate(ctx, key, client.RotateOptions{}); !errors.Is(err, client.ErrUnavailable) {
		t.Errorf("got %v, want that it is unavailable", err)
	}
	over()

	undo := b.Revoke("worker")
	if _, err := c.Rotate(t.Context(), key, client.RotateOptions{}); !errors.Is(err, client.ErrCallerUnknown) {
		t.Errorf("got %v, want that the worker is unknown", err)
	}
	undo()
}
