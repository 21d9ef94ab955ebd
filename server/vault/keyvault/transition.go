package keyvault

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"
	"github.com/cenkalti/backoff/v5"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// invisible is how long a name that was deleted here is taken for deleted though
// the vault does not show it among the deleted yet; that takes 10 to 19 s.
const invisible = 30 * time.Second

// vanished is a name that was deleted here a moment ago.
type vanished struct {
	vault.Deleted
	at time.Time
}

func (v *Vault) vanish(key secret.Key, d vault.Deleted) {
	now := v.cfg.Now()
	v.mu.Lock()
	defer v.mu.Unlock()
	for k, old := range v.gone {
		if now.Sub(old.at) > invisible {
			delete(v.gone, k)
		}
	}
	d.Tags = d.Tags.Clone()
	v.gone[key] = vanished{d, now}
}

func (v *Vault) seenLive(key secret.Key) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.gone, key)
}

func (v *Vault) vanished(key secret.Key) (vault.Deleted, bool) {
	now := v.cfg.Now()
	v.mu.Lock()
	defer v.mu.Unlock()
	d, ok := v.gone[key]
	d.Tags = d.Tags.Clone()
	return d.Deleted, ok && now.Sub(d.at) <= invisible
}

// isGone looks whether a name is deleted, where the vault said only that it
// cannot do what it was asked.
func (v *Vault) isGone(ctx context.Context, key secret.Key) (bool, error) {
	_, _, err := v.Get(ctx, key, "")
	if !errors.Is(err, vault.ErrNotFound) {
		return false, err
	}
	_, err = v.getDeleted(ctx, key)
	return err == nil, err
}

const settleOp = "Settle"

// transition is the wait for the end of a state between. Azure promises no time for
// it; 10 to 60 s were seen, and nobody waits longer than mostTransition.
type transition struct {
	v      *Vault
	until  time.Time
	pauses *backoff.ExponentialBackOff
}

const mostTransition = 5 * time.Minute

func (v *Vault) newTransition() *transition {
	return &transition{v, v.cfg.Now().Add(mostTransition), vault.NewPauses(firstPause, longestPause)}
}

// pause lets time pass before the next look. False when it has taken too long.
func (t *transition) pause(ctx context.Context) bool {
	return t.v.cfg.Now().Before(t.until) && t.v.pause(ctx, t.pauses.NextBackOff())
}

// Settle asks with a PATCH that changes nothing: only what changes something is
// told by the vault that a name is being deleted or recovered.
func (v *Vault) Settle(ctx context.Context, key secret.Key) error {
	waiting := v.newTransition()
	for {
		err := v.again(ctx, func() error {
			return v.do(ctx, &call{op: settleOp, change: true}, func(ctx context.Context) error {
				_, err := v.client.UpdateSecretProperties(ctx, key.String(), "", azsecrets.UpdateSecretPropertiesParameters{}, nil)
				return err
			})
		})
		var conflict *conflictError
		switch {
		case err == nil:
			v.seenLive(key)
			return nil
		case errors.Is(err, vault.ErrNotFound):
			// Not live. It may have become visible among the deleted meanwhile.
			_, err := v.getDeleted(ctx, key)
			if errors.Is(err, vault.ErrNotFound) {
				v.seenLive(key) // neither is it what was deleted here
			}
			return err
		case !errors.As(err, &conflict):
			return certain(err)
		}
		if _, err := v.getDeleted(ctx, key); err == nil {
			return nil
		}
		if !waiting.pause(ctx) {
			return v.impatient(ctx, err)
		}
	}
}

// Recover asks for the name back, when it is in no state between, and waits until
// the vault gives it again.
func (v *Vault) Recover(ctx context.Context, key secret.Key) error {
	waiting := v.newTransition()
	for {
		err := v.do(ctx, &call{op: "Recover", change: true}, func(ctx context.Context) error {
			_, err := v.client.RecoverDeletedSecret(ctx, key.String(), nil)
			return err
		})
		var conflict *conflictError
		switch {
		case err == nil, errors.As(err, &conflict) && conflict.inner == innerBeingRecovered:
			return v.usable(ctx, key)
		case errors.Is(err, vault.ErrNotFound):
			// Live, or absent, or in a state between.
			if settled := v.Settle(ctx, key); settled != nil {
				return settled
			}
			if live, lookErr := v.isLive(ctx, key); live {
				return err
			} else if lookErr != nil {
				return lookErr
			}
		case conflict == nil:
			return err
		}
		if !waiting.pause(ctx) {
			return v.impatient(ctx, err)
		}
	}
}

// usable waits until a recovered name is found again. What changes it waits for
// the rest itself.
func (v *Vault) usable(ctx context.Context, key secret.Key) error {
	waiting := v.newTransition()
	for {
		live, err := v.isLive(ctx, key)
		if live {
			return nil
		}
		if err != nil && !errors.Is(err, vault.ErrUnavailable) && !errors.Is(err, vault.ErrThrottled) {
			return vault.Uncertain(err)
		}
		if !waiting.pause(ctx) {
			return vault.Uncertain(v.impatient(ctx, err))
		}
	}
}

func (v *Vault) isLive(ctx context.Context, key secret.Key) (bool, error) {
	_, _, err := v.Get(ctx, key, "")
	switch {
	case err == nil, errors.Is(err, vault.ErrDisabled):
		return true, nil
	case errors.Is(err, vault.ErrNotFound):
		return false, nil
	}
	return false, err
}

// impatient is how a wait ends that took too long.
func (v *Vault) impatient(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, vault.ErrThrottled), errors.Is(err, vault.ErrUnavailable):
		return err
	}
	return fmt.Errorf("%w: the secret is still being deleted or recovered", vault.ErrUnavailable)
}

// certain takes the doubt from the error of a request that changes nothing.
func certain(err error) error {
	if vault.IsUncertain(err) {
		return errors.Unwrap(err)
	}
	return err
}
