package audit

// countKey is what calls have in common that are counted together.
type countKey struct{ caller, serial, action, decision, code, reason string }

type counted struct {
	key countKey
	n   int64
}

// maxCounts bounds the kinds of calls that are counted at the same time.
const maxCounts = 4096

// Count counts a call together with the others of this second that have its
// caller, serial, action, decision, code and reason; a kill loses the second. It
// gives ErrUnavailable at once while the log can't be written.
func (l *Log) Count(r *Record) error {
	key := countKey{r.Caller, r.Serial, r.Action, r.Decision, r.Code, r.Reason}
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	switch _, known := l.counts[key]; {
	case l.closed:
		err = errClosed
	case l.writes.is.Load():
		err = errDown
	case l.hanging(&l.writeFrom):
		err = errHanging
		l.writes.fall(err)
	case !known && len(l.counts) >= maxCounts:
		err = errFull
		l.poke()
	}
	if err != nil {
		l.writes.refused.Add(1)
		return unavailable(err)
	}
	l.counts[key]++
	return nil
}

// takeCounts queues what was counted.
func (l *Log) takeCounts() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, n := range l.counts {
		e := l.entry(TypeCount, &Record{
			Caller: key.caller, Serial: key.serial, Action: key.action, Decision: key.decision, Code: key.code, Reason: key.reason, Count: n,
		})
		e.count, e.own = &counted{key, n}, true
		l.queue = append(l.queue, e)
		l.queued += len(e.body)
	}
	clear(l.counts)
}
