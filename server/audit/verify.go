package audit

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
)

// Chain is a chain that holds.
type Chain struct {
	ID          string
	Files       []string // in order
	Lines       int64
	First, Last int64 // sequences; First is over 1 when older files were not given
	Head        string
	Open        []string // ids of intents without outcome, the first hundred thousand
	Torn        string   // where a line ends in the middle, as a kill leaves it; else empty
}

// Report is what Verify says of the chains that hold.
type Report struct {
	Chains []Chain
	HeadAt string // where the head stands that was asked for
}

// Tampered is the first line of a chain that was changed, dropped, moved or
// doubled. A dropped line is named by the number that it had.
type Tampered struct {
	File string
	Line int64
	What string
}

func (t *Tampered) Error() string { return fmt.Sprintf("%s: line %d: %s", t.File, t.Line, t.What) }

// Verify reads the files of one or several chains, in any order, in memory that
// does not grow with them. The error joins what is wrong with each chain. When
// head is given it has to be the hash of a line, else the end was cut off.
func Verify(files []string, head string) (Report, error) {
	var (
		report Report
		want   []byte
		errs   []error
		heads  []fileHead
	)
	if head != "" {
		var err error
		if want, err = hex.DecodeString(head); err != nil || len(want) != sha256.Size {
			return report, fmt.Errorf("head %q: want 64 hex digits, as the log has them after head=", head)
		}
	}
	for _, name := range files {
		h, err := readHead(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		heads = append(heads, h)
	}
	for len(heads) > 0 {
		var mine, others []fileHead
		for _, h := range heads {
			if h.chain == heads[0].chain {
				mine = append(mine, h)
			} else {
				others = append(others, h)
			}
		}
		heads = others
		slices.SortStableFunc(mine, func(a, b fileHead) int { return cmp.Compare(a.seq, b.seq) })
		v := verifier{report: &report, want: want, files: mine}
		errs = append(errs, v.run())
	}
	err := errors.Join(errs...)
	if err == nil && want != nil && report.HeadAt == "" {
		err = fmt.Errorf("head %s: no line has this hash: it is in an older file that was not given, or the end was cut off, or the chain was made anew", head)
	}
	return report, err
}

// fileHead is the beginning of a file.
type fileHead struct {
	name, chain string
	seq         int64
}

func readHead(name string) (h fileHead, err error) {
	f, err := os.Open(name)
	if err != nil {
		return h, err
	}
	defer func() { _ = f.Close() }()
	b, whole, err := newLines(f).next()
	switch {
	case err == io.EOF:
		return h, &Tampered{name, 1, "is missing: the file is empty"}
	case err != nil:
		return h, err
	case !whole:
		return h, &Tampered{name, 1, "is cut off in the middle, or the file holds no audit log"}
	}
	r, err := parseBegin(b)
	if err != nil {
		return h, &Tampered{name, 1, err.Error()}
	}
	p, err := parseLine(b)
	return fileHead{name, r.Chain, p.seq}, err
}

// place is where a line stands.
type place struct {
	file string
	line int64
}

func (p place) tampered(format string, args ...any) error {
	return &Tampered{p.file, p.line, fmt.Sprintf(format, args...)}
}

// item is a line of the files of a chain, good until the next.
type item struct {
	place
	b           []byte
	whole, last bool // it has a newline; it is in the last file
}

// verifier walks the files of a chain.
type verifier struct {
	report *Report
	want   []byte
	files  []fileHead // not opened yet
	f      *os.File
	lines  *lines
	now    place

	chain  Chain
	before parsed // the line before, once there is one
	at     place  // of that
	open   map[string]struct{}
	pieces []piece
}

// piece is what is no line. The log itself may say so further on.
type piece struct {
	item
	why    error
	length int64
	sha256 string
}

const (
	maxOpen   = 100_000
	maxPieces = 8
)

func (v *verifier) next() (item, error) {
	for {
		if v.f == nil {
			if len(v.files) == 0 {
				return item{}, io.EOF
			}
			f, err := os.Open(v.files[0].name)
			if err != nil {
				return item{}, err
			}
			v.f, v.lines, v.now = f, newLines(f), place{file: v.files[0].name}
			v.files = v.files[1:]
		}
		b, whole, err := v.lines.next()
		if err == nil {
			v.now.line++
			return item{v.now, b, whole, len(v.files) == 0}, nil
		}
		_ = v.f.Close()
		v.f = nil
		if err != io.EOF {
			return item{}, err
		}
	}
}

func (v *verifier) run() error {
	defer func() {
		if v.f != nil {
			_ = v.f.Close()
		}
	}()
	for {
		it, err := v.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		p, bad := parseLine(it.b)
		switch {
		case !it.whole && it.last && bad != nil && len(v.pieces) == 0 && v.torn(it.b):
			v.chain.Torn = fmt.Sprintf("%s: line %d", it.file, it.line)
			continue
		case !it.whole && !it.last && bad == nil:
			bad = errors.New("has lost its end")
		}
		if bad != nil {
			sum := sha256.Sum256(it.b)
			v.pieces = append(v.pieces, piece{it, bad, int64(len(it.b)), hex.EncodeToString(sum[:])})
			if len(v.pieces) <= maxPieces {
				continue
			}
			return v.pieces[0].tampered("%v", v.pieces[0].why)
		}
		if err := v.line(it, p); err != nil {
			return err
		}
	}
	if len(v.pieces) > 0 {
		return v.pieces[0].tampered("%v", v.pieces[0].why)
	}
	v.finish()
	return nil
}

// torn reports whether what has no newline is the beginning of the next line, as a
// kill leaves it.
func (v *verifier) torn(b []byte) bool {
	start := []byte(lineStart + strconv.FormatInt(v.before.seq+1, 10) + timeStart)
	n := min(len(b), len(start))
	at := bytes.Index(b, []byte(crcStart))
	return bytes.Equal(b[:n], start[:n]) && (at < 0 || len(b)-at < crcLen)
}

// line checks a line that is whole against the one before.
func (v *verifier) line(it item, p parsed) error {
	links, follows := p.prev == v.before.hash, p.seq == v.before.seq+1
	var r Record
	if typeOf(it.b) == TypeSystem {
		r = recordOf(bodyOf(it.b))
	}
	if len(v.pieces) > 0 {
		first := v.pieces[0]
		if !links || !follows || r.Action != actionTorn || r.Bytes != first.length || r.SHA256 != first.sha256 {
			return first.tampered("%v", first.why)
		}
		v.pieces = v.pieces[1:]
	}
	begins := r.Action == actionBegin && p.seq == 1 && p.prev == hash{}
	switch {
	case v.chain.Lines == 0 && (p.seq == 1) != (p.prev == hash{}):
		return it.tampered("was changed: it has sequence %d and the hash of the line before %x", p.seq, p.prev)
	case v.chain.Lines == 0, links && follows:
	case begins && r.Chain != v.chain.ID && it.line > 1:
		v.finish() // another process wrote to the same stream
	case links:
		return it.tampered("was changed: it has sequence %d where %d comes", p.seq, v.before.seq+1)
	case follows:
		return v.unlinked(it.place, p)
	case p.seq <= v.before.seq && v.chain.Lines == 1 && p.hash != v.before.hash:
		return v.at.tampered("was changed: the line after it has sequence %d", p.seq)
	case p.seq == v.before.seq && p.prev == v.before.prev && p.hash != v.before.hash && v.attested(p):
		return v.at.tampered("was put in: the line after it has the same sequence, and its hash is in the next")
	case p.seq <= v.before.seq:
		return it.tampered("does not belong here: sequence %d stood before; it was doubled, or moved here", p.seq)
	default:
		return v.gap(it.place, p)
	}
	v.accept(it, p, r)
	return nil
}

func (v *verifier) accept(it item, p parsed, r Record) {
	c := &v.chain
	if c.Lines == 0 {
		c.ID, c.First = r.Chain, p.seq
		v.open = map[string]struct{}{}
	}
	if n := len(c.Files); n == 0 || c.Files[n-1] != it.file {
		c.Files = append(c.Files, it.file)
	}
	c.Lines++
	c.Last = p.seq
	v.before, v.at = p, it.place
	switch typeOf(it.b) {
	case TypeIntent:
		if len(v.open) < maxOpen {
			v.open[idOf(it.b)] = struct{}{}
		}
	case TypeOutcome:
		if lineCloses(it.b) {
			delete(v.open, idOf(it.b))
		}
	}
	if v.want != nil && bytes.Equal(p.hash[:], v.want) {
		v.report.HeadAt = fmt.Sprintf("%s: line %d (sequence %d)", it.file, it.line, p.seq)
	}
}

// finish reports the chain, which holds, and makes room for another.
func (v *verifier) finish() {
	for id := range v.open {
		v.chain.Open = append(v.chain.Open, id)
	}
	slices.Sort(v.chain.Open)
	v.chain.Head = hex.EncodeToString(v.before.hash[:])
	v.report.Chains = append(v.report.Chains, v.chain)
	v.chain, v.before, v.at = Chain{}, parsed{}, place{}
}

// unlinked says which one was changed, when a line has the right sequence and not
// the hash of the line before. The line after it tells: if that has the hash of
// this one, then this one is as it was written.
func (v *verifier) unlinked(at place, p parsed) error {
	if n, ok := v.after(); ok && n.prev != p.hash || alike(p.prev, v.before.hash) {
		return at.tampered("was changed: it does not hold the hash of the line before")
	}
	return v.at.tampered("was changed, with its checksum: the line after it holds another hash")
}

// attested reports whether the next line holds the hash of this one.
func (v *verifier) attested(p parsed) bool {
	n, ok := v.after()
	return ok && n.prev == p.hash
}

// after reads one line further, which ends the walk.
func (v *verifier) after() (p parsed, ok bool) {
	it, err := v.next()
	if err != nil {
		return p, false
	}
	p, err = parseLine(it.b)
	return p, err == nil
}

// alike reports whether most digits of two hashes are the same: somebody changed a
// few. Those of two lines have a sixteenth in common.
func alike(a, b hash) bool {
	same := 0
	for i := range a {
		if a[i]>>4 == b[i]>>4 {
			same++
		}
		if a[i]&15 == b[i]&15 {
			same++
		}
	}
	return same >= len(a)
}

// gap says what became of the line that comes where p stands.
func (v *verifier) gap(at place, p parsed) error {
	missing := v.before.seq + 1
	from := at
	if at.line == 1 { // the end of the file before
		from = place{v.at.file, v.at.line + 1}
	}
	for n := 1; ; n++ {
		it, err := v.next()
		if err != nil {
			break
		}
		q, bad := parseLine(it.b)
		switch {
		case bad != nil || q.seq != missing || q.prev != v.before.hash:
		case n == 1:
			return at.tampered("does not belong here: it has sequence %d where %d comes; it was moved here, or doubled", p.seq, missing)
		default:
			return from.tampered("sequence %d is missing: it was moved from here to %s, line %d", missing, it.file, it.line)
		}
	}
	if missing == p.seq-1 {
		return from.tampered("sequence %d is missing: the line was dropped", missing)
	}
	return from.tampered("sequences %d to %d are missing: the lines were dropped, or a file was not given", missing, p.seq-1)
}
