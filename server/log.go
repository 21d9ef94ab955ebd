package server

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// The line of each call is written here rather than by the middleware's logging:
// that makes its fields before it asks whether the line is wanted, which costs a Get
// from memory as much as all else that the broker does for it.

func logUnary(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		begun := time.Now()
		resp, err := handler(ctx, req)
		logCall(ctx, log, info.FullMethod, begun, err)
		return resp, err
	}
}

func logStream(log *slog.Logger) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		begun := time.Now()
		err := handler(srv, stream)
		logCall(stream.Context(), log, info.FullMethod, begun, err)
		return err
	}
}

// logCall writes a call's line: never its payload.
func logCall(ctx context.Context, log *slog.Logger, fullMethod string, begun time.Time, err error) {
	code := status.Code(err)
	level := levelOf(code)
	service, method, _ := strings.Cut(strings.TrimPrefix(fullMethod, "/"), "/")
	// Health checks come every few seconds from every client.
	if service == healthpb.Health_ServiceDesc.ServiceName || !log.Enabled(ctx, level) {
		return
	}
	c := callFrom(ctx)
	attrs := []slog.Attr{
		slog.String("grpc.service", service),
		slog.String("grpc.method", method),
		slog.String("audit_id", c.auditID),
		slog.String("caller", c.caller.name()),
		slog.String("grpc.code", code.String()),
		slog.Float64("grpc.time_ms", float64(time.Since(begun).Microseconds())/1000),
	}
	if p, ok := peer.FromContext(ctx); ok {
		attrs = append(attrs, slog.String("peer.address", p.Addr.String()))
	}
	if err != nil {
		attrs = append(attrs, slog.String("grpc.error", err.Error()))
	}
	log.LogAttrs(ctx, level, "finished call", attrs...)
}

// levelOf is how loud a call's line is: what an operator has to look at is a
// warning, what only its caller has to look at is not.
func levelOf(code codes.Code) slog.Level {
	switch code {
	case codes.OK:
		return slog.LevelDebug
	case codes.Unauthenticated, codes.PermissionDenied, codes.ResourceExhausted, codes.Unavailable, codes.DeadlineExceeded:
		return slog.LevelWarn
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return slog.LevelError
	}
	return slog.LevelInfo
}
