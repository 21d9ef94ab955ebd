package vault

import (
	"context"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// Until is until when a call with ctx may wait: the earlier of the origin's
// patience and the deadline of ctx, and a little less, so that the caller hears
// why. False when neither is set.
func Until(ctx context.Context) (time.Time, bool) {
	until := OriginOf(ctx).Patience
	if deadline, ok := ctx.Deadline(); ok && (until.IsZero() || deadline.Before(until)) {
		until = deadline
	}
	if until.IsZero() {
		return until, false
	}
	return until.Add(-min(100*time.Millisecond, time.Until(until)/10)), true
}

// Pause lets d pass by wait. It is false, at once, when that would be longer than
// a call with ctx may wait, and when ctx ends meanwhile.
func Pause(ctx context.Context, wait func(context.Context, time.Duration) error, d time.Duration) bool {
	if until, ok := Until(ctx); ok && time.Until(until) < d {
		return false
	}
	return wait(ctx, d) == nil
}

// Wait lets time pass until ctx ends.
func Wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// NewPauses are the waits between tries: jittered, from first on half as long
// again each time, up to longest.
func NewPauses(first, longest time.Duration) *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = first, longest
	return b
}
