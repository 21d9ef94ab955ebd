package server_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// panicOn makes calls of these vault methods panic with p; reached is closed by the
// first.
func (x *subject) panicOn(p any, methods ...string) (reached <-chan struct{}) {
	first := make(chan struct{})
	once := sync.OnceFunc(func() { close(first) })
	x.vault.SetBefore(func(_ context.Context, op string, _ secret.Key) error {
		for _, m := range methods {
			if op == m {
				once()
				panic(p)
			}
		}
		return nil
	})
	return first
}

// TestPanicsInTheBackground: where no caller waits the process goes on too, and the
// text of the panic is not logged.
func TestPanicsInTheBackground(t *testing.T) {
	t.Parallel()
	const canary = "panic-7Qz-with-a-value"
	for name, test := range map[string]struct {
		logged string
		run    func(x *subject, panics func(methods ...string) <-chan struct{})
	}{
		"the poll of a watch": {`msg="panic in a read"`, func(x *subject, panics func(...string) <-chan struct{}) {
			w := x.watch()
			w.want("CURRENT ACTIVE/2")
			x.current = x.setOutside(uri(3))
			reached := panics("Get")
			x.clock.advance(noticed)
			<-reached
			x.vault.SetBefore(nil)
			x.clock.advance(noticed)
			w.want("CHANGED_OUTSIDE ACTIVE/0") // the same watch, which goes on
		}},
		"the repair of a late version": {`msg="panic in a write"`, func(x *subject, panics func(...string) <-chan struct{}) {
			var old vault.Tags
			all, err := x.store.Versions(x.ctx, x.key)
			x.ok(err)
			for _, v := range all {
				if v.Version == x.first {
					old = v.Tags
				}
			}
			x.clock.advance(bound + 1)
			_, err = x.store.Set(x.ctx, x.key, vault.NewVersion{Value: secret.NewValue(uri(1)), Tags: old})
			x.ok(err)
			reached := panics("Set")
			x.wantValue("", uri(2))
			<-reached
			x.vault.SetBefore(nil)
		}},
	} {
		for _, p := range []any{canary, errors.New(canary), []byte(canary)} {
			t.Run(fmt.Sprintf("%s/%T", name, p), func(t *testing.T) {
				t.Parallel()
				x := startSystem(t).in(t, "demo", "active")
				test.run(x, func(methods ...string) <-chan struct{} { return x.panicOn(p, methods...) })
				x.put(5)
				x.wantValue("", uri(5))
				log := x.log.String()
				if !x.logHasLine(test.logged, fmt.Sprintf("panic=%T", p), "goroutine ") {
					t.Errorf("the log has no line with %s, the panic's type and its stack: %s", test.logged, log)
				}
				for form, s := range encodings(canary) {
					if contains(log, s) {
						t.Errorf("the log has the panic's text, %s", form)
					}
				}
			})
		}
	}
}
