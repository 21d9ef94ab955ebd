package server

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// The line of each call is written here rather than by the middleware's logging:
// that makes its fields before it asks whether the line is wanted, which costs a Get
// from memory as much as all else that the broker does for it.

// logCall writes a call's line: never its payload.
func logCall(ctx context.Context, log *slog.Logger, fullMethod string, err error) {
	code := status.Code(err)
	level := levelOf(code)
	c := callFrom(ctx)
	// Health checks come every few seconds from every client.
	if c.health || !log.Enabled(ctx, level) || c.untold {
		return
	}
	service, method, _ := strings.Cut(strings.TrimPrefix(fullMethod, "/"), "/")
	attrs := []slog.Attr{
		slog.String("grpc.service", service),
		slog.String("grpc.method", method),
		slog.String("audit_id", c.auditID),
		slog.String("caller", c.caller.name()),
		slog.String("grpc.code", code.String()),
		slog.Float64("grpc.time_ms", float64(time.Since(c.begun).Microseconds())/1000),
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
