package direct

import "time"

// SetNow sets the clock by which v judges whether a grace is over.
func SetNow(v *Vault, now func() time.Time) { v.now = now }
