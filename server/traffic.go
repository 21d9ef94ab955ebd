package server

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/time/rate"
)

// maxFrame is the longest frame that gRPC takes.
const maxFrame = 16 << 10

// frameCost is what a frame of an unfinished request costs beside its payload.
const frameCost = 64

// The time that a request may take is told in quarters: what began in one of them and
// has not ended four later is late.
const (
	quarters = 4
	slots    = 2 * quarters
)

// traffic follows a connection frame by frame, for what gRPC leaves to its clients'
// good will: how much of requests that never end it keeps, for how long, and how often
// it is made to begin and break off. It keeps nothing of what the frames hold.
type traffic struct {
	accounts *accounts
	account  *account
	clock    *atomic.Uint32
	in, out  frames
	idle     *rate.Limiter
	// receiving is how many requests are on their way, by the quarter they began in.
	receiving [slots]atomic.Int32

	parts      atomic.Int32 // length of unfinished
	mu         sync.Mutex
	unfinished map[uint32]part // by stream
	ended      bool
}

// part is what has come of a request that is longer than a frame.
type part struct {
	bytes int64
	since uint32 // quarter
}

func newTraffic(all *connections, acc *account) *traffic {
	t := &traffic{accounts: all.accounts, account: acc, clock: &all.clock, unfinished: map[uint32]part{},
		idle: rate.NewLimiter(rate.Limit(all.accounts.idleFramesPerSecond), all.accounts.idleFrames)}
	t.in.skip = len(http2.ClientPreface)
	t.out.codes = true
	return t
}

// begin is for a request whose headers are there; end is for when all of it is, and
// gets what begin returned.
func (t *traffic) begin() uint32 {
	slot := t.clock.Load() % slots
	t.receiving[slot].Add(1)
	return slot
}

func (t *traffic) done(slot uint32) { t.receiving[slot].Add(-1) }

// late reports whether there is a request that began four quarters ago. It forgets what
// came so long ago of requests that nobody waits for any more.
func (t *traffic) late(now uint32) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for stream, p := range t.unfinished {
		if now-p.since >= quarters {
			t.drop(stream, p)
		}
	}
	return t.receiving[(now-quarters)%slots].Load() > 0
}

// received follows what a client sent, and says why the connection is to be closed, if
// it is.
func (t *traffic) received(p []byte) (why string) {
	for p, ok := t.in.next(p); ok; p, ok = t.in.next(p) {
		if t.in.length() > maxFrame {
			return whyProtocol
		}
		stream := t.in.stream()
		switch t.in.kind() {
		case http2.FrameHeaders, http2.FrameWindowUpdate, http2.FramePing: // gRPC bounds them itself
		case http2.FrameData:
			if t.in.flags().Has(http2.FlagDataEndStream) {
				t.finish(stream)
			} else if !t.hold(stream, int64(t.in.length())+frameCost) {
				return whyMemory
			}
		default:
			if t.in.kind() == http2.FrameRSTStream {
				t.finish(stream)
			}
			if !t.idle.AllowN(time.Now(), 1) {
				return whyFlood
			}
		}
	}
	return ""
}

// sent follows what gRPC sends, and says what it refused by it, if anything, and
// whether it announced the connection's end.
func (t *traffic) sent(p []byte) (why string, left bool) {
	for p, ok := t.out.next(p); ok; p, ok = t.out.next(p) {
		kind, code := t.out.kind(), t.out.code()
		left = left || kind == http2.FrameGoAway
		switch {
		case kind == http2.FrameRSTStream && code == http2.ErrCodeFrameSize:
			why = whyHeaders
		case kind == http2.FrameRSTStream && code == http2.ErrCodeRefusedStream:
			why = whyStreams
		case kind == http2.FrameGoAway && code == http2.ErrCodeEnhanceYourCalm:
			why = whyPings
		case kind == http2.FrameGoAway && code != http2.ErrCodeNo, kind == http2.FrameRSTStream && (code == http2.ErrCodeProtocol || code == http2.ErrCodeFlowControl):
			why = whyProtocol
		}
	}
	return why, left
}

func (t *traffic) hold(stream uint32, n int64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return true
	}
	p, known := t.unfinished[stream]
	if !known {
		p.since = t.clock.Load()
		t.parts.Add(1)
	}
	p.bytes += n
	t.unfinished[stream] = p
	return t.accounts.hold(t.account, n)
}

// finish is for a request that is complete, or broken off. Most are complete with
// their first frame, and nothing is known of them.
func (t *traffic) finish(stream uint32) {
	if t.parts.Load() == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p, known := t.unfinished[stream]; known {
		t.drop(stream, p)
	}
}

func (t *traffic) drop(stream uint32, p part) {
	delete(t.unfinished, stream)
	t.parts.Add(-1)
	t.accounts.hold(t.account, -p.bytes)
}

// end is for when the connection is closed.
func (t *traffic) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	for stream, p := range t.unfinished {
		t.drop(stream, p)
	}
}

const frameHead = 9 // bytes

// frames finds the heads of frames in what goes one way of a connection.
type frames struct {
	head  [frameHead + 8]byte // with the error code of RST_STREAM and GOAWAY, if codes
	have  int                 // of head
	skip  int                 // bytes that are no head
	codes bool
	begun bool // there was a first one
}

// next goes on to the next head in p and reports whether there is one; rest is what
// comes after it.
func (f *frames) next(p []byte) (rest []byte, ok bool) {
	for len(p) > 0 {
		if f.skip > 0 {
			n := min(f.skip, len(p))
			f.skip -= n
			p = p[n:]
			continue
		}
		want := frameHead
		if f.have >= frameHead {
			want += f.codeAt() + 4
		}
		n := copy(f.head[f.have:want], p)
		f.have += n
		p = p[n:]
		if f.have == frameHead && f.codes && (f.kind() == http2.FrameRSTStream || f.kind() == http2.FrameGoAway) || f.have < want {
			continue
		}
		f.skip = max(0, int(f.length())-(f.have-frameHead))
		f.have, f.begun = 0, true
		return p, true
	}
	return nil, false
}

// codeAt is where in its payload a frame has its error code.
func (f *frames) codeAt() int {
	if f.kind() == http2.FrameGoAway {
		return 4
	}
	return 0
}

func (f *frames) length() uint32        { return binary.BigEndian.Uint32(f.head[:]) >> 8 }
func (f *frames) kind() http2.FrameType { return http2.FrameType(f.head[3]) }
func (f *frames) flags() http2.Flags    { return http2.Flags(f.head[4]) }
func (f *frames) stream() uint32        { return binary.BigEndian.Uint32(f.head[5:]) &^ (1 << 31) }
func (f *frames) code() http2.ErrCode {
	return http2.ErrCode(binary.BigEndian.Uint32(f.head[frameHead+f.codeAt():]))
}
