package server

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"google.golang.org/grpc"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// TestCallWithoutDeadline: a unary call gets 30 s, a write 2 min; one that its
// caller set stays. How long a write would wait for its turn shows nowhere on the
// wire, so that the interceptor itself is asked.
func TestCallWithoutDeadline(t *testing.T) {
	t.Parallel()
	want := map[string]time.Duration{
		secretsv1.SecretsBrokerService_PutSecret_FullMethodName:      2 * time.Minute,
		secretsv1.SecretsBrokerService_RotateSecret_FullMethodName:   2 * time.Minute,
		secretsv1.SecretsBrokerService_DeleteSecret_FullMethodName:   2 * time.Minute,
		secretsv1.SecretsBrokerService_RecoverSecret_FullMethodName:  2 * time.Minute,
		secretsv1.SecretsBrokerService_GetSecret_FullMethodName:      30 * time.Second,
		secretsv1.SecretsBrokerService_DescribeSecret_FullMethodName: 30 * time.Second,
		secretsv1.SecretsBrokerService_ListSecrets_FullMethodName:    30 * time.Second,
	}
	deadlineOf := func(ctx context.Context, method string) time.Time {
		var deadline time.Time
		ctx, _ = begin(ctx, method)
		_, _ = beginUnary(slog.New(slog.DiscardHandler))(ctx, nil, &grpc.UnaryServerInfo{FullMethod: method}, func(ctx context.Context, _ any) (any, error) {
			deadline, _ = ctx.Deadline()
			return nil, nil
		})
		return deadline
	}
	for method, timeout := range want {
		before := time.Now()
		got := deadlineOf(t.Context(), method)
		if after := time.Now(); got.Before(before.Add(timeout)) || got.After(after.Add(timeout)) {
			t.Errorf("%s: got %v from now, want %v", method, got.Sub(before), timeout)
		}
		own := time.Now().Add(time.Hour)
		ctx, cancel := context.WithDeadline(t.Context(), own)
		if got := deadlineOf(ctx, method); !got.Equal(own) {
			t.Errorf("%s: got %v, want the caller's own deadline %v", method, got, own)
		}
		cancel()
	}
}
