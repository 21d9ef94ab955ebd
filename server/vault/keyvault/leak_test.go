package keyvault_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	azlog "github.com/Azure/azure-sdk-for-go/sdk/azcore/log"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

const canary = "canary-3f1c7a9e5b2d"

// traces are the forms in which the canary may be found, but for its alignment in
// base64: those contain what is the same in all of them.
func traces() []string {
	all := []string{canary, strings.ToUpper(canary), hex.EncodeToString([]byte(canary)), strings.ToUpper(hex.EncodeToString([]byte(canary)))}
	for shift := range 3 {
		// Whole groups of three bytes, whatever stands before and after.
		inner := []byte(canary)[shift:]
		inner = inner[:len(inner)/3*3]
		all = append(all, base64.StdEncoding.EncodeToString(inner), base64.URLEncoding.EncodeToString(inner))
	}
	return all
}

func wantNoTrace(t *testing.T, where, text string) {
	t.Helper()
	for _, trace := range traces() {
		if strings.Contains(text, trace) {
			t.Errorf("%s: got the value in it, as %q", where, trace)
			return
		}
	}
}

// TestNoLeak is not parallel: the SDK's log is one for the process.
func TestNoLeak(t *testing.T) {
	var mu sync.Mutex
	var sdk bytes.Buffer
	azlog.SetListener(func(event azlog.Event, text string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintln(&sdk, event, text)
	})
	t.Cleanup(func() { azlog.SetListener(nil) })

	f, c := start(t, atOnce())
	cfg := config(f, c, f.Broker())
	cfg.RequestTimeout = 300 * time.Millisecond
	log := newHeard()
	cfg.Logger = log.logger()
	v := open(t, cfg)
	key := newKey(t)
	seen := map[error]int{}
	set(t, v, key, canary)
	if got := f.Versions(key.String()); len(got) != 1 || got[0].Value != canary {
		t.Fatal("the canary is not in the vault")
	}

	var errs []error
	calls := func() {
		version := f.Versions(key.String())[0].ID
		for _, value := range []string{canary, strings.Repeat(canary, 2000)} { // the second one is refused, and repeated in the refusal
			_, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue(value)})
			errs = append(errs, err)
		}
		for _, r := range reads {
			errs = append(errs, r.do(t.Context(), v, key))
		}
		_, err := v.Update(t.Context(), key, version, vault.Patch{Enabled: true})
		short, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond) // a recover that is never seen is not waited for
		defer cancel()
		errs = append(errs, err, v.Settle(t.Context(), key), v.Recover(short, key))
		_, _, err = v.Get(t.Context(), key, "0123456789abcdef0123456789abcdef")
		errs = append(errs, err)
	}
	calls()
	for _, fault := range []keyvaultfake.Fault{
		{Status: 400}, {Status: 401}, {Status: 403}, {Status: 403, Inner: "SecretDisabled"}, {Status: 404}, {Status: 418}, {Status: 500}, {Status: 503},
		{Cut: true}, {CutAfter: true}, {Status: 200}, {Status: 302},
	} {
		f.OnRequest(nil)
		v = open(t, cfg) // since one token after the other that is refused would end all else
		f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
			if r.Op == keyvaultfake.OpToken || r.Op == keyvaultfake.OpDiscovery {
				return keyvaultfake.Fault{}
			}
			return fault
		})
		calls()
	}
	f.OnRequest(nil)
	v = open(t, cfg)
	f.PersonDelete(key.String())
	_, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue(canary)})
	errs = append(errs, err)
	f.SetDown(true)
	_, err = v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue(canary)})
	errs = append(errs, err)

	failed := 0
	for _, err := range errs {
		if err == nil {
			continue
		}
		failed++
		for _, kind := range []error{vault.ErrNotFound, vault.ErrDisabled, vault.ErrDeleted, vault.ErrRefused, vault.ErrUnavailable} {
			if errors.Is(err, kind) {
				seen[kind]++
			}
		}
		for _, text := range []string{err.Error(), fmt.Sprintf("%+v", err), fmt.Sprintf("%#v", err)} {
			wantNoTrace(t, "an error", text)
			if strings.Contains(text, key.InstanceID().String()) {
				t.Errorf("got the secret's name in the error %q", text)
			}
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("got several lines: %q", err)
		}
	}
	if failed < 50 || len(seen) < 5 {
		t.Errorf("got %d errors to look at, of the kinds %v, want more", failed, seen)
	}
	wantNoTrace(t, "the log", log.String())
	mu.Lock()
	defer mu.Unlock()
	wantNoTrace(t, "the SDK's log", sdk.String())
	if !strings.Contains(sdk.String(), "REQUEST") && !strings.Contains(sdk.String(), "Request") {
		t.Error("got nothing in the SDK's log")
	}
}
