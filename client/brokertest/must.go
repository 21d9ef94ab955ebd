package brokertest

import (
	"testing"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/secret"
)

// MustKey names a secret; what is no instance id fails t. This and the functions
// below are for the goroutine of t, and what they print holds no value.
func MustKey(t testing.TB, instanceID string, kind secret.Kind) secret.Key {
	t.Helper()
	id, err := secret.ParseInstanceID(instanceID)
	if err != nil {
		t.Fatalf("brokertest: instance id: %v", err)
	}
	key, err := secret.NewKey(id, kind)
	if err != nil {
		t.Fatalf("brokertest: key: %v", err)
	}
	return key
}

// MustPut is c.Put without conditions. An error fails t.
func MustPut(t testing.TB, c *client.Client, key secret.Key, value secret.Value) client.PutResult {
	t.Helper()
	r, err := c.Put(t.Context(), key, value, client.PutOptions{})
	check(t, "put", key, err)
	return r
}

// MustGet is c.Get of the current value. An error fails t.
func MustGet(t testing.TB, c *client.Client, key secret.Key) client.GetResult {
	t.Helper()
	r, err := c.Get(t.Context(), key, client.GetOptions{})
	check(t, "get", key, err)
	return r
}

// MustRotate is c.Rotate. An error fails t.
func MustRotate(t testing.TB, c *client.Client, key secret.Key, o client.RotateOptions) client.RotateResult {
	t.Helper()
	r, err := c.Rotate(t.Context(), key, o)
	check(t, "rotate", key, err)
	return r
}

// MustDelete is c.Delete without conditions. An error fails t.
func MustDelete(t testing.TB, c *client.Client, key secret.Key) {
	t.Helper()
	_, err := c.Delete(t.Context(), key, client.DeleteOptions{})
	check(t, "delete", key, err)
}

// MustRecover is c.Recover. An error fails t.
func MustRecover(t testing.TB, c *client.Client, key secret.Key) client.Metadata {
	t.Helper()
	m, err := c.Recover(t.Context(), key, client.RecoverOptions{})
	check(t, "recover", key, err)
	return m
}

func check(t testing.TB, what string, key secret.Key, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("brokertest: %s %s: %v", what, key, err)
	}
}
