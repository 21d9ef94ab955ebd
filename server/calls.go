package server

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"github.com/google/uuid"
	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	middleware "github.com/grpc-ecosystem/go-grpc-middleware/v2"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/logging"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
)

// How long a unary call without a deadline may take.
const (
	readTimeout  = 30 * time.Second
	writeTimeout = 2 * time.Minute
)

// call is what is known of a call before anybody judged it.
type call struct {
	auditID string
	write   bool // its errors say whether it happened
	caller  identity
}

type callKey struct{}

// callFrom is the call that ctx belongs to; every handler's context has one.
func callFrom(ctx context.Context) *call { return ctx.Value(callKey{}).(*call) }

// broker is the call in the words of package broker.
func (c *call) broker() broker.Call {
	return broker.Call{Caller: c.caller.id.String(), AuditID: c.auditID}
}

// chain is the way of every call, outermost first: metrics, who it is and
// how long it may take, logging, recovery, decision. A refusal is thereby
// counted and logged like an answer.
func chain(metrics *grpcprom.ServerMetrics, log *slog.Logger, g *gate, drained context.Context) []grpc.ServerOption {
	logCalls := []logging.Option{
		logging.WithLogOnEvents(logging.FinishCall), // never payloads
		logging.WithLevels(level),
		logging.WithFieldsFromContext(func(ctx context.Context) logging.Fields {
			c := callFrom(ctx)
			return logging.Fields{"audit_id", c.auditID, "caller", c.caller.name()}
		}),
	}
	// Health checks come every few seconds from every client.
	notHealth := selector.MatchFunc(func(_ context.Context, c interceptors.CallMeta) bool {
		return c.Service != healthpb.Health_ServiceDesc.ServiceName
	})
	recovered := recovery.WithRecoveryHandlerContext(func(ctx context.Context, p any) error {
		// The type alone: the text of a panic may hold anything.
		log.ErrorContext(ctx, "panic in a call", "audit_id", callFrom(ctx).auditID, "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
		return statusOf(ctx, &broker.Error{Reason: secret.Defect, Commit: secret.Unknown})
	})
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(
			metrics.UnaryServerInterceptor(),
			beginUnary(g),
			selector.UnaryServerInterceptor(logging.UnaryServerInterceptor(logger(log), logCalls...), notHealth),
			recovery.UnaryServerInterceptor(recovered),
			decideUnary(g),
		),
		grpc.ChainStreamInterceptor(
			metrics.StreamServerInterceptor(),
			beginStream(g, drained),
			selector.StreamServerInterceptor(logging.StreamServerInterceptor(logger(log), logCalls...), notHealth),
			recovery.StreamServerInterceptor(recovered),
			decideStream(g),
		),
	}
}

// begin makes the call that everything else goes by.
func begin(ctx context.Context, g *gate, method string) (context.Context, *call) {
	c := &call{auditID: uuid.NewString(), write: methods[method].write, caller: g.identify(ctx)}
	return context.WithValue(ctx, callKey{}, c), c
}

func beginUnary(g *gate) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		ctx, c := begin(ctx, g, info.FullMethod)
		if _, ok := ctx.Deadline(); !ok {
			timeout := readTimeout
			if c.write {
				timeout = writeTimeout
			}
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, timeout)
			defer cancel()
		}
		return handler(ctx, req)
	}
}

// beginStream gives streams no deadline; the beginning of a shutdown ends them.
func beginStream(g *gate, drained context.Context) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		ctx, _ := begin(stream.Context(), g, info.FullMethod)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(drained, cancel)()
		return handler(srv, &drainedStream{middleware.WrappedServerStream{ServerStream: stream, WrappedContext: ctx}, drained})
	}
}

// drainedStream is a stream on which nobody waits for a message beyond the
// beginning of a shutdown: gRPC's own RecvMsg ends with the connection alone.
type drainedStream struct {
	middleware.WrappedServerStream
	drained context.Context
}

func (s *drainedStream) RecvMsg(m any) error {
	received := make(chan error, 1)
	// It ends when the handler has returned, as it does after an error from here,
	// and then nobody looks at m.
	go func() { received <- s.ServerStream.RecvMsg(m) }()
	select {
	case err := <-received:
		return err
	case <-s.drained.Done():
		return statusOf(s.Context(), &broker.Error{Reason: secret.ShuttingDown, Message: "this broker is shutting down; try again, at another one if there is one"})
	}
}

func decideUnary(g *gate) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if err := g.admit(callFrom(ctx), info.FullMethod); err != nil {
			return nil, g.fail(ctx, err)
		}
		resp, err := handler(ctx, req)
		if _, ours := methods[info.FullMethod]; err != nil && ours {
			return nil, g.fail(ctx, err)
		}
		return resp, err // gRPC's own services answer with gRPC's own errors
	}
}

func decideStream(g *gate) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		if err := g.admit(callFrom(stream.Context()), info.FullMethod); err != nil {
			return g.fail(stream.Context(), err)
		}
		return handler(srv, stream)
	}
}

// level is how loud a call's line is: what an operator has to look at is a
// warning, what only its caller has to look at is not.
func level(code codes.Code) logging.Level {
	switch code {
	case codes.OK:
		return logging.LevelDebug
	case codes.Unauthenticated, codes.PermissionDenied, codes.ResourceExhausted, codes.Unavailable, codes.DeadlineExceeded:
		return logging.LevelWarn
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return logging.LevelError
	}
	return logging.LevelInfo
}

func logger(log *slog.Logger) logging.Logger {
	return logging.LoggerFunc(func(ctx context.Context, level logging.Level, msg string, fields ...any) {
		log.Log(ctx, slog.Level(level), msg, fields...)
	})
}
