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
	if err := l.count(key); err != nil {
		return l.refused(err)
	}
	return nil
}

func (l *Log) count(key countKey) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch _, known := l.counts[key]; {
	case l.closed:
		return errClosed
	case l.hanging(&l.writeFrom):
		return errHanging
	case l.writes.is.Load():
		return errDown
	case !known && len(l.counts) >= maxCounts:
		return errFull
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
