package brokertest_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/client/brokertest"
	"github.com/exto/secrets-broker/secret"
)

// A broker that ended leaves nothing running.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const canary = "correct-horse"

var (
	uri   = secret.NewValue("postgres://app:" + canary + "@db-7/orders")
	other = secret.NewValue("postgres://app:" + canary + "@db-8/orders")
)

func dbKey(t testing.TB) secret.Key {
	t.Helper()
	return brokertest.MustKey(t, "demo", secret.DatabaseURI)
}

// fresh asks the vault.
func fresh(ctx context.Context, c *client.Client, key secret.Key) (client.GetResult, error) {
	return c.Get(ctx, key, client.GetOptions{MaxStaleness: new(time.Duration)})
}

func wantError(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got error %v, want %v", what, err, want)
	}
}

func wantValue(t *testing.T, what string, got, want secret.Value) {
	t.Helper()
	if got.Reveal() != want.Reveal() {
		t.Errorf("%s: got another value than the one that was stored", what)
	}
}

// eventually looks until so is true or the test's time is over.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for !so() {
		select {
		case <-again.C:
		case <-t.Context().Done():
			t.Fatalf("%s: not so in time", what)
		}
	}
}

func TestNew(t *testing.T) {
	t.Parallel()
	b := brokertest.New(t)
	c := b.Client("console-api")

	key := dbKey(t)
	put := brokertest.MustPut(t, c, key, uri)
	if want := "spiffe://console.exto/console-api"; put.CreatedBy != want || put.Generation != 1 {
		t.Errorf("got generation %d by %q, want 1 by %q", put.Generation, put.CreatedBy, want)
	}
	got := brokertest.MustGet(t, b.Instance("demo"), key)
	wantValue(t, "the instance", got.Value, uri)
	if _, err := b.Instance("another").Get(t.Context(), key, client.GetOptions{}); !errors.Is(err, client.ErrNotAllowed) {
		t.Errorf("another instance: got %v, want ErrNotAllowed", err)
	}
	_, err := b.Client("spiffe://elsewhere.exto/console-api").Get(t.Context(), key, client.GetOptions{})
	wantError(t, "another trust domain", err, client.ErrCallerUnknown)

	rotated := brokertest.MustRotate(t, c, key, client.RotateOptions{NewValue: other})
	if rotated.Previous == nil || rotated.Previous.Version != put.Version {
		t.Errorf("got previous %+v, want version %s", rotated.Previous, put.Version)
	}
	brokertest.MustDelete(t, c, key)
	_, err = c.Get(t.Context(), key, client.GetOptions{})
	wantError(t, "deleted", err, client.ErrNotFound)
	if m := brokertest.MustRecover(t, c, key); m.State != client.Active {
		t.Errorf("recovered: got state %s, want %s", m.State, client.Active)
	}
	wantValue(t, "recovered", brokertest.MustGet(t, c, key).Value, other)
}

func TestMustVerify(t *testing.T) {
	t.Parallel()
	b := brokertest.New(t)
	c := b.Client("console-api")
	made := brokertest.MustRotate(t, c, brokertest.MustKey(t, "demo", secret.RegistrationToken), client.RotateOptions{AllowMissing: true})
	if got := brokertest.MustVerify(t, c, "demo", made.Value); got.Match != client.MatchCurrent || got.Generation != 1 {
		t.Errorf("the token: got %+v, want a match of generation 1", got)
	}
	if got := brokertest.MustVerify(t, c, "demo", other); got.Match != client.NoMatch {
		t.Errorf("another: got %+v, want no match", got)
	}
}

// What is done once MustWatch has returned is seen as what it is.
func TestMustWatch(t *testing.T) {
	t.Parallel()
	b := brokertest.New(t)
	c, key, token := b.Client("console-api"), dbKey(t), brokertest.MustKey(t, "demo", secret.RegistrationToken)
	put := brokertest.MustPut(t, c, key, uri)
	next := brokertest.MustWatch(t, c, key, token)
	rotated := brokertest.MustRotate(t, c, key, client.RotateOptions{NewValue: other})
	present := map[secret.Key]client.Change{}
	for range 2 {
		change := next()
		present[change.Key] = change
	}
	if got := present[key]; got.Type != client.ChangeCurrent || got.Version != put.Version {
		t.Errorf("got %+v, want the version that was there", got)
	}
	if got := present[token]; got.Type != client.ChangeMissing {
		t.Errorf("got %+v, want that there is no token", got)
	}
	if got := next(); got.Type != client.ChangeRotated || got.Version != rotated.Version {
		t.Errorf("got %+v, want the rotation to %s", got, rotated.Version)
	}
}

// soon ends calls that the client would otherwise repeat until their own deadline.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	t.Cleanup(cancel)
	return ctx
}

// Two in one process know nothing of each other.
func TestTwoBrokers(t *testing.T) {
	t.Parallel()
	for name, value := range map[string]secret.Value{"one": uri, "other": other} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := brokertest.New(t)
			over := b.VaultOutage()
			_, err := fresh(soon(t), b.Client("worker"), dbKey(t))
			wantError(t, "an outage", err, client.ErrUnavailable)
			over()
			if put := brokertest.MustPut(t, b.Client("worker"), dbKey(t), value); put.Generation != 1 {
				t.Errorf("got generation %d, want 1", put.Generation)
			}
			wantValue(t, "get", brokertest.MustGet(t, b.Client("worker"), dbKey(t)).Value, value)
		})
	}
}

func TestNothingIsLeft(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]brokertest.Option{"memory": nil, "loopback": {brokertest.Loopback()}} {
		t.Run(name, func(t *testing.T) {
			var target, dir string
			t.Run("a test", func(t *testing.T) {
				b := brokertest.New(t, options...)
				var cfg client.Config
				target, cfg = b.Config("worker")
				dir = filepath.Dir(cfg.CAFile)
				brokertest.MustPut(t, b.Client("worker"), dbKey(t), uri)
				b.SetLatency(time.Hour) // must not hold up the end
			})
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("got %v for the broker's folder, want that it is gone", err)
			}
			if name == "loopback" {
				if conn, err := net.Dial("tcp", target); err == nil {
					_ = conn.Close()
					t.Errorf("%s still listens", target)
				}
			}
		})
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]brokertest.Option{"memory": nil, "loopback": {brokertest.Loopback()}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := brokertest.New(t, options...)
			dial := b.DialOptions()
			if loopback := name == "loopback"; loopback != (len(dial) == 0) {
				t.Errorf("got %d dial options", len(dial))
			}
			target, cfg := b.Config("worker")
			c, err := client.New(target, cfg, dial...)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if put := brokertest.MustPut(t, c, dbKey(t), uri); put.CreatedBy != "spiffe://console.exto/worker" {
				t.Errorf("got %q, want the worker", put.CreatedBy)
			}
		})
	}
}

func TestPolicy(t *testing.T) {
	t.Parallel()
	b := brokertest.New(t, brokertest.Policy(`
trust_domain: other.example
rules:
  - {identity: "spiffe://other.example/writer", allow: [put], instances: ["123"]}
`))
	c, key := b.Client("writer"), brokertest.MustKey(t, "123", secret.DatabaseURI)
	brokertest.MustPut(t, c, key, uri)
	_, err := c.Get(t.Context(), key, client.GetOptions{})
	wantError(t, "get", err, client.ErrNotAllowed)
	_, err = b.Client("console-api").Get(t.Context(), key, client.GetOptions{})
	wantError(t, "who is in another policy", err, client.ErrCallerUnknown)

	b.SetPolicy(`
trust_domain: other.example
rules:
  - {identity: "spiffe://other.example/writer", allow: [get]}
`)
	wantValue(t, "get", brokertest.MustGet(t, c, key).Value, uri)
	_, err = c.Put(t.Context(), key, other, client.PutOptions{})
	wantError(t, "put", err, client.ErrNotAllowed)
}

// failing is a test that only tells how it failed.
type failing struct {
	testing.TB
	said string
}

func (f *failing) Fatalf(format string, args ...any) {
	f.said = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// failure is how a test fails that does this; empty when it does not.
func failure(t *testing.T, do func(testing.TB)) string {
	f := &failing{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		do(f)
	}()
	<-done
	return f.said
}

func TestFailures(t *testing.T) {
	t.Parallel()
	key := dbKey(t)
	b := brokertest.New(t)
	worker, instance := b.Client("worker"), b.Instance("demo")
	for _, test := range []struct {
		name string
		want []string
		do   func(testing.TB)
	}{
		{"key", []string{"instance id", "100"}, func(t testing.TB) { brokertest.MustKey(t, "No Id", secret.DatabaseURI) }},
		{"put", []string{"put instance-demo-dburi", "INVALID_VALUE", "NOT_APPLIED"}, func(t testing.TB) {
			brokertest.MustPut(t, worker, key, secret.NewValue("mysql://"+canary))
		}},
		{"get", []string{"get instance-demo-dburi", "SECRET_NOT_FOUND"}, func(t testing.TB) { brokertest.MustGet(t, worker, key) }},
		{"rotate", []string{"rotate instance-demo-dburi", "CALLER_NOT_ALLOWED"}, func(t testing.TB) {
			brokertest.MustRotate(t, instance, key, client.RotateOptions{NewValue: uri})
		}},
		{"delete", []string{"delete instance-demo-dburi", "SECRET_NOT_FOUND"}, func(t testing.TB) { brokertest.MustDelete(t, worker, key) }},
		{"recover", []string{"recover instance-demo-dburi", "SECRET_NOT_FOUND"}, func(t testing.TB) { brokertest.MustRecover(t, worker, key) }},
		{"verify whom", []string{"instance id", "100"}, func(t testing.TB) { brokertest.MustVerify(t, worker, "No Id", uri) }},
		{"verify", []string{"verify instance-demo:", "CALLER_NOT_ALLOWED"}, func(t testing.TB) { brokertest.MustVerify(t, instance, "demo", uri) }},
		{"watch", []string{"watch [instance-another]:", "CALLER_NOT_ALLOWED"}, func(t testing.TB) {
			brokertest.MustWatch(t, instance, brokertest.MustKey(t, "another", secret.RegistrationToken))
		}},
		{"policy", []string{"policy", "line 1"}, func(t testing.TB) { brokertest.New(t, brokertest.Policy("rules: []")) }},
		{"identity", []string{"console-api"}, func(t testing.TB) { brokertest.New(t).Client("a space") }},
		{"deny whom", []string{"no rule", "instance/demo"}, func(t testing.TB) { brokertest.New(t).Deny("instance/demo") }},
		{"deny what", []string{"gett", "allows put, get"}, func(t testing.TB) { brokertest.New(t).Deny("worker", "gett") }},
		{"revoke whom", []string{"RevokeClient", "not one"}, func(t testing.TB) { brokertest.New(t).RevokeClient(worker) }},
		{"person", []string{"a person deletes instance-demo-dburi", "not found"}, func(t testing.TB) { brokertest.New(t).Person().Delete(key) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := failure(t, test.do)
			for _, want := range append(test.want, "brokertest: ") {
				if !strings.Contains(got, want) {
					t.Errorf("got %q, want %q in it", got, want)
				}
			}
			if strings.Contains(got, canary) {
				t.Error("a failure tells a value")
			}
		})
	}
}
