package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"time"
	"unicode/utf8"
)

// A line is
//
//	{"format":1,"seq":N,"time":"…" BODY ,"prev":"64 hex","crc":"8 hex"}
//
// where prev is the hash of the line before and crc the CRC-32C of all before it.
// The crc protects nothing. It tells a line that was changed from a line whose
// predecessor was.
const (
	format    = 1
	lineStart = `{"format":1,"seq":`
	timeStart = `,"time":"`
	prevStart = `,"prev":"`
	crcStart  = `,"crc":"`
	typeStart = `","type":"`
	idStart   = `","id":"`

	crcLen  = len(crcStart) + 8 + len(`"}`)
	tailLen = len(prevStart) + 64 + len(`"`) + crcLen

	maxString = 1024
	maxKeys   = 256
	maxKey    = 256
	maxLine   = 1 << 20 // more than any line has, even if all of it is escaped
)

type hash = [sha256.Size]byte

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// appendBody appends what a record gives to its line, from the time on.
func appendBody(b []byte, t Type, r *Record, now time.Time) []byte {
	b = append(b, timeStart...)
	b = now.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, typeStart...)
	b = append(b, t...)
	b = append(b, '"')
	b = appendText(b, "id", r.ID)
	b = appendText(b, "caller", r.Caller)
	b = appendText(b, "serial", r.Serial)
	b = appendText(b, "peer", r.Peer)
	b = appendText(b, "action", r.Action)
	b = appendText(b, "key", r.Key)
	if len(r.Keys) > 0 {
		b = append(b, `,"keys":[`...)
		for i, key := range r.Keys[:min(len(r.Keys), maxKeys)] {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendString(b, key, maxKey)
		}
		b = append(b, ']')
	}
	b = appendText(b, "instance", r.Instance)
	b = appendText(b, "decision", r.Decision)
	b = appendText(b, "code", r.Code)
	b = appendText(b, "reason", r.Reason)
	b = appendText(b, "version", r.Version)
	b = appendNumber(b, "generation", r.Generation)
	b = appendText(b, "commit", r.Commit)
	b = appendNumber(b, "duration_ns", int64(r.Duration))
	b = appendText(b, "request_id", r.RequestID)
	b = appendText(b, "operation_id", r.OperationID)
	b = appendText(b, "settled", r.Settled)
	b = appendTrue(b, "replayed", r.Replayed)
	b = appendTrue(b, "deleted", r.Deleted)
	b = appendNumber(b, "count", r.Count)
	b = appendText(b, "chain", r.Chain)
	if s := r.System; s != nil {
		b = append(b, `,"system":{"build":`...) // there even if empty: no comma before it
		b = appendString(b, s.Build, maxString)
		b = appendText(b, "policy", s.Policy)
		b = appendText(b, "revoked", s.Revoked)
		b = appendText(b, "client_ca", s.ClientCA)
		b = appendText(b, "certificate", s.Certificate)
		b = append(b, '}')
	}
	b = appendText(b, "detail", r.Detail)
	b = appendNumber(b, "bytes", r.Bytes)
	return appendText(b, "sha256", r.SHA256)
}

// appendLine appends a whole line, without a newline.
func appendLine(b []byte, seq int64, body []byte, prev *hash) []byte {
	start := len(b)
	b = append(b, lineStart...)
	b = strconv.AppendInt(b, seq, 10)
	b = append(b, body...)
	b = append(b, prevStart...)
	b = hex.AppendEncode(b, prev[:])
	b = append(b, '"')
	var sum [4]byte
	binary.BigEndian.PutUint32(sum[:], crc32.Checksum(b[start:], castagnoli))
	b = append(b, crcStart...)
	b = hex.AppendEncode(b, sum[:])
	return append(b, `"}`...)
}

func appendName(b []byte, name string) []byte {
	b = append(b, `,"`...)
	b = append(b, name...)
	return append(b, `":`...)
}

func appendText(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	return appendString(appendName(b, name), value, maxString)
}

func appendNumber(b []byte, name string, value int64) []byte {
	if value == 0 {
		return b
	}
	return strconv.AppendInt(appendName(b, name), value, 10)
}

func appendTrue(b []byte, name string, value bool) []byte {
	if !value {
		return b
	}
	return append(appendName(b, name), "true"...)
}

// appendString appends s as a JSON string, whatever is in it. What goes beyond
// limit bytes is cut off, and an ellipsis says so.
func appendString(b []byte, s string, limit int) []byte {
	cut := len(s) > limit
	if cut {
		s = s[:limit]
		for n := 0; n < utf8.UTFMax-1 && len(s) > 0; n++ { // not in the middle of a character
			if r, size := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || size != 1 {
				break
			}
			s = s[:len(s)-1]
		}
	}
	b = append(b, '"')
	from := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c < utf8.RuneSelf && c != '"' && c != '\\' {
			i++
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		if c >= utf8.RuneSelf && (r != utf8.RuneError || size > 1) {
			i += size
			continue
		}
		b = append(b, s[from:i]...)
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c < ' ':
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		default:
			b = append(b, "\ufffd"...)
		}
		i += size
		from = i
	}
	b = append(b, s[from:]...)
	if cut {
		b = append(b, "…"...)
	}
	return append(b, '"')
}

const hexDigits = "0123456789abcdef"

// parsed is what the chain needs of a line.
type parsed struct {
	seq        int64
	prev, hash hash
}

// parseLine reads a line without its newline. The error says what is wrong with
// the line alone.
func parseLine(b []byte) (p parsed, err error) {
	errShape := errors.New("is no line of an audit log, or was changed")
	if len(b) < len(lineStart)+tailLen || len(b) > maxLine {
		return p, errShape
	}
	tail := b[len(b)-crcLen:]
	sum, err := hex.DecodeString(string(tail[len(crcStart) : crcLen-2]))
	if err != nil || !bytes.HasPrefix(tail, []byte(crcStart)) || !bytes.HasSuffix(tail, []byte(`"}`)) {
		return p, errShape
	}
	if crc32.Checksum(b[:len(b)-crcLen], castagnoli) != binary.BigEndian.Uint32(sum) || !bytes.Equal(bytes.ToLower(tail), tail) {
		return p, errors.New("was changed: its checksum does not fit")
	}
	rest, ok := bytes.CutPrefix(b, []byte(`{"format":`))
	n := bytes.IndexByte(rest, ',')
	if !ok || n < 0 {
		return p, errShape
	}
	if f, err := strconv.Atoi(string(rest[:n])); err == nil && f > format {
		return p, fmt.Errorf("has format %d, which this program does not know", f)
	}
	if rest, ok = bytes.CutPrefix(b, []byte(lineStart)); !ok {
		return p, errShape
	}
	if n = bytes.Index(rest, []byte(timeStart)); n < 0 {
		return p, errShape
	}
	if p.seq, err = strconv.ParseInt(string(rest[:n]), 10, 64); err != nil || p.seq < 1 {
		return p, errShape
	}
	prev := b[len(b)-tailLen : len(b)-crcLen]
	if !bytes.HasPrefix(prev, []byte(prevStart)) {
		return p, errShape
	}
	if _, err = hex.Decode(p.prev[:], prev[len(prevStart):len(prevStart)+64]); err != nil {
		return p, errShape
	}
	p.hash = sha256.Sum256(b)
	return p, nil
}

// bodyOf is the part of a whole line that appendBody made.
func bodyOf(b []byte) []byte {
	return b[bytes.Index(b, []byte(timeStart)) : len(b)-tailLen]
}

// typeOf is the type of a line or a body; empty when it has none that is known.
func typeOf(b []byte) Type {
	rest := b[:min(len(b), 128)]
	at := bytes.Index(rest, []byte(typeStart))
	if at < 0 {
		return ""
	}
	rest = rest[at+len(typeStart):]
	for _, t := range []Type{TypeCall, TypeIntent, TypeOutcome, TypeCount, TypeSystem} {
		if len(rest) > len(t) && string(rest[:len(t)]) == string(t) && rest[len(t)] == '"' {
			return t
		}
	}
	return ""
}

// idOf is the id of an intent or an outcome as it stands in the line, escaped.
func idOf(b []byte) string {
	at := bytes.Index(b[:min(len(b), 160)], []byte(idStart))
	if at < 0 {
		return ""
	}
	rest := b[at+len(idStart):]
	for i := 0; i < len(rest); i++ {
		switch rest[i] {
		case '\\':
			i++
		case '"':
			return string(rest[:i])
		}
	}
	return ""
}

// lineCloses reports whether an outcome ends its intent. Quotes inside strings are escaped, so that no
// string can pretend to be a field.
func lineCloses(b []byte) bool {
	return !bytes.Contains(b, []byte(`,"commit":"`+commitUnknown+`"`)) || bytes.Contains(b, []byte(`,"settled":"`))
}

// parseBegin reads the first line of a file.
func parseBegin(b []byte) (r Record, err error) {
	if _, err := parseLine(b); err != nil {
		return r, err
	}
	if typeOf(b) == TypeSystem {
		r = recordOf(bodyOf(b))
	}
	if r.Action != actionBegin || r.Chain == "" {
		return r, errors.New("is not what a file begins with: the lines before it were dropped, or it was moved here")
	}
	return r, nil
}
