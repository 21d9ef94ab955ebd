package client

import "golang.org/x/time/rate"

// NoRetries makes every call of c end with its first attempt.
func NoRetries(c *Client) { c.retries = rate.NewLimiter(0, 0) }

// NoRetryBudget lets c retry as often as it wants.
func NoRetryBudget(c *Client) { c.retries = rate.NewLimiter(rate.Inf, 0) }
