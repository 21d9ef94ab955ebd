package keyvault

import (
	"context"
	"net/http"
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

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"7":                             7 * time.Second,
		"-7":                            0,
		"61":                            time.Minute,
		"10000000000":                   time.Minute, // overflows in nanoseconds
		"9223372036854775807":           time.Minute,
		"soon":                          0,
		"Mon, 02 Jan 2006 15:04:05 GMT": 0, // gone by
		"Fri, 02 Jan 2999 15:04:05 GMT": time.Minute,
	} {
		resp := &http.Response{Header: http.Header{"Retry-After": {header}}}
		if got := retryAfter(resp); got != want {
			t.Errorf("%q: got %v, want %v", header, got, want)
		}
	}
}
