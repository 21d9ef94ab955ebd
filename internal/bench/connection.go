package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Flow control: what the connection takes, and what HTTP/2 begins with, which is
// more than any one answer, so that streams need no window of their own.
const (
	receiveWindow = 1 << 20
	defaultWindow = 1<<16 - 1
	tableSize     = 4096 // of the header tables, HTTP/2's default
)

// caller makes one call after the other.
type caller struct {
	index  int // among all of the load
	begun  time.Time
	prefix [5]byte // of the answer's message: flag and length
	got    int     // bytes of the answer, prefix included
}

// connection is an HTTP/2 client that makes gRPC calls for several callers. One
// goroutine does it all: it reads answers, begins each caller's next call, and
// sends what it has once there is nothing more to read. So the client costs
// little beside the server that it measures.
type connection struct {
	load   *load
	tls    *tls.Conn
	in     *bufio.Reader
	out    *bufio.Writer
	framer *http2.Framer

	// Requests.
	block       []byte // header fields, all of them in the server's table
	firstBlock  []byte // the same when they are not there yet
	frame       []byte // the message, filled for each call
	random      *rand.Rand
	serial      uint64
	callers     []caller
	nextID      uint32
	window      int64 // what the server takes in, of all streams
	frameSize   uint32
	waiting     []*caller // for window
	outstanding map[uint32]*caller

	// Answers.
	decoder    *hpack.Decoder
	ending     bool   // the header block being read is the last of its stream
	httpStatus string // of that block
	grpcStatus string
	problem    string // grpc-message
	unreturned uint32 // received bytes that the server was not given back as window
	answers    atomic.Int64
	latencies  latencies // of the measured window
}

// newConnection exchanges settings and prepares the requests of so many callers.
func newConnection(l *load, conn *tls.Conn, callers []caller, serial uint64) (*connection, error) {
	c := &connection{
		load: l, tls: conn,
		in: bufio.NewReaderSize(conn, 64<<10), out: bufio.NewWriterSize(conn, 64<<10),
		frame: bytes.Clone(l.request.Frame), random: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())), serial: serial,
		callers: callers, nextID: 1, window: defaultWindow, frameSize: 16 << 10, outstanding: map[uint32]*caller{},
	}
	c.framer = http2.NewFramer(c.out, c.in)
	c.framer.SetReuseFrames()
	c.decoder = hpack.NewDecoder(tableSize, c.field)
	_, err := c.out.WriteString(http2.ClientPreface)
	err = errors.Join(err,
		c.framer.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 0}),
		c.framer.WriteWindowUpdate(0, receiveWindow-defaultWindow),
		c.out.Flush())
	if err != nil {
		return nil, err
	}
	first, err := c.framer.ReadFrame()
	if err != nil {
		return nil, err
	}
	if _, ok := first.(*http2.SettingsFrame); !ok {
		return nil, fmt.Errorf("the server begins with %v instead of its settings", first.Header().Type)
	}
	if err := c.handle(first); err != nil {
		return nil, err
	}
	if len(c.frame) > defaultWindow || len(c.frame) > int(c.frameSize) {
		return nil, fmt.Errorf("the request has %d bytes, and is to fit into one frame", len(c.frame))
	}
	c.firstBlock, c.block = headerBlocks(l.request.Method, l.address)
	return c, nil
}

// headerBlocks are the fields of a call as grpc-go's client sends them with the
// deadline of the project's client library: at first in full, to be put into the
// table, and then as places in it.
func headerBlocks(method, authority string) (first, later []byte) {
	var b bytes.Buffer
	encoder := hpack.NewEncoder(&b)
	encode := func() []byte {
		b.Reset()
		for _, field := range [][2]string{
			{":method", "POST"}, {":scheme", "https"}, {":path", method}, {":authority", authority},
			{"content-type", "application/grpc"}, {"user-agent", "grpc-go/1.85.0"}, {"te", "trailers"}, {"grpc-timeout", "29999000u"},
		} {
			_ = encoder.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]}) // to memory
		}
		return bytes.Clone(b.Bytes())
	}
	return encode(), encode()
}

// run keeps all callers busy until the load stops, and then ends when each has
// its answer.
func (c *connection) run() error {
	now := time.Now()
	for i := range c.callers {
		if err := c.begin(&c.callers[i], now); err != nil {
			return err
		}
	}
	for len(c.outstanding) > 0 || len(c.waiting) > 0 {
		if c.in.Buffered() == 0 {
			if err := c.out.Flush(); err != nil {
				return err
			}
		}
		frame, err := c.framer.ReadFrame()
		if err != nil {
			return fmt.Errorf("%d answers are missing: %w", len(c.outstanding), err)
		}
		if err := c.handle(frame); err != nil {
			return err
		}
	}
	return c.out.Flush()
}

// begin makes the next call of a caller, or has it wait for window.
func (c *connection) begin(who *caller, now time.Time) error {
	who.begun, who.got = now, 0
	if c.window < int64(len(c.frame)) {
		c.waiting = append(c.waiting, who)
		return nil
	}
	return c.send(who)
}

func (c *connection) send(who *caller) error {
	r := &c.load.request
	c.window -= int64(len(c.frame))
	c.outstanding[c.nextID] = who
	// No two callers have a secret in common, so that no Put waits for another's.
	number := (c.random.IntN((r.Secrets+c.load.callers-1)/c.load.callers)*c.load.callers + who.index) % r.Secrets
	r.fill(c.frame, number, c.serial)
	c.serial += uint64(len(c.load.connections))
	block := c.block
	if c.nextID == 1 {
		block = c.firstBlock
	}
	err := c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: c.nextID, BlockFragment: block, EndHeaders: true})
	if err == nil {
		err = c.framer.WriteData(c.nextID, true, c.frame)
	}
	c.nextID += 2
	return err
}

func (c *connection) handle(frame http2.Frame) error {
	switch f := frame.(type) {
	case *http2.DataFrame:
		return c.data(f)
	case *http2.HeadersFrame:
		c.ending = f.StreamEnded()
		return c.fields(f.StreamID, f.HeaderBlockFragment(), f.HeadersEnded())
	case *http2.ContinuationFrame:
		return c.fields(f.StreamID, f.HeaderBlockFragment(), f.HeadersEnded())
	case *http2.SettingsFrame:
		return c.settings(f)
	case *http2.PingFrame:
		if !f.IsAck() {
			return c.framer.WritePing(true, f.Data)
		}
	case *http2.WindowUpdateFrame:
		if f.StreamID == 0 {
			return c.moreWindow(int64(f.Increment))
		}
	case *http2.GoAwayFrame:
		return fmt.Errorf("the server ends the connection: %v", f.ErrCode)
	case *http2.RSTStreamFrame:
		return fmt.Errorf("the server ends a call: %v", f.ErrCode)
	}
	return nil
}

func (c *connection) settings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	err := f.ForeachSetting(func(s http2.Setting) error {
		switch {
		case s.ID == http2.SettingMaxFrameSize:
			c.frameSize = s.Val
		case s.ID == http2.SettingMaxConcurrentStreams && int(s.Val) < len(c.callers),
			s.ID == http2.SettingInitialWindowSize && int(s.Val) < len(c.frame),
			s.ID == http2.SettingHeaderTableSize && s.Val < tableSize:
			return fmt.Errorf("the server allows less than the load needs: %v", s)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return c.framer.WriteSettingsAck()
}

func (c *connection) moreWindow(n int64) error {
	c.window += n
	for len(c.waiting) > 0 && c.window >= int64(len(c.frame)) {
		who := c.waiting[0]
		c.waiting = c.waiting[1:]
		if err := c.send(who); err != nil {
			return err
		}
	}
	return nil
}

// data counts the bytes of an answer.
func (c *connection) data(f *http2.DataFrame) error {
	if c.unreturned += f.Length; c.unreturned > receiveWindow/2 {
		if err := c.framer.WriteWindowUpdate(0, c.unreturned); err != nil {
			return err
		}
		c.unreturned = 0
	}
	who := c.outstanding[f.StreamID]
	if who == nil || f.StreamEnded() {
		return errors.New("data of no call, or a call that ends without a status")
	}
	if who.got < len(who.prefix) {
		copy(who.prefix[who.got:], f.Data())
	}
	who.got += len(f.Data())
	return nil
}

// fields takes a part of a header block; the last one may be the end of a call.
func (c *connection) fields(id uint32, part []byte, last bool) error {
	if _, err := c.decoder.Write(part); err != nil {
		return err
	}
	if !last {
		return nil
	}
	if err := c.decoder.Close(); err != nil {
		return err
	}
	if c.httpStatus != "" && c.httpStatus != "200" {
		return fmt.Errorf("the server answered with HTTP status %s", c.httpStatus)
	}
	if c.ending {
		return c.answered(id)
	}
	return nil
}

func (c *connection) field(f hpack.HeaderField) {
	switch f.Name {
	case ":status":
		c.httpStatus = f.Value
	case "grpc-status":
		c.grpcStatus = f.Value
	case "grpc-message":
		c.problem = f.Value
	}
}

// answered ends a call, and begins the caller's next one.
func (c *connection) answered(id uint32) error {
	who := c.outstanding[id]
	switch {
	case who == nil:
		return errors.New("an answer to no call")
	case c.grpcStatus != "0":
		return fmt.Errorf("%s: the server answered with gRPC status %q: %s", c.load.request.Method, c.grpcStatus, c.problem)
	case who.got < len(who.prefix) || who.got-len(who.prefix) != int(binary.BigEndian.Uint32(who.prefix[1:])):
		return fmt.Errorf("an answer of %d bytes is not one message", who.got)
	case who.got-len(who.prefix) < c.load.request.Least:
		return fmt.Errorf("%s: an answer of %d bytes has not all that it is to have", c.load.request.Method, who.got)
	}
	c.httpStatus, c.grpcStatus, c.problem = "", "", ""
	delete(c.outstanding, id)
	now := time.Now()
	c.answers.Add(1)
	if c.load.measuring.Load() {
		c.latencies.add(now.Sub(who.begun))
	}
	if c.load.stopping.Load() {
		return nil
	}
	return c.begin(who, now)
}
