package vault

import (
	"context"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// Origin says on whose behalf a vault is called. It travels in the context; the
// zero Origin is the broker itself.
type Origin struct {
	// Caller is who takes turns with the others when the vault takes few
	// requests.
	Caller string
	// RequestID is what the vault's own log is to show for the request, at most
	// 36 letters, digits and hyphens.
	RequestID string
	// Patience is until when a request may wait for its turn; zero: as long as
	// its context.
	Patience time.Time
	// Effect, unless nil, is called before each request that changes the vault.
	// When it fails, the request is not sent, and the method ends with its error.
	Effect func() error
}

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

type originKey struct{}

// WithOrigin is ctx for calls on behalf of o.
func WithOrigin(ctx context.Context, o Origin) context.Context {
	return context.WithValue(ctx, originKey{}, o)
}

// OriginOf is on whose behalf calls with ctx are made.
func OriginOf(ctx context.Context) Origin {
	o, _ := ctx.Value(originKey{}).(Origin)
	return o
}

// BeginEffect is what every vault calls before it sends or does what changes it:
// after an error nothing is sent.
func BeginEffect(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if o := OriginOf(ctx); o.Effect != nil {
		return o.Effect()
	}
	return nil
}
