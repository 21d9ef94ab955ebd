// Package server is the gRPC face of the broker: it knows callers by their
// certificates, judges what they may do, puts requests into the words of package
// broker and its answers and errors back into those of the contract.
package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	channelz "google.golang.org/grpc/channelz/service"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
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
)

// streamWorkers is how many goroutines are kept for calls, so that their stacks are
// grown once and not for each call; more calls than that get goroutines of their own.
const streamWorkers = 64

// Config is what a Server stands on. All fields are required but Now.
type Config struct {
	Broker *broker.Broker
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

	handshakeTimeout time.Duration // zero means the constant; tests have less time
}

// Server serves the broker's RPCs, grpc.health.v1, and to callers with the
// permission debug reflection and channelz.
type Server struct {
	grpc       *grpc.Server
	health     *health.Server
	handshakes *handshakes
	drain      context.CancelFunc
	drained    context.Context
}

// New makes a Server that does not listen yet.
func New(cfg Config) (*Server, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.handshakeTimeout == 0 {
		cfg.handshakeTimeout = handshakeTimeout
	}
	metrics := grpcprom.NewServerMetrics(grpcprom.WithServerHandlingTimeHistogram())
	if err := cfg.Metrics.Register(metrics); err != nil {
		return nil, err
	}
	s := &Server{
		health:     health.NewServer(),
		handshakes: &handshakes{TransportCredentials: credentials.NewTLS(cfg.Trust.TLS()), trust: cfg.Trust, pending: map[net.Conn]bool{}},
	}
	s.drained, s.drain = context.WithCancel(context.Background())
	gate := &gate{trust: cfg.Trust, now: cfg.Now, log: cfg.Logger}
	s.grpc = grpc.NewServer(append(chain(metrics, cfg.Logger, gate, s.drained),
		grpc.Creds(s.handshakes),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.ConnectionTimeout(cfg.handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingInterval, Timeout: pingTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
	)...)
	secretsv1.RegisterSecretsBrokerServiceServer(s.grpc, &service{broker: cfg.Broker, gate: gate})
	healthpb.RegisterHealthServer(s.grpc, s.health)
	s.health.SetServingStatus(secretsv1.SecretsBrokerService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
	reflection.Register(s.grpc) // v1 and v1alpha, which older grpcurls ask for
	channelz.RegisterChannelzServiceToServer(s.grpc)
	metrics.InitializeMetrics(s.grpc)
	return s, nil
}

// Serve answers calls on l until Shutdown; it closes l. The error is nil after a
// Shutdown.
func (s *Server) Serve(l net.Listener) error {
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
	s.handshakes.end()
	cut := context.AfterFunc(ctx, s.grpc.Stop)
	defer cut()
	s.grpc.GracefulStop()
}
