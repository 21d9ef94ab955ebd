package keyvaultfake

import (
	"net/http"
	"time"
)

// Limits of the requests in any Window, by the fake's clock.
type Limits struct {
	Creates    int           // of SetSecret; 0: no limit
	Others     int           // of everything else, requests without a token too; 0: no limit
	Window     time.Duration // 0: 10 s
	RetryAfter time.Duration // sent with a 429; 0: not sent
}

// DefaultLimits are those of a vault. Its 429 has no Retry-After.
func DefaultLimits() *Limits {
	return &Limits{Creates: 300, Others: 4000, Window: 10 * time.Second}
}

var throttled = failure{http.StatusTooManyRequests, "Throttled", "",
	"Request was not processed because too many requests were received. Reason: VaultRequestTypeLimitReached"}

// throttle counts requests in a sliding window.
type throttle struct {
	Limits
	creates, others []time.Time // of those that passed, in order
}

// allow says whether one more passes. Those that do not are not counted.
func (t *throttle) allow(create bool, now time.Time) bool {
	passed, limit := &t.others, t.Others
	if create {
		passed, limit = &t.creates, t.Creates
	}
	if limit == 0 {
		return true
	}
	for len(*passed) > 0 && now.Sub((*passed)[0]) >= t.Window {
		*passed = (*passed)[1:]
	}
	if len(*passed) >= limit {
		return false
	}
	*passed = append(*passed, now)
	return true
}
