package vault

import (
	"context"
	"time"
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
	// Priority says who goes first when the vault takes few requests.
	Priority Priority
	// Waits, unless nil, is called when a request has to wait for its turn, and Sends
	// right before each time that a request is sent. A vault without a limit calls
	// neither. They must not block.
	Waits, Sends func()
}

// Priority orders the requests that wait for their turn: a greater one goes
// first, though not so that a lesser one waits for good.
type Priority int

const (
	// Rest is the zero value: writes, descriptions, lists, watches.
	Rest Priority = iota
	// Reading asks for a value.
	Reading
	// Verifying is to verify a token, of an instance that may be made up.
	Verifying
	// VerifyingKnown is to verify a token of an instance that was seen before.
	VerifyingKnown
)

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
