// Package server is the gRPC face of the broker: it knows callers by their
// certificates, judges what they may do, puts requests into the words of package
// broker and its answers and errors back into those of the contract.
package server

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	channelz "google.golang.org/grpc/channelz/service"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/server/audit"
	"github.com/exto/secrets-broker/server/broker"
)

// Limits of what one connection may ask of the server. The first two are part of
// the contract, and so are 1,024 streams that stay open: as many again are for
// unary calls, which would otherwise wait for one of those to end.
const (
	maxRequestBytes = 64 << 10
	maxHeaderBytes  = 16 << 10
	maxStreams      = 2 * maxWatches
	maxWatches      = 1024
	// handshakeTimeout sheds connections that never finish their handshake;
	// gRPC's own bound is 120 s.
	handshakeTimeout = 20 * time.Second
	// pingInterval finds peers that are gone without a word, and minPing is how
	// often a client may ping, with or without calls.
	pingInterval = time.Minute
	pingTimeout  = 20 * time.Second
	minPing      = 10 * time.Second
	// maxIdle ends connections without streams: one that nothing is allowed on any more
	// would stay for as long as its client answers pings.
	maxIdle = 15 * time.Minute
	// A stream's window is the smallest there is; a connection's holds back nobody whose
	// calls are far away.
	streamWindow = 64 << 10
	connWindow   = 1 << 20
)

// streamWorkers is how many goroutines are kept for calls, so that their stacks are
// grown once and not for each call; more calls than that get goroutines of their own.
const streamWorkers = 256

// Config is what a Server stands on. All fields are required but Now.
type Config struct {
	Broker *broker.Broker
	// Audit gets a record of each call.
	Audit *audit.Log
	// Trust is who may call, and how connections are secured. Its Run has to run as
	// long as the server.
	Trust *Trust
	// Logger gets one line for each call, at a level that follows from its code,
	// and the causes that callers are not told.
	Logger *slog.Logger
	// Metrics gets the metrics of the calls.
	Metrics prometheus.Registerer
	// Now is the wall clock by which certificates expire; nil means time.Now.
	Now func() time.Time

	// CallerRequestsPerSecond is how many requests each caller may make; 0 means any
	// number.
	CallerRequestsPerSecond float64

	// Zero means the constants; tests have less time and smaller bounds.
	handshakeTimeout, pingInterval, pingTimeout time.Duration
	bounds                                      bounds
	await                                       func(mark int64, gone <-chan struct{}) bool // nil: Audit's
}

// Server serves the broker's RPCs, grpc.health.v1, and to callers with the
// permission debug reflection and channelz.
type Server struct {
	grpc        *grpc.Server
	health      *health.Server
	connections *connections
	open        *openIntents
	background  sync.WaitGroup // what settles open intents and records refusals
	drain       context.CancelFunc
	drained     context.Context
}

// New makes a Server that does not listen yet. What the audit log shows to be half done
// is not served from now on, and is settled once the Server serves.
func New(cfg Config) (*Server, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.handshakeTimeout = cmp.Or(cfg.handshakeTimeout, handshakeTimeout)
	cfg.pingInterval, cfg.pingTimeout = cmp.Or(cfg.pingInterval, pingInterval), cmp.Or(cfg.pingTimeout, pingTimeout)
	cfg.bounds = cmp.Or(cfg.bounds, usualBounds)
	if cfg.await == nil {
		cfg.await = cfg.Audit.Await
	}
	metrics := callMetrics{}
	s := &Server{health: health.NewServer(), open: findOpen(cfg.Audit, cfg.Broker, cfg.Now())}
	logRefusal, auditRefusal := logRefusals(cfg.Logger), auditRefusals(cfg.Audit, &s.background)
	refusals, err := newRefusals(cfg.Metrics, cfg.Now, func(r transportRefusal) { logRefusal(r); auditRefusal(r) })
	if err != nil {
		return nil, err
	}
	accounts := &accounts{bounds: cfg.bounds, perSecond: cfg.CallerRequestsPerSecond, now: cfg.Now, of: map[spiffeid.ID]*account{}}
	s.connections = &connections{
		TransportCredentials: credentials.NewTLS(cfg.Trust.TLS()), trust: cfg.Trust, accounts: accounts, refusals: refusals, await: cfg.await, log: cfg.Logger, open: map[*guarded]bool{},
	}
	s.drained, s.drain = context.WithCancel(context.Background())
	gate := &gate{trust: cfg.Trust, now: cfg.Now, log: cfg.Logger, accounts: accounts, audit: cfg.Audit}
	s.grpc = grpc.NewServer(append(chain(metrics, cfg.Logger, gate, refusals, s.drained),
		grpc.Creds(s.connections),
		grpc.ForceServerCodecV2(codec{wire}),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.ConnectionTimeout(cfg.handshakeTimeout),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return nil }), // refuseUnknown answers
		// Static, or gRPC widens them to 16 MiB a stream for a client that sends fast.
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: cfg.pingInterval, Timeout: cfg.pingTimeout, MaxConnectionIdle: maxIdle}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
	)...)
	services := registrar{s.grpc, refusals}
	secretsv1.RegisterSecretsBrokerServiceServer(services, &service{broker: cfg.Broker, gate: gate})
	healthpb.RegisterHealthServer(services, s.health)
	s.health.SetServingStatus(secretsv1.SecretsBrokerService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
	reflection.Register(services) // v1 and v1alpha, which older grpcurls ask for
	channelz.RegisterChannelzServiceToServer(services)
	metrics.register(cfg.Metrics, s.grpc.GetServiceInfo())
	return s, nil
}

// Serve answers calls on l until Shutdown; it closes l. The error is nil after a
// Shutdown.
func (s *Server) Serve(l net.Listener) error {
	over := make(chan struct{})
	defer close(over)
	go s.connections.watch(over)
	s.background.Go(func() { s.open.settle(s.drained) })
	if err := s.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Shutdown says NOT_SERVING, takes no further calls, ends streams and unfinished
// handshakes, waits for the calls under way until ctx ends, and then cuts them
// off. Serve has returned when it returns.
func (s *Server) Shutdown(ctx context.Context) {
	s.health.Shutdown()
	s.drain()
	s.connections.end()
	cut := context.AfterFunc(ctx, s.grpc.Stop)
	defer cut()
	s.grpc.GracefulStop()
	s.connections.refusals.close()
	s.background.Wait()
}
