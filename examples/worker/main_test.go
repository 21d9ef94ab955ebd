package main

import (
	"strings"
	"testing"

	"github.com/exto/secrets-broker/secret"
)

// What goes wrong with a URI is logged, and so must hold nothing of its secrets.
func TestOpenTellsNoSecrets(t *testing.T) {
	t.Parallel()
	for uri, name := range map[string]string{
		"mongodb://app:hunter2@db-7:27017/orders":                       "",
		"mongodb://app:hunter2@a:27017,b:27017/orders?replicaSet=r":     "",
		"postgres://app:hunter2@127.0.0.1:port/orders":                  "",
		"postgres://app:hunter2@127.0.0.1:1/orders":                     "orders", // nobody listens
		"postgres://app:hunter2@127.0.0.1:1/orders?sslmode=verify-full": "orders",
		"postgres://app:hunter2@127.0.0.1:1/orders?sslmode=unheard-of":  "",
	} {
		db, got, err := open(t.Context(), secret.NewValue(uri))
		if err == nil || db != nil || got != name || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: got %v, %q, %v, want %q and an error without the password", uri, db, got, err, name)
		}
	}
}
