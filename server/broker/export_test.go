package broker

import "time"

// SetFirstTry is how long one look for a watch that begins may take.
func (b *Broker) SetFirstTry(d time.Duration) { b.firstTry = d }
