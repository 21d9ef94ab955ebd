package keyvault

import (
	"context"
	"testing"
	"time"

	"github.com/exto/secrets-broker/server/vault"
)

// TestTriesAreCountedByFailure: having been throttled before leads to neither more
// nor fewer tries.
func TestTriesAreCountedByFailure(t *testing.T) {
	t.Parallel()
	v := &Vault{cfg: Config{Wait: func(context.Context, time.Duration) error { return nil }}}
	for throttled := range 6 {
		asked := 0
		err := v.again(t.Context(), func() error {
			if asked++; asked <= throttled {
				return vault.ErrThrottled
			}
			if asked > 100 {
				return nil
			}
			return vault.ErrUnavailable
		})
		if want := throttled + readTries; err != vault.ErrUnavailable || asked != want {
			t.Errorf("throttled %d times: got %v after %d tries, want ErrUnavailable after %d", throttled, err, asked, want)
		}
	}
}
