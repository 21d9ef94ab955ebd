package audit

import (
	"log/slog"
	"sync/atomic"
)

// outage logs one error at the fall and one line at the return.
type outage struct {
	log            *slog.Logger
	path, down, up string
	is             atomic.Bool
	refused        atomic.Int64
}

func (o *outage) fall(err error) {
	if o.is.CompareAndSwap(false, true) {
		o.log.Error(o.down, "path", o.path, "error", err)
	}
}

// back gives how many records were refused.
func (o *outage) back() (refused int64) {
	if o.is.Load() && o.is.CompareAndSwap(true, false) {
		refused = o.refused.Swap(0)
		o.log.Info(o.up, "path", o.path, "refused", refused)
	}
	return refused
}
