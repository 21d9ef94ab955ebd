package keyvault_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/internal/keyvaultwire"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/keyvault"
)

// write is one of the methods that change something.
type write struct {
	op keyvaultfake.Op
	do func(context.Context, *keyvault.Vault, secret.Key, string) error
}

var writes = []write{
	{keyvaultfake.OpSet, func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
		_, err := v.Set(ctx, key, vault.NewVersion{Value: secret.NewValue("new")})
		return err
	}},
	{keyvaultfake.OpUpdate, func(ctx context.Context, v *keyvault.Vault, key secret.Key, version string) error {
		_, err := v.Update(ctx, key, version, vault.Patch{})
		return err
	}},
	{keyvaultfake.OpDelete, func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
		_, err := v.Delete(ctx, key)
		return err
	}},
	{keyvaultfake.OpRecover, func(ctx context.Context, v *keyvault.Vault, key secret.Key, _ string) error {
		return v.Recover(ctx, key)
	}},
}

// prepare makes the secret that w works on, by hand.
func (w write) prepare(t *testing.T, f *keyvaultfake.Fake) (secret.Key, string) {
	t.Helper()
	key := newKey(t)
	made := f.PersonSet(key.String(), "old", nil)
	if w.op == keyvaultfake.OpRecover {
		f.PersonDelete(key.String())
	}
	return key, made.ID
}

// done reports whether w had its effect on key.
func (w write) done(f *keyvaultfake.Fake, key secret.Key) bool {
	versions := f.Versions(key.String())
	switch w.op {
	case keyvaultfake.OpSet:
		return len(versions) == 2
	case keyvaultfake.OpUpdate:
		return !versions[0].Enabled
	case keyvaultfake.OpDelete:
		return f.State(key.String()) == keyvaultfake.Deleted
	}
	return f.State(key.String()) == keyvaultfake.Live
}

// eachWrite runs a test for each of the writes.
func eachWrite(t *testing.T, test func(t *testing.T, w write)) {
	t.Helper()
	for _, w := range writes {
		t.Run(string(w.op), func(t *testing.T) {
			t.Parallel()
			test(t, w)
		})
	}
}

// onWrites gives a fault to every request that changes something, but not to those
// by which Settle looks.
func onWrites(f *keyvaultfake.Fake, fault keyvaultfake.Fault) {
	f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		for _, w := range writes {
			if r.Op == w.op && (r.Op != keyvaultfake.OpUpdate || r.Version != "") {
				return fault
			}
		}
		return keyvaultfake.Fault{}
	})
}

// counted is ctx with an Effect that counts its calls.
func counted(ctx context.Context) (context.Context, *atomic.Int64) {
	var effects atomic.Int64
	return vault.WithOrigin(ctx, vault.Origin{Effect: func() error { effects.Add(1); return nil }}), &effects
}

func TestWriteIsSentOnceAndUncertain(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]struct {
		keyvaultfake.Fault
		done bool
	}{
		"Cut":      {keyvaultfake.Fault{Cut: true}, false},
		"CutAfter": {keyvaultfake.Fault{CutAfter: true}, true},
		"500":      {keyvaultfake.Fault{Status: 500}, false},
		"503":      {keyvaultfake.Fault{Status: 503}, false},
		"408":      {keyvaultfake.Fault{Status: 408}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, atOnce())
			onWrites(f, fault.Fault)
			eachWrite(t, func(t *testing.T, w write) {
				v := open(t, config(f, c, f.Broker()))
				key, version := w.prepare(t, f)
				ctx, effects := counted(t.Context())
				err := w.do(ctx, v, key, version)
				if !vault.IsUncertain(err) || !errors.Is(err, vault.ErrUnavailable) {
					t.Errorf("got %v, want ErrUnavailable of unknown outcome", err)
				}
				wantSent(t, f, w.op, 1)
				if got := w.done(f, key); got != fault.done {
					t.Errorf("done: got %v, want %v", got, fault.done)
				}
				if got := effects.Load(); got != 1 {
					t.Errorf("got %d calls of Effect, want 1", got)
				}
			})
		})
	}
}

func TestWriteBeyondTheRequestTimeoutIsUncertain(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	onWrites(f, keyvaultfake.Fault{Hold: make(chan struct{})})
	cfg := config(f, c, f.Broker())
	cfg.RequestTimeout = 300 * time.Millisecond
	v := open(t, cfg)
	var wg sync.WaitGroup
	for _, w := range writes {
		key, version := w.prepare(t, f)
		wg.Go(func() {
			err := w.do(t.Context(), v, key, version)
			if !vault.IsUncertain(err) || !errors.Is(err, vault.ErrUnavailable) {
				t.Errorf("%s: got %v, want ErrUnavailable of unknown outcome", w.op, err)
			}
			wantSent(t, f, w.op, 1)
		})
	}
	wg.Wait()
}

func TestWriteWhoseCallerLeavesIsUncertain(t *testing.T) {
	t.Parallel()
	eachWrite(t, func(t *testing.T, w write) {
		f, c := start(t, atOnce())
		v := open(t, config(f, c, f.Broker()))
		key, version := w.prepare(t, f)
		ctx, cancel := context.WithCancel(t.Context())
		f.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
			if r.Op != w.op {
				return keyvaultfake.Fault{}
			}
			cancel()
			return keyvaultfake.Fault{Hold: make(chan struct{})}
		})
		err := w.do(ctx, v, key, version)
		if !vault.IsUncertain(err) || !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want Canceled of unknown outcome", err)
		}
		wantSent(t, f, w.op, 1)
	})
}

// TestRecoverThatIsNotSeenIsUncertain: the vault took it, and the caller does not
// wait until it is done.
func TestRecoverThatIsNotSeenIsUncertain(t *testing.T) {
	t.Parallel()
	f, c := start(t, keyvaultfake.Config{Transitions: &keyvaultfake.Transitions{Recover: time.Hour}})
	v := open(t, config(f, c, f.Broker()))
	w := writes[3]
	key, _ := w.prepare(t, f)
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond) // less than the first wait
	defer cancel()
	err := v.Recover(ctx, key)
	if !vault.IsUncertain(err) {
		t.Errorf("got %v, want an unknown outcome", err)
	}
	wantSent(t, f, w.op, 1)
}

func TestWriteThatIsRefusedIsCertain(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		fault keyvaultfake.Fault
		want  error // nil: any
		after time.Duration
	}{
		"400":                  {keyvaultfake.Fault{Status: 400}, nil, 0},
		"403":                  {keyvaultfake.Fault{Status: 403, Inner: "ForbiddenByRbac"}, vault.ErrRefused, 0},
		"404":                  {keyvaultfake.Fault{Status: 404}, vault.ErrNotFound, 0},
		"409":                  {keyvaultfake.Fault{Status: 409}, nil, 0},
		"429":                  {keyvaultfake.Fault{Status: 429}, vault.ErrThrottled, 0},
		"429 with Retry-After": {keyvaultfake.Fault{Status: 429, RetryAfter: 7 * time.Second}, vault.ErrThrottled, 7 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, atOnce())
			onWrites(f, tt.fault)
			eachWrite(t, func(t *testing.T, w write) {
				v := open(t, config(f, c, f.Broker()))
				key, version := w.prepare(t, f)
				// A little less than the shortest wait for a state between.
				ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
				defer cancel()
				want := tt.want
				if w.op == keyvaultfake.OpRecover && want == vault.ErrNotFound {
					want = vault.ErrUnavailable // it is not live either
				}
				err := w.do(ctx, v, key, version)
				if err == nil || vault.IsUncertain(err) || want != nil && !errors.Is(err, want) {
					t.Errorf("got %v, want %v with a known outcome", err, want)
				}
				if got := vault.RetryAfter(err); got != tt.after {
					t.Errorf("got Retry-After %v, want %v", got, tt.after)
				}
				if w.done(f, key) {
					t.Error("it was done")
				}
				wantSent(t, f, w.op, 1)
			})
		})
	}
}

// TestReadOnly: during a failover of its region a vault takes no writes, from
// anybody. That is an outage, and no matter of rights.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	f.SetReadOnly(true)
	eachWrite(t, func(t *testing.T, w write) {
		v := open(t, config(f, c, f.Broker()))
		key, version := w.prepare(t, f)
		wantError(t, string(w.op), w.do(t.Context(), v, key, version), vault.ErrUnavailable)
		wantSent(t, f, w.op, 1)
		if _, _, err := v.Get(t.Context(), key, ""); err != nil && w.op != keyvaultfake.OpRecover {
			t.Errorf("Get: got %v, want nil", err)
		}
	})
}

// TestWriteThatIsNotSentIsCertain: nothing gets to the vault, for several reasons.
func TestWriteThatIsNotSentIsCertain(t *testing.T) {
	t.Parallel()
	refusing := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "no", http.StatusBadGateway)
	}))
	t.Cleanup(refusing.Close)
	through := func(server string) func(*http.Request) (*url.URL, error) {
		return func(*http.Request) (*url.URL, error) { return url.Parse(server) }
	}
	for name, tt := range map[string]struct {
		proxy string // instead of the fake's
		dial  error
	}{
		"connection refused": {dial: &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}},
		"DNS":                {dial: &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", IsNotFound: true}}},
		"CONNECT refused":    {proxy: refusing.URL},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, c := start(t, atOnce())
			eachWrite(t, func(t *testing.T, w write) {
				cfg := config(f, c, f.Broker())
				var broken atomic.Bool
				cfg.Transport = proxied(f)
				cfg.Transport.DisableKeepAlives = true
				usual, dial := cfg.Transport.Proxy, cfg.Transport.DialContext
				cfg.Transport.Proxy = func(r *http.Request) (*url.URL, error) {
					if broken.Load() && tt.proxy != "" {
						return through(tt.proxy)(r)
					}
					return usual(r)
				}
				cfg.Transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
					if broken.Load() && tt.dial != nil {
						return nil, tt.dial
					}
					return dial(ctx, network, address)
				}
				v := open(t, cfg)
				key, version := w.prepare(t, f)
				broken.Store(true)
				err := w.do(t.Context(), v, key, version)
				if !errors.Is(err, vault.ErrUnavailable) || vault.IsUncertain(err) {
					t.Errorf("got %v, want ErrUnavailable with a known outcome", err)
				}
				wantSent(t, f, w.op, 0)
			})
		})
	}
}

// proxied is what a Config without Transport gets behind the fake's proxy.
func proxied(f *keyvaultfake.Fake) *http.Transport {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(f.CAPEM())
	tr := keyvaultwire.NewTransport()
	tr.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	tr.Proxy = func(*http.Request) (*url.URL, error) { return url.Parse(f.ProxyURL()) }
	return tr
}

// TestWriteOnADeadConnectionIsCertain: the connection that was kept has ended, and
// no other can be made.
func TestWriteOnADeadConnectionIsCertain(t *testing.T) {
	t.Parallel()
	eachWrite(t, func(t *testing.T, w write) {
		f, c := start(t, atOnce())
		cfg := config(f, c, f.Broker())
		var broken atomic.Bool
		dial := cfg.Transport.DialContext
		cfg.Transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			if broken.Load() {
				return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
			}
			conn, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &deaf{conn, &broken}, nil
		}
		v := open(t, cfg)
		key, version := w.prepare(t, f)
		broken.Store(true)
		err := w.do(t.Context(), v, key, version)
		if !errors.Is(err, vault.ErrUnavailable) || vault.IsUncertain(err) {
			t.Errorf("got %v, want ErrUnavailable with a known outcome", err)
		}
		wantSent(t, f, w.op, 0)
	})
}

// deaf is a connection on which nothing can be written once it is broken.
type deaf struct {
	net.Conn
	broken *atomic.Bool
}

func (d *deaf) Write(p []byte) (int, error) {
	if d.broken.Load() {
		return 0, &net.OpError{Op: "write", Net: "tcp", Err: syscall.EPIPE}
	}
	return d.Conn.Write(p)
}

func TestWriteWithoutATokenIsCertain(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(*keyvaultfake.Fake){
		"down": func(f *keyvaultfake.Fake) { f.SetTokenServiceDown(true) },
		"500":  func(f *keyvaultfake.Fake) { on(f, keyvaultfake.OpToken, always, keyvaultfake.Fault{Status: 500}) },
		"429":  func(f *keyvaultfake.Fake) { on(f, keyvaultfake.OpToken, always, keyvaultfake.Fault{Status: 429}) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachWrite(t, func(t *testing.T, w write) {
				f, c := start(t, atOnce())
				v := open(t, config(f, c, f.Broker()))
				key, version := w.prepare(t, f)
				f.ExpireTokens()
				lose(f)
				for range 2 { // with the token that the vault refuses, and without one
					err := w.do(t.Context(), v, key, version)
					if !errors.Is(err, vault.ErrUnavailable) || vault.IsUncertain(err) {
						t.Errorf("got %v, want ErrUnavailable with a known outcome", err)
					}
				}
				if w.done(f, key) {
					t.Error("it was done")
				}
			})
		})
	}
}

func TestEffectThatFailsKeepsTheRequest(t *testing.T) {
	t.Parallel()
	eachWrite(t, func(t *testing.T, w write) {
		f, c := start(t, atOnce())
		v := open(t, config(f, c, f.Broker()))
		key, version := w.prepare(t, f)
		gone := errors.New("gone")
		ctx := vault.WithOrigin(t.Context(), vault.Origin{Effect: func() error { return gone }})
		if err := w.do(ctx, v, key, version); !errors.Is(err, gone) || vault.IsUncertain(err) {
			t.Errorf("got %v, want %v with a known outcome", err, gone)
		}
		wantSent(t, f, w.op, 0)
	})
}

// TestAnswerThatCannotBeRead: the vault said 200, and no more.
func TestAnswerThatCannotBeRead(t *testing.T) {
	t.Parallel()
	f, c := start(t, atOnce())
	cfg := config(f, c, f.Broker())
	v := open(t, cfg)
	key := newKey(t)
	on(f, keyvaultfake.OpSet, 1, keyvaultfake.Fault{Status: 200})
	_, err := v.Set(t.Context(), key, vault.NewVersion{Value: secret.NewValue("x")})
	if !errors.Is(err, vault.ErrUnavailable) || !vault.IsUncertain(err) {
		t.Errorf("got %v, want ErrUnavailable of unknown outcome", err)
	}
	wantSent(t, f, keyvaultfake.OpSet, 1)
}
