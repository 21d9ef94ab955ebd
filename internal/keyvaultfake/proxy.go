package keyvaultfake

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
)

// ProxyURL is of a CONNECT proxy that knows the hosts of the vault and of the token
// service and refuses all others: a program behind it reaches the fake, and nothing
// else.
func (f *Fake) ProxyURL() string { return "http://" + f.proxyServer.address() }

// Transport is for clients in this process: it reaches the fake under the real host
// names without a proxy, and the managed identity endpoint, and nothing else. Each
// call makes a new one, with connections of its own.
func (f *Fake) Transport() *http.Transport {
	roots := x509.NewCertPool()
	roots.AddCert(f.ca.Cert)
	return &http.Transport{
		DialContext: func(ctx context.Context, network, hostport string) (net.Conn, error) {
			address, ok := f.address(hostport)
			if !ok && hostport == f.identityServer.address() {
				address, ok = hostport, true
			}
			if !ok {
				f.refused.add(hostport)
				return nil, fmt.Errorf("key vault fake: %s is not a host of the fake", hostport)
			}
			return new(net.Dialer).DialContext(ctx, network, address)
		},
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
	}
}

// proxy serves CONNECT.
func (f *Fake) proxy(w http.ResponseWriter, r *http.Request) {
	f.running.Add(1)
	defer f.running.Done()
	address, ok := f.address(r.Host)
	if r.Method != http.MethodConnect || !ok {
		f.refused.add(r.Host)
		http.Error(w, "key vault fake: this proxy only connects to the fake", http.StatusForbidden)
		return
	}
	upstream, err := net.Dial("tcp", address)
	if err != nil {
		http.Error(w, "key vault fake: "+err.Error(), http.StatusBadGateway)
		return
	}
	defer upstream.Close()
	hijacked, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return // the client is gone
	}
	client := hijacked.(*conn)
	if _, err := io.WriteString(client, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		client.cut()
		return
	}
	tunnel(client, buffered, upstream)
}

// tunnel copies both ways until one side ends. A reset on one side becomes a reset on
// the other: a connection that was cut must not look closed.
func tunnel(client *conn, fromClient io.Reader, upstream net.Conn) {
	var once sync.Once
	end := func(err error) {
		once.Do(func() {
			if err != nil {
				client.cut()
			}
			_ = client.Close() // may be cut already
			_ = upstream.Close()
		})
	}
	var other sync.WaitGroup
	other.Go(func() {
		_, err := io.Copy(upstream, fromClient)
		end(err)
	})
	_, err := io.Copy(client, upstream)
	end(err)
	other.Wait()
}
