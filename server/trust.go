package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/exto/secrets-broker/server/authz"
)

// readEvery is how often the files are read again. A change is taken when two looks
// saw the same, so that it is in force after two of them, or three when files change
// one after the other.
const readEvery = time.Second

// TrustConfig is what a Trust stands on. Files and Logger are required.
type TrustConfig struct {
	Files  Files
	Logger *slog.Logger
	// Metrics, unless nil, gets which files are good and how often each was taken.
	Metrics prometheus.Registerer
	// OnChange, unless nil, is told what is to be in force from now on, at the start
	// and then whenever that changes, before anything is decided under it. Nothing
	// changes until it returns.
	OnChange func(Hashes)

	readEvery time.Duration // zero means the constant; tests have less time
}

// Hashes are the SHA-256 of the files in force, in hex. Revoked is empty when there is
// no such file.
type Hashes struct {
	Policy      string
	Revoked     string
	ClientCA    string
	Certificate string // the certificate's file alone, without its key
}

// Trust is whom the broker trusts, and how it shows who it is: policy, revocations,
// client CA and its own certificate, as the files have them now.
type Trust struct {
	log      *slog.Logger
	onChange func(Hashes)
	every    time.Duration
	sources  []*source
	restless int // looks in a row that saw a file change
	now      atomic.Pointer[snapshot]
	ok       *prometheus.GaugeVec
	reloads  *prometheus.CounterVec
}

// snapshot is what is in force at one time, all of it together. It never changes.
type snapshot struct {
	number      uint64 // another one for each snapshot
	policy      *authz.Policy
	revoked     *authz.Revoked
	clientCAs   *x509.CertPool
	certificate tls.Certificate
	tls         *tls.Config // of the two above
	hashes      Hashes
	replaced    chan struct{} // closed when another one is in force
}

// OpenTrust reads the files. The error is a *FileError when one of them is bad.
func OpenTrust(cfg TrustConfig) (*Trust, error) {
	t := &Trust{log: cfg.Logger, onChange: cfg.OnChange, every: cfg.readEvery, sources: cfg.Files.sources()}
	if t.every == 0 {
		t.every = readEvery
	}
	if t.onChange == nil {
		t.onChange = func(Hashes) {}
	}
	t.ok = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "secrets_broker_config_file_ok",
		Help: "1 while the file is as the one in force; 0 while it is bad and the one before stays in force.",
	}, []string{"file"})
	t.reloads = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "secrets_broker_config_file_reloads_total",
		Help: "Changes of the file that were taken.",
	}, []string{"file"})
	if cfg.Metrics != nil {
		if err := errors.Join(cfg.Metrics.Register(t.ok), cfg.Metrics.Register(t.reloads)); err != nil {
			return nil, err
		}
	}
	first := &snapshot{revoked: &authz.Revoked{}}
	for _, src := range t.sources {
		contents, sum, err := src.read()
		if err == nil {
			err = src.take(contents, first)
		}
		if err != nil {
			return nil, err
		}
		src.seen, src.judged, src.inForce = sum, sum, sum
		t.ok.WithLabelValues(src.name).Set(1)
		t.reloads.WithLabelValues(src.name)
	}
	t.put(first)
	return t, nil
}

// put puts s in force.
func (t *Trust) put(s *snapshot) {
	s.replaced = make(chan struct{})
	s.tls = &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{s.certificate},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    s.clientCAs,
		NextProtos:   []string{"h2"},
		// A resumed session would skip the verification of the client's chain
		// against a client CA that has changed since.
		SessionTicketsDisabled: true,
	}
	t.onChange(s.hashes)
	t.now.Store(s)
}

// TLS is how connections are secured: TLS 1.3 with a client certificate of the client
// CA required. What is in force is asked at each handshake.
func (t *Trust) TLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return t.now.Load().tls, nil
		},
	}
}

// Run reads the files again and again, until ctx ends.
func (t *Trust) Run(ctx context.Context) {
	tick := time.NewTicker(t.every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			t.look()
		case <-ctx.Done():
			return
		}
	}
}

// Reload is for who has written the files whole: what has changed is in force when it
// returns, without the second look that Run leaves to the next second. Nobody else
// may be in Reload or Run meanwhile.
func (t *Trust) Reload() {
	t.look()
	t.look()
}

// look reads every file and takes what has changed as one step. There is no watch on
// the files: Kubernetes swaps links to folders, others write in place or rename, and a
// few small reads a second see all of that.
//
// What differs from the last look is left for the next one. It may be half written, a
// certificate whose key comes yet, or files before and after a swap of all of them.
func (t *Trust) look() {
	type found struct {
		contents [][]byte
		err      error
		settled  bool
	}
	all, moved := make([]found, len(t.sources)), false
	for i, src := range t.sources {
		contents, sum, err := src.read()
		all[i] = found{contents, err, sum == src.seen}
		moved = moved || !all[i].settled
		src.seen = sum
	}
	// A file that never comes to rest must not keep the others back.
	if t.restless++; !moved {
		t.restless = 0
	} else if t.restless < 3 {
		return
	}
	was := t.now.Load()
	next := *was
	next.number++
	var taken []*source
	for i, src := range t.sources {
		if !all[i].settled || src.seen == src.judged {
			continue
		}
		src.judged = src.seen
		err := all[i].err
		if err == nil && src.seen != src.inForce {
			err = src.take(all[i].contents, &next)
		}
		switch {
		case err != nil:
			t.ok.WithLabelValues(src.name).Set(0)
			t.log.Error("a changed file is bad; what was read before stays in force", "file", src.name, "error", err)
			continue
		case src.seen == src.inForce:
			t.log.Info("a file is again the one in force", "file", src.name)
		default:
			taken = append(taken, src)
		}
		t.ok.WithLabelValues(src.name).Set(1)
	}
	if len(taken) == 0 {
		return
	}
	t.put(&next)
	close(was.replaced)
	for _, src := range taken {
		src.inForce = src.seen
		t.reloads.WithLabelValues(src.name).Inc()
		t.log.Info("a changed file is in force", "file", src.name, "path", src.files[0].path, "sha256", *src.hash(&next.hashes))
	}
}
