package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"runtime"
	"slices"
	"sync/atomic"
	"time"
)

// writer is what only the goroutine that writes touches, once the log is open.
type writer struct {
	out    io.Writer // the file, or the stream
	chain  string
	seq    int64 // of the last line
	head   hash  // of the last line
	size   int64 // of the file
	begun  int64 // size of the file when it had only what it begins with
	logged int64 // sequence of the head that was logged last
	ticks  int
	looked time.Duration // since started, for room
	roomy  bool          // as it was found then

	// A piece of a line that can't be cut off again, as on a stream, is ended with
	// a newline and recorded with its length and hash.
	unended bool
	torn    []*entry // pieces not recorded yet; they come before all else

	moved   bool // the path does not hold the file any more
	rotates outage

	owes   bool  // a resumed line, since there was an outage
	missed int64 // how many were refused in it
	told   int64 // how many the resumed line on its way says

	batch    []*entry
	spare    []*entry
	buf      []byte
	ends     []int // of the lines in buf
	closeErr error

	fileSize atomic.Int64 // size, for the metric
}

// writeAll writes whatever waits, until the log is closed. There is no timer
// between a record and its write: a lone one waits for nobody, and all who come
// during a write share the next. The tick is for what nobody waits for.
func (l *Log) writeAll() error {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	late := time.AfterFunc(long, l.takesLong)
	defer late.Stop()
	for {
		late.Stop()
		select {
		case <-l.wake:
			late.Reset(long)
			runtime.Gosched() // whoever is ready to come shares the write
		case <-l.reopen:
			late.Reset(long)
			l.checkPath()
		case <-ticker.C:
			late.Reset(long)
			l.checkPath()
			l.takeCounts()
			if l.ticks++; l.ticks%headEvery == 0 {
				l.logHead()
			}
		}
		l.mu.Lock()
		closed := l.closed
		l.mu.Unlock()
		if closed {
			l.takeCounts()
		}
		// On a tick too: an outage ends although nobody comes.
		err := l.flush()
		if closed {
			l.mu.Lock()
			waiting := len(l.kept)
			l.mu.Unlock()
			if waiting > 0 {
				l.log.Warn("the audit log is closed without some outcomes, which the next start finds out", "path", l.cfg.Path, "outcomes", waiting)
			}
			return err
		}
	}
}

// flush writes all that waits with one write, and answers.
func (l *Log) flush() error {
	size := l.take()
	defer l.tell()
	if len(l.batch) == 0 && !l.moved {
		return nil
	}
	l.writeFrom.Store(max(1, int64(time.Since(l.started))))
	wrote, piece, err := 0, (*entry)(nil), l.place(size)
	if err == nil {
		wrote, piece, err = l.writeBatch()
	}
	l.foresee(err)
	l.writeFrom.Store(0)
	if err != nil {
		l.metrics.failures.Inc()
		l.writes.fall(err)
		err = unavailable(err)
	}
	if piece = l.answer(wrote, err, piece); piece != nil {
		l.torn = append(l.torn, piece)
	}
	switch {
	case err != nil:
		l.owes = true
	case l.writes.is.Load():
		l.missed += l.writes.back()
		// When it only hung, or more were refused during the write, the line that tells of
		// them is still to be written.
		if l.owes = l.missed > 0; l.owes {
			l.poke()
		}
	}
	return err
}

// tell is for when it is known what became of what was taken.
func (l *Log) tell() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slow = false
	if l.now != nil {
		l.settled.Store(l.now.number)
		l.now.end()
		l.now = nil
	}
}

// takesLong is for when the writer is at it for long.
func (l *Log) takesLong() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slow = true
	l.now.takesLong()
	l.next.takesLong()
}

// take makes the batch of what waits, and gives how many bytes it will have at most.
func (l *Log) take() (size int) {
	l.batch = append(l.batch[:0], l.torn...)
	l.torn = nil
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.owes {
		l.told = l.missed + l.writes.refused.Load()
		e := l.entry(TypeSystem, &Record{Action: actionResumed, Count: l.told, Detail: "the log could not be written, and so many records were refused"})
		e.resume, e.own = true, true
		l.batch = append(l.batch, e)
	}
	l.batch = append(l.batch, l.kept...)
	l.kept = nil
	for _, e := range l.queue {
		if e.gone && !e.keep {
			e.state = finished // as if it had never come
			continue
		}
		l.batch = append(l.batch, e)
	}
	for _, e := range l.batch {
		e.state = taken
		size += len(e.body) + len(lineStart) + 20 + tailLen
	}
	l.queue, l.spare = l.spare[:0], l.queue
	l.queued = 0
	l.now, l.next = l.next, nil
	return size
}

// writeBatch writes the batch. When that fails, what was written of it is cut off
// again. Where that is impossible, the lines that are whole stay, and piece is the
// record of the one that isn't.
func (l *Log) writeBatch() (wrote int, piece *entry, err error) {
	b, ends := l.buf[:0], l.ends[:0]
	if l.unended {
		b = append(b, '\n')
	}
	first := len(b)
	seq, head := l.seq, l.head
	for _, e := range l.batch {
		start := len(b)
		seq++
		b = appendLine(b, seq, e.body, &head)
		head = sha256.Sum256(b[start:])
		b = append(b, '\n')
		ends = append(ends, len(b))
	}
	if l.buf, l.ends = b, ends; cap(b) > maxLine {
		l.buf = nil // an unusual one
	}
	n, err := l.out.Write(b)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) {
		pathErr.Path = l.cfg.Path // which was not its name when it was made
	}
	if err == nil {
		l.advance(seq, head, n)
		return len(ends), nil, nil
	}
	if n <= 0 || l.file != nil && l.file.Truncate(l.size) == nil {
		return 0, nil, err
	}
	last := first
	for ; wrote < len(ends) && ends[wrote]-1 <= n; wrote++ { // whole, if without its newline
		head = sha256.Sum256(b[last : ends[wrote]-1])
		last = ends[wrote]
	}
	if wrote == 0 {
		head = l.head
	}
	l.advance(l.seq+int64(wrote), head, n)
	l.unended = n != last
	if n > last {
		piece = l.tornEntry(int64(n-last), sha256.Sum256(b[last:n]))
	}
	return wrote, piece, err
}

func (l *Log) advance(seq int64, head hash, n int) {
	l.seq, l.head, l.unended = seq, head, false
	l.size += int64(n)
	l.fileSize.Store(l.size)
}

func (l *Log) tornEntry(length int64, sum hash) *entry {
	e := l.entry(TypeSystem, &Record{
		Action: actionTorn, Bytes: length, SHA256: hex.EncodeToString(sum[:]),
		Detail: "a write was interrupted in the middle of a line; this is the length and the hash of the piece",
	})
	e.torn, e.own = true, true
	return e
}

// answer gives the first entries of the batch their success, the others err, and
// keeps what must not be lost. It gives piece back.
func (l *Log) answer(wrote int, err error, piece *entry) *entry {
	l.mu.Lock()
	var kept []*entry
	syncs := len(l.retired) > 0
	for i, e := range l.batch {
		e.state = finished
		if i < wrote {
			e.err = nil
			l.metrics.record(e.kind)
			if l.written(e) {
				syncs = true
			}
			if e.holder != nil {
				e.holder = nil
				l.pool.Put(e)
			}
			continue
		}
		e.err = err
		switch {
		case e.torn:
			l.torn = append(l.torn, e)
		case e.count != nil:
			l.counts[e.count.key] += e.count.n
		case e.keep:
			kept = l.keepOutcome(kept, e)
		}
		if !e.own {
			l.writes.refused.Add(1)
		}
		if e.synced != nil {
			close(e.synced)
		}
		if e.holder != nil {
			e.holder.Unrecorded()
		}
	}
	l.kept = append(kept, l.kept...)
	l.mu.Unlock()
	if wrote > 0 {
		l.metrics.batches.Inc()
	}
	if syncs {
		select {
		case l.syncWake <- struct{}{}:
		default:
		}
	}
	return piece
}

// written sees to what follows from a line that was written. It reports whether
// somebody waits for an fsync. The caller holds mu.
func (l *Log) written(e *entry) bool {
	switch {
	case e.resume:
		l.owes = false
		l.missed -= l.told // and what is still counted as refused is so twice then
	case e.kind == TypeIntent:
		l.open[idOf(e.body)] = bytes.Clone(e.body)
		if e.synced != nil {
			e.state = taken
			l.syncing = append(l.syncing, e)
			return true
		}
		if e.gone {
			l.closeIntent(e)
			l.poke()
		}
	case e.kind == TypeOutcome && lineCloses(e.body):
		delete(l.open, idOf(e.body))
	}
	return false
}

// syncAll makes intents durable, until the log is closed. All who wait when an
// fsync begins share it, and it holds up no write.
func (l *Log) syncAll() {
	for range l.syncWake {
		runtime.Gosched()
		l.sync()
	}
	l.sync()
}

func (l *Log) sync() {
	l.mu.Lock()
	waiting, retired, f, made := l.syncing, l.retired, l.file, l.made
	l.syncing, l.retired, l.made = nil, nil, false
	l.mu.Unlock()
	if f == nil {
		return
	}
	l.syncFrom.Store(max(1, int64(time.Since(l.started))))
	err := l.syncFiles(retired, f, made)
	l.syncFrom.Store(0)
	l.metrics.fsyncs.Inc()
	if err != nil {
		l.metrics.failures.Inc()
		l.syncs.fall(err)
		err = unavailable(err)
	} else {
		l.syncs.back()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.made = l.made || made && err != nil
	for _, e := range waiting {
		e.state, e.err = finished, err
		if err != nil || e.gone {
			l.syncs.refused.Add(1)
			l.closeIntent(e)
			l.poke()
		}
		close(e.synced)
	}
}

// recordOf reads a body back.
func recordOf(body []byte) (r Record) {
	b := slices.Clone(body)
	b[0] = '{'
	_ = json.Unmarshal(append(b, '}'), &r) // appendBody made it, or a line with a good checksum holds it
	return r
}
