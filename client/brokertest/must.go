package brokertest

import (
	"context"
	"iter"
	"testing"
	"time"

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

// MustVerify is c.Verify. An error fails t; a wrong token is none, but a NoMatch.
func MustVerify(t testing.TB, c *client.Client, instanceID string, token secret.Value) client.VerifyResult {
	t.Helper()
	key := MustKey(t, instanceID, secret.RegistrationToken)
	r, err := c.Verify(t.Context(), key.InstanceID(), token)
	check(t, "verify", key, err)
	return r
}

// watchPatience is far longer than any change takes.
const watchPatience = 30 * time.Second

// MustWatch is c.Watch until t ends. It returns when the present states are there, so
// that what is done from then on is seen. Each call of next gives one change, the
// present states first, in no promised order, and waits for it. An error, and no
// change for 30 s, fail t.
func MustWatch(t testing.TB, c *client.Client, keys ...secret.Key) (next func() client.Change) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	pull, stop := iter.Pull2(c.Watch(ctx, keys...))
	t.Cleanup(func() {
		cancel()
		stop()
	})
	wait := func() client.Change {
		t.Helper()
		defer time.AfterFunc(watchPatience, cancel).Stop()
		change, err, _ := pull()
		if err != nil {
			t.Fatalf("brokertest: watch %v: %v", keys, err)
		}
		return change
	}
	present := []client.Change{wait()} // or why there is none
	for len(present) < len(keys) {
		present = append(present, wait())
	}
	return func() client.Change {
		t.Helper()
		if len(present) == 0 {
			return wait()
		}
		change := present[0]
		present = present[1:]
		return change
	}
}

func check(t testing.TB, what string, key secret.Key, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("brokertest: %s %s: %v", what, key, err)
	}
}
