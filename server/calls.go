package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	middleware "github.com/grpc-ecosystem/go-grpc-middleware/v2"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"google.golang.org/grpc"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/authz"
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
	action  authz.Permission // none for grpc.health.v1
	health  bool             // of grpc.health.v1
	ours    bool             // a method of the broker's own service
	write   bool             // its errors say whether it happened
	begun   time.Time
	*connection
	// What its record says of it, once that is known.
	key                secret.Key
	instance           secret.InstanceID // of a list
	requestID, version string
	generation         int64
	match              bool // of a VerifyToken
	concluded          bool
	untold             bool // a refusal beyond those that have a line of their own
	intended, replayed atomic.Bool
	under              *snapshot                    // by which it was admitted
	watched            atomic.Pointer[[]secret.Key] // of a watch, once its request is read
	overQuota          error                        // of a VerifyToken that only a token that matches passes
	crowded            bool                         // for all that its caller has under way
}

// An audit id is made for every call, and need not be secret: the random bytes of
// several are read at once.
func init() { uuid.EnableRandPool() }

// healthPrefix begins the methods of grpc.health.v1.
const healthPrefix = "/grpc.health.v1.Health/"

type callKey struct{}

// callFrom is the call that ctx belongs to; every handler's context has one.
func callFrom(ctx context.Context) *call { return ctx.Value(callKey{}).(*call) }

// gave notes which version a call was answered with.
func (c *call) gave(version string, generation int64) { c.version, c.generation = version, generation }

// chain is the way of every call, outermost first: metrics, how long it may take and its
// line in the log, recovery, decision and record. A refusal is thereby counted and logged
// like an answer.
func chain(metrics callMetrics, log *slog.Logger, g *gate, refusals *refusals, drained context.Context) []grpc.ServerOption {
	recovered := recovery.WithRecoveryHandlerContext(func(ctx context.Context, p any) error {
		// The type alone: the text of a panic may hold anything.
		log.ErrorContext(ctx, "panic in a call", "audit_id", callFrom(ctx).auditID, "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
		return statusOf(ctx, &broker.Error{Reason: secret.Defect, Commit: secret.Unknown})
	})
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(
			interceptors.UnaryServerInterceptor(metrics),
			beginUnary(log),
			recovery.UnaryServerInterceptor(recovered),
			decideUnary(g),
		),
		grpc.ChainStreamInterceptor(
			refuseUnknown(refusals),
			interceptors.StreamServerInterceptor(metrics),
			beginStream(log, drained),
			recovery.StreamServerInterceptor(recovered),
			decideStream(g),
		),
	}
}

// begin makes the call that everything else goes by: for a unary one before its request
// is read, for a stream before it is judged.
func begin(ctx context.Context, method string) (context.Context, *call) {
	c := &call{auditID: uuid.NewString(), begun: time.Now(), connection: connectionOf(ctx)}
	m, ours := methods[method]
	c.action, c.write, c.ours, c.health = m.permission, m.write, ours, strings.HasPrefix(method, healthPrefix)
	if strings.HasPrefix(method, "/grpc.reflection.") || strings.HasPrefix(method, "/grpc.channelz.") {
		c.action = authz.Debug
	}
	return context.WithValue(ctx, callKey{}, c), c
}

func beginUnary(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if _, ok := ctx.Deadline(); !ok {
			timeout := readTimeout
			if callFrom(ctx).write {
				timeout = writeTimeout
			}
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, timeout)
			defer cancel()
		}
		resp, err := handler(ctx, req)
		logCall(ctx, log, info.FullMethod, err)
		return resp, err
	}
}

// beginStream gives streams no deadline; the beginning of a shutdown ends them.
func beginStream(log *slog.Logger, drained context.Context) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		ctx, _ := begin(stream.Context(), info.FullMethod)
		ctx, end := context.WithCancelCause(ctx)
		defer end(nil)
		defer context.AfterFunc(drained, func() { end(errShuttingDown()) })()
		err := handler(srv, &middleware.WrappedServerStream{ServerStream: stream, WrappedContext: ctx})
		logCall(ctx, log, info.FullMethod, err)
		return err
	}
}

func errShuttingDown() error {
	return &broker.Error{Reason: secret.ShuttingDown, Message: "this broker is shutting down; try again, at another one if there is one"}
}

// endingStream is a stream on which nobody waits when its context has ended: gRPC's
// own RecvMsg and SendMsg end with the stream alone, and of a client that does not
// read, or says nothing, that is when the handler returns.
type endingStream struct {
	middleware.WrappedServerStream
}

func (s *endingStream) RecvMsg(m any) error {
	return s.orEnd(func() error { return s.ServerStream.RecvMsg(m) })
}

func (s *endingStream) SendMsg(m any) error {
	return s.orEnd(func() error { return s.ServerStream.SendMsg(m) })
}

// orEnd gives what f gives, or why the stream ends. Then f goes on until the handler
// has returned, as it does after an error from here, and nobody looks at m any more.
func (s *endingStream) orEnd(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-s.Context().Done():
		if told := (*broker.Error)(nil); errors.As(context.Cause(s.Context()), &told) {
			return told
		}
		return <-done // gRPC ended the stream itself, and says why
	}
}

// endOf is why a stream ends: what its context was ended for, or err.
func endOf(ctx context.Context, err error) error {
	if told := (*broker.Error)(nil); errors.As(context.Cause(ctx), &told) {
		return told
	}
	return err
}

func decideUnary(g *gate) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		c := callFrom(ctx)
		if err := g.enter(ctx, c, &c.account.calls, g.accounts.calls); err != nil {
			return nil, g.conclude(ctx, c, err)
		}
		defer c.account.calls.Add(-1)
		if c.write {
			c.writes.Add(1)
			defer c.writes.Add(-1)
			defer g.accounts.holdWrite(c, req)()
		}
		defer g.concludePanic(ctx, c)
		resp, err := handler(ctx, req)
		var answer *encoded
		if err == nil {
			answer, err = encode(resp)
		}
		if err := g.conclude(ctx, c, err); err != nil {
			answer.free()
			return nil, err
		}
		return answer, nil
	}
}

// concludePanic is deferred, and records a call that panics: nobody has concluded it then.
// What its caller is told is for the recovery.
func (g *gate) concludePanic(ctx context.Context, c *call) {
	if !c.concluded {
		_ = g.conclude(ctx, c, &broker.Error{Reason: secret.Defect, Commit: secret.Unknown})
	}
}

// judgeEvery is how often it is asked whether a stream may go on, beside whenever
// another snapshot is in force: certificates expire by themselves.
const judgeEvery = 2 * time.Second

// decideStream judges a stream at its beginning and as long as it lasts.
func decideStream(g *gate) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		c := callFrom(stream.Context())
		if err := g.enter(stream.Context(), c, &c.account.streams, g.accounts.streams); err != nil {
			return g.conclude(stream.Context(), c, err)
		}
		defer c.account.streams.Add(-1)
		ctx, end := context.WithCancelCause(stream.Context())
		defer end(nil)
		go func() { end(g.judgeOn(ctx, c)) }()
		if c.action == authz.Debug {
			if err := g.opened(ctx, c); err != nil {
				return g.fail(stream.Context(), err)
			}
		}
		defer g.concludePanic(stream.Context(), c)
		return g.conclude(stream.Context(), c, endOf(ctx, handler(srv, &endingStream{middleware.WrappedServerStream{ServerStream: stream, WrappedContext: ctx}})))
	}
}

// judgeOn waits until a stream may not go on, and gives why; nil when it ended before.
func (g *gate) judgeOn(ctx context.Context, c *call) error {
	again := time.NewTicker(judgeEvery)
	defer again.Stop()
	var last *snapshot
	for {
		now := g.trust.now.Load()
		err := g.judge(c, now)
		if err == nil && now != last {
			err = g.judgeWatch(c, now)
		}
		if err != nil {
			return err
		}
		last = now
		select {
		case <-again.C:
		case <-now.replaced:
		case <-ctx.Done():
			return nil
		}
	}
}
