// Package keyvaultwire is how Key Vault is spoken to safely, and what its answers and
// failures mean: what the broker and client/direct, each over Azure's SDK, have in
// common. It does not import that itself.
package keyvaultwire

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"
)

var dialer = &net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}

// NewTransport is like the SDK's own but for three things. It speaks HTTP/1.1, so
// that a dead connection ends with the one request that met it. It bounds the
// dial. And it says of a refused CONNECT that it was one.
func NewTransport() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.ForceAttemptHTTP2 = false
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	t.MaxIdleConns, t.MaxIdleConnsPerHost = 0, 128
	t.DialContext = dialer.DialContext
	t.TLSHandshakeTimeout = 5 * time.Second
	t.OnProxyConnectResponse = func(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
		if resp.StatusCode != http.StatusOK {
			return &ProxyError{resp.StatusCode}
		}
		return nil
	}
	return t
}

// NoRedirect: no answer of the vault leads a token elsewhere.
func NoRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// ProxyError is a refused CONNECT.
type ProxyError struct{ Status int }

func (e *ProxyError) Error() string {
	return fmt.Sprintf("the proxy (HTTPS_PROXY) answered %d %s", e.Status, http.StatusText(e.Status))
}

// NoPanic makes an error of a panic of the SDK: a challenge without a tenant is
// one, and no answer from outside is a reason for the process to die.
func NoPanic(ctx context.Context, f func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("a panic in the SDK: %T", p)
		}
	}()
	return f(ctx)
}
