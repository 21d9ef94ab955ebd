package client

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/exto/secrets-broker/secret"
)

const (
	// The pause before another attempt is random up to a bound that begins with
	// firstPause and doubles to longestPause.
	firstPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
	// retriesPerSecond bounds what all calls of a Client add to the load of a broker
	// in trouble. Beyond it calls wait for their turn, or end if that comes too late.
	retriesPerSecond = 10
)

// retryable reports whether the same call may be made again and might then have
// another end. The table is in docs/client.md.
func (e *Error) retryable() bool {
	if e.CommitState == secret.Applied {
		return false
	}
	switch e.Code {
	case codes.Unavailable:
		return true
	case codes.ResourceExhausted: // without the advice a retry would meet the same limit
		return e.RetryAfter > 0
	case codes.Internal, codes.Unknown: // what the request id is for
		return e.CommitState == secret.Unknown
	case codes.DeadlineExceeded, codes.Canceled: // the broker's, not this side's
		return e.CommitState == secret.Unknown && e.Reason != ""
	}
	return false
}

// followUnknown keeps what an attempt of unknown outcome leaves open: a refusal
// for which the broker did not look at the request id says nothing of that one.
func (e *Error) followUnknown() {
	switch e.Code {
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition:
		return
	}
	if e.CommitState == secret.NotApplied {
		e.CommitState = secret.Unknown
		e.Message += "; an attempt before it may have happened (commit_state UNKNOWN)"
	}
}

// pause waits before the next attempt, never less than after. It reports whether
// there can be one: not when the deadline of ctx comes first.
func (c *Client) pause(ctx context.Context, attempt int, after time.Duration) bool {
	turn := c.retries.Reserve()
	if !turn.OK() {
		return false
	}
	jitter := min(firstPause<<min(attempt, 10), longestPause)
	wait := max(after+rand.N(max(jitter, after/2)), turn.Delay())
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= wait {
		turn.Cancel()
		return false
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	case <-c.ctx.Done(): // the next attempt says so
	}
	return true
}

func contextStatus(ctx context.Context) error { return status.FromContextError(ctx.Err()).Err() }
