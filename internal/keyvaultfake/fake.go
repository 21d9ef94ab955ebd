// Package keyvaultfake is Azure Key Vault in memory, secrets only, with the Entra
// token service in front of it: real HTTP over real TLS, for tests and for trying
// the broker without a subscription. It answers under the real host names, so the
// SDK's checks stay on, and it is as slow, as strict and as unhelpful as Key Vault
// where a client must cope with that: deletes take time, lists come in pages,
// requests are limited, and an error holds more than a log may show.
//
// What is not there: keys, certificates, backup and restore, events, signed tokens.
package keyvaultfake

import (
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/exto/secrets-broker/internal/pki"
	"github.com/google/uuid"
)

const (
	vaultDomain = ".vault.azure.net"
	loginHost   = "login.microsoftonline.com"

	defaultName      = "exto-test"
	defaultRetention = 90 * 24 * time.Hour
	// certificateLife is long enough for whoever leaves a fake running.
	certificateLife = 365 * 24 * time.Hour
)

// Config of a fake. Its zero value is usable.
type Config struct {
	Name            string           // of the vault: the host is Name.vault.azure.net. Empty: exto-test
	Now             func() time.Time // the fake's clock, driven by the caller. Nil: the real one plus what Advance added
	Transitions     *Transitions     // nil: DefaultTransitions
	Limits          *Limits          // nil: DefaultLimits
	Retention       time.Duration    // of deleted secrets. 0: 90 days
	PurgeProtection bool             // nobody may purge
}

// Transitions says how long the states between take, by the fake's clock. Its zero
// value is: none.
type Transitions struct {
	Delete          time.Duration // until a deleted name is seen under /deletedsecrets
	Recover         time.Duration // until a recovered name can be read
	RecoverConflict time.Duration // from then until it can be written
	Purge           time.Duration // until a purged name is free
}

// DefaultTransitions are about as long as those that were seen in Azure.
func DefaultTransitions() *Transitions {
	return &Transitions{Delete: 15 * time.Second, Recover: 12 * time.Second, RecoverConflict: 4 * time.Second, Purge: 10 * time.Second}
}

// Fake is a running vault with its token service. All methods may be called
// concurrently.
type Fake struct {
	name, host, tenant string
	clock              func() time.Time // Config.Now
	ahead              atomic.Int64     // nanoseconds that Advance added

	ca                                                    pki.Pair
	vaultServer, tokenServer, identityServer, proxyServer *server
	identityHeader                                        string
	broker, person                                        Principal

	closing sync.Once
	done    chan struct{}  // closed by Close
	running sync.WaitGroup // servers, connections and handlers

	journal journal
	hook    atomic.Pointer[func(*Request) Fault]
	refused refusals

	// mu guards what follows. No hook, wait or answer happens under it.
	mu       sync.Mutex
	vault    vault
	rights   map[string]map[Op]bool // of each principal, by client id
	tokens   map[string]*token
	throttle throttle
	readOnly bool
	late     []lateCommit // in order of when they are due
}

// Start runs a fake on loopback until Close.
func Start(cfg Config) (*Fake, error) {
	f := &Fake{
		name:           strings.ToLower(cfg.Name),
		clock:          cfg.Now,
		tenant:         uuid.NewString(),
		identityHeader: randomHex(),
		broker:         newPrincipal(),
		person:         newPrincipal(),
		done:           make(chan struct{}),
		tokens:         map[string]*token{},
	}
	if f.name == "" {
		f.name = defaultName
	}
	f.host = f.name + vaultDomain
	f.broker.TenantID, f.person.TenantID = f.tenant, f.tenant
	f.rights = map[string]map[Op]bool{f.broker.ClientID: {}, f.person.ClientID: {}}
	f.Grant(f.person)
	f.Grant(f.broker)
	f.Revoke(f.broker, OpPurge)
	f.vault = vault{
		transitions:     *orDefault(cfg.Transitions, DefaultTransitions),
		retention:       cfg.Retention,
		purgeProtection: cfg.PurgeProtection,
		secrets:         map[string]*secret{},
	}
	if f.vault.retention == 0 {
		f.vault.retention = defaultRetention
	}
	f.throttle.Limits = *orDefault(cfg.Limits, DefaultLimits)
	if f.throttle.Window == 0 {
		f.throttle.Window = DefaultLimits().Window
	}
	if err := f.listen(); err != nil {
		_ = f.Close() // the error of listening is the one to tell
		return nil, fmt.Errorf("key vault fake: %w", err)
	}
	return f, nil
}

func orDefault[T any](given *T, otherwise func() *T) *T {
	if given == nil {
		return otherwise()
	}
	return given
}

// listen makes the certificate and starts the servers.
func (f *Fake) listen() error {
	// Clients judge certificates by the real time, whatever the fake's clock says.
	now := time.Now()
	var err error
	if f.ca, err = pki.NewCA("Key Vault fake CA", now, certificateLife); err != nil {
		return err
	}
	pair, err := f.ca.Issue(x509.Certificate{
		DNSNames:    []string{f.host, loginHost},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, now, certificateLife)
	if err != nil {
		return err
	}
	for _, s := range []struct {
		server **server
		secure bool
		build  func(*server) http.Handler
	}{
		{&f.vaultServer, true, func(s *server) http.Handler { return f.handler(s, restFace{f}) }},
		{&f.tokenServer, true, func(s *server) http.Handler { return f.handler(s, tokenFace{f}) }},
		{&f.identityServer, false, func(s *server) http.Handler { return f.handler(s, identityFace{f}) }},
		{&f.proxyServer, false, func(*server) http.Handler { return http.HandlerFunc(f.proxy) }},
	} {
		if *s.server, err = f.start(pair, s.secure, s.build); err != nil {
			return err
		}
	}
	return nil
}

// Close ends every listener, connection and goroutine of the fake, and with them the
// requests under way. It waits for hooks that have not returned.
func (f *Fake) Close() error {
	f.closing.Do(func() {
		close(f.done)
		for _, s := range []*server{f.proxyServer, f.vaultServer, f.tokenServer, f.identityServer} {
			if s != nil {
				s.close()
			}
		}
	})
	f.running.Wait()
	return nil
}

// Now is the time by the fake's clock.
func (f *Fake) Now() time.Time {
	if f.clock != nil {
		return f.clock()
	}
	return time.Now().Add(time.Duration(f.ahead.Load()))
}

// Advance moves the fake's clock on, and applies the late commits that are due then.
// It panics if Config.Now was set: then the caller moves its own clock, and calls
// Settle.
func (f *Fake) Advance(d time.Duration) {
	if f.clock != nil {
		panic("keyvaultfake: Advance with Config.Now set: move that clock instead, then call Settle")
	}
	f.ahead.Add(int64(d))
	f.Settle()
}

// URL of the vault, as a client is configured with it.
func (f *Fake) URL() string { return "https://" + f.host + "/" }

// CAPEM is the CA of the certificate that the vault and the token service show.
func (f *Fake) CAPEM() []byte { return f.ca.CertPEM() }

// Env is how a program that trusts CAPEM finds the vault, in the form of os.Environ;
// without credentials.
func (f *Fake) Env() []string {
	return []string{
		"HTTPS_PROXY=" + f.ProxyURL(),
		"AZURE_KEY_VAULT_URL=" + f.URL(),
		"SECRET_STORE_PROVIDER=azure-keyvault",
	}
}

// SetDown cuts every connection to the vault, open ones too, until it is called with
// false. The token service goes on.
func (f *Fake) SetDown(down bool) { f.vaultServer.gate.shut(down) }

// SetTokenServiceDown likewise cuts every connection to the token service and to the
// managed identity endpoint. The vault goes on, and so do the tokens that are out.
func (f *Fake) SetTokenServiceDown(down bool) {
	f.tokenServer.gate.shut(down)
	f.identityServer.gate.shut(down)
}

// SetReadOnly makes the vault refuse all writes, as during a regional failover.
func (f *Fake) SetReadOnly(readOnly bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.readOnly = readOnly
}

// address is where the fake serves host:port, if it does.
func (f *Fake) address(hostport string) (string, bool) {
	switch strings.ToLower(hostport) {
	case net.JoinHostPort(f.host, "443"):
		return f.vaultServer.address(), true
	case net.JoinHostPort(loginHost, "443"):
		return f.tokenServer.address(), true
	}
	return "", false
}

// refusals are the hosts that somebody tried to reach and the fake is not.
type refusals struct {
	mu    sync.Mutex
	hosts []string
}

func (r *refusals) add(hostport string) {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = hostport
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hosts = append(r.hosts, host)
}

// Refused are the hosts, without port, that the proxy or a Transport was asked for
// and refused, in order, each as often as it was asked for.
func (f *Fake) Refused() []string {
	f.refused.mu.Lock()
	defer f.refused.mu.Unlock()
	return slices.Clone(f.refused.hosts)
}
