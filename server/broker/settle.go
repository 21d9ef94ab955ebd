package broker

import (
	"context"
	"errors"
	"time"

	"github.com/exto/secrets-broker/server/vault"
)

// carried is ctx for what goes on when the caller's patience is at its end.
func carried(ctx context.Context) context.Context {
	o := vault.OriginOf(ctx)
	o.Patience = time.Time{}
	return vault.WithOrigin(ctx, o)
}

// settle makes a vault write until its outcome is known. After one of unknown
// outcome landed tells whether it is there; if not, it is made again, by the
// context's end. What the vault refuses for a time is made again as long as the
// caller waits.
func (b *Broker) settle(ctx context.Context, op *operation, write func(context.Context) error, landed func(context.Context) (bool, error)) error {
	pauses := vault.NewPauses(firstPause, longestPause)
	if op.begun {
		ctx = carried(ctx)
	}
	var doubt error
	for {
		err := write(ctx)
		again := vault.IsUncertain(err)
		switch {
		case err == nil:
			op.begun = true
			return nil
		case again:
			doubt = err
			ctx = carried(ctx)
		case errors.Is(err, vault.ErrThrottled) && op.phase.Load() == started:
			again = true
		case doubt == nil:
			return err
		}
		there, lookErr := landed(ctx)
		for lookErr != nil && doubt != nil && vault.Pause(ctx, b.wait, max(pauses.NextBackOff(), vault.RetryAfter(lookErr))) {
			there, lookErr = landed(ctx)
		}
		switch {
		case there:
			op.begun = true
			return nil
		case lookErr != nil && doubt != nil:
			return doubt
		case !again: // refused now, after one that may have been done
			return vault.Uncertain(err)
		case !vault.Pause(ctx, b.wait, max(pauses.NextBackOff(), vault.RetryAfter(err))):
			if doubt != nil {
				return doubt
			}
			return err
		}
	}
}
