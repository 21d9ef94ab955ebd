package client

import (
	"time"

	"golang.org/x/time/rate"
)

// NoRetries makes every call of c end with its first attempt.
func NoRetries(c *Client) { c.retries = rate.NewLimiter(0, 0) }

// NoRetryBudget lets c retry as often as it wants.
func NoRetryBudget(c *Client) { c.retries = rate.NewLimiter(rate.Inf, 0) }

// WaitForFiles returns once c has looked at its files, begun after the call.
func WaitForFiles(c *Client) {
	begin := time.Now()
	for {
		c.files.mu.Lock()
		looked := c.files.checked.After(begin)
		c.files.mu.Unlock()
		if looked {
			return
		}
		pause(c.ctx, 10*time.Millisecond)
	}
}
