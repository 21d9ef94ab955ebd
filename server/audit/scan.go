package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

// found is what a file holds.
type found struct {
	parsed         // the last whole line
	chain   string // of the first line
	end     int64  // where the last whole line ends
	unended bool   // it has no newline
	open    [][]byte
}

// scan reads a file of the log. Only the first and the last whole line are
// checked: audit verify is for the others.
func scan(f *os.File) (found, error) {
	var (
		all   found
		last  int64
		count int64
		open  = map[string]int{}
		lines = newLines(f)
	)
	for {
		b, whole, err := lines.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return all, err
		}
		if !whole {
			if _, bad := parseLine(b); bad != nil {
				break
			}
			all.unended = true
		}
		if count++; count == 1 {
			first, err := parseBegin(b)
			if err != nil {
				return all, fmt.Errorf("line 1 %w; move the file away to begin a new chain", err)
			}
			all.chain = first.Chain
		}
		last, all.end = all.end, lines.offset
		switch typeOf(b) {
		case TypeIntent:
			if id := idOf(b); len(b) > tailLen {
				body := bytes.Clone(bodyOf(b))
				if at, ok := open[id]; ok { // the write found the secret in another state
					all.open[at] = body
				} else {
					open[id] = len(all.open)
					all.open = append(all.open, body)
				}
			}
		case TypeOutcome:
			if id := idOf(b); lineCloses(b) {
				if at, ok := open[id]; ok {
					all.open[at] = nil
					delete(open, id)
				}
			}
		}
	}
	all.open = slices.DeleteFunc(all.open, func(b []byte) bool { return b == nil })
	if count == 0 {
		return all, errors.New("holds no audit log; move the file away to begin one")
	}
	b := make([]byte, all.end-last)
	_, err := f.ReadAt(b, last)
	if err != nil {
		return all, err
	}
	if all.parsed, err = parseLine(bytes.TrimSuffix(b, []byte{'\n'})); err != nil {
		return all, fmt.Errorf("line %d, the last one, %w; see broker audit verify, and move the file away to begin a new chain", count, err)
	}
	return all, nil
}

// lines reads lines, and of a longer one than the log writes only the beginning.
type lines struct {
	r      *bufio.Reader
	long   []byte
	offset int64 // after the line that was given last
}

func newLines(r io.Reader) *lines { return &lines{r: bufio.NewReaderSize(r, 1<<16)} }

// next gives a line without its newline, good until the next call; whole reports
// whether it had one. At the end the error is io.EOF.
func (l *lines) next() (b []byte, whole bool, err error) {
	b, err = l.r.ReadSlice('\n')
	l.offset += int64(len(b))
	if errors.Is(err, bufio.ErrBufferFull) {
		l.long = append(l.long[:0], b...)
		for errors.Is(err, bufio.ErrBufferFull) {
			b, err = l.r.ReadSlice('\n')
			l.offset += int64(len(b))
			if len(l.long) <= maxLine {
				l.long = append(l.long, b...)
			}
		}
		b = l.long
	}
	switch {
	case err == nil:
		return bytes.TrimSuffix(b, []byte{'\n'}), true, nil
	case err == io.EOF && len(b) > 0:
		return b, false, nil
	}
	return nil, false, err
}
