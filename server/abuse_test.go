package server_test

import (
	"context"
	"encoding/binary"
	"io"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/server"
)

// neighbour makes calls until the test ends, none of which may fail.
func (s *system) neighbour(t *testing.T) {
	t.Helper()
	c := s.as(worker)
	ctx, stop := context.WithCancel(callContext(t))
	over := make(chan struct{})
	go func() {
		defer close(over)
		again := time.NewTicker(lookAgain)
		defer again.Stop()
		for ctx.Err() == nil {
			<-again.C
			if _, err := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{}); err != nil && status.Code(err) != codes.Canceled {
				t.Errorf("another client's call: %v", err)
			}
		}
	}()
	t.Cleanup(func() {
		if err := list(t, c); err != nil {
			t.Errorf("another client's call afterwards: %v", err)
		}
		stop()
		<-over
	})
}

// putHeaders are those of a call of a method of the broker's.
func putHeaders(method string) []byte {
	block := []byte{0x83, 0x87}
	for _, h := range [][2]string{{":path", method}, {":authority", "localhost"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		block = append(block, 0)
		for _, s := range h {
			block = append(append(block, hpackLength(len(s))...), s...)
		}
	}
	return block
}

const (
	framePriority   = 0x2
	frameUnknown    = 0x77
	priorityPayload = "\x00\x00\x00\x00\x10"
)

var putSecret = "/" + serviceName + "/PutSecret"

// TestAbuse looks at what becomes of those who use HTTP/2 to keep the server busy, and
// of others meanwhile.
func TestAbuse(t *testing.T) {
	t.Parallel()
	const many = 3000
	for name, tt := range map[string]struct {
		why   string // empty: gRPC sheds it without a word
		abuse func(c rawHTTP2)
	}{
		"streams begun and reset": {"flood", func(c rawHTTP2) {
			for n := range uint32(many) {
				c.send(frameHeaders, flagEndHeaders, 2*n+1, putHeaders(putSecret))
				c.send(frameRSTStream, 0, 2*n+1, []byte{0, 0, 0, 8})
			}
		}},
		"headers without end": {"flood", func(c rawHTTP2) {
			c.send(frameHeaders, 0, 1, putHeaders(putSecret))
			for range many {
				c.send(frameContinuation, 0, 1, nil)
			}
		}},
		"settings": {"flood", func(c rawHTTP2) {
			for range many {
				c.send(frameSettings, 0, 0, nil)
			}
		}},
		"priorities": {"flood", func(c rawHTTP2) {
			for range many {
				c.send(framePriority, 0, 1, []byte(priorityPayload))
			}
		}},
		"unknown frames": {"flood", func(c rawHTTP2) {
			for range many {
				c.send(frameUnknown, 0, 0, nil)
			}
		}},
		"pings": {"pings", func(c rawHTTP2) {
			for range 10 {
				c.send(framePing, 0, 0, make([]byte, 8))
			}
		}},
		"data without length": {"memory", func(c rawHTTP2) {
			c.send(frameHeaders, flagEndHeaders, 1, putHeaders(putSecret))
			for range many {
				c.send(frameData, 0, 1, nil)
			}
		}},
		"stream ids that go down": {"protocol", func(c rawHTTP2) {
			c.send(frameHeaders, flagEndHeaders, 3, putHeaders(putSecret))
			c.send(frameHeaders, flagEndHeaders, 1, putHeaders(putSecret))
		}},
		"garbage":             {"protocol", func(c rawHTTP2) { _, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") }},
		"a frame of 16 MiB":   {"protocol", func(c rawHTTP2) { _, _ = io.WriteString(c, "\xff\xff\xff\x00\x00\x00\x00\x00\x01") }},
		"a frame cut in half": {"", func(c rawHTTP2) { _, _ = io.WriteString(c, "\x00\x00\x08\x06\x00") }},
		"silence":             {"", func(c rawHTTP2) {}}, // as of a client whose machine is gone: nothing answers pings
		"headers of a request alone": {"unfinished", func(c rawHTTP2) {
			c.send(frameHeaders, flagEndHeaders, 1, putHeaders(putSecret))
		}},
		"a request cut in half": {"unfinished", func(c rawHTTP2) {
			c.send(frameHeaders, flagEndHeaders, 1, putHeaders(putSecret))
			c.send(frameData, 0, 1, []byte{0, 0, 0, 0, 10, 1, 2})
		}},
		"a watch whose request does not come": {"unfinished", func(c rawHTTP2) {
			c.send(frameHeaders, flagEndHeaders, 1, putHeaders("/"+serviceName+"/WatchSecrets"))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bounds := server.Bounds{Held: 64 << 10, IdleFrames: many / 2}
			if tt.why == "unfinished" {
				bounds.Receive = 2 * time.Second
			}
			s, count := counted(t, bounds, func(c *server.Config) {
				if tt.why == "" {
					c.SetPings(time.Second, time.Second)
				}
			})
			s.neighbour(t)
			c := s.rawHTTP2(t)
			eventually(t, "the connection is known", func() bool { return s.face.Usage(spiffe(consoleAPI)).Connections == 1 })
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				if _, err := io.Copy(io.Discard, silent{c}); isTimeout(err) {
					t.Error("the connection is still open")
				}
			}()
			tt.abuse(c)
			<-ended
			if tt.why != "" {
				eventually(t, tt.why+" is counted", func() bool { return count(tt.why) > 0 })
			}
			eventually(t, "nothing is left of it", func() bool { return s.face.Usage(spiffe(consoleAPI)) == server.Usage{} })
		})
	}
}

// silent reads without answering anything.
type silent struct{ c rawHTTP2 }

func (q silent) Read(p []byte) (int, error) { return q.c.Read(p) }

// TestUnfinishedRequestsAreBounded: what one identity sends without an end to it, over
// many streams and connections, is kept up to a bound.
func TestUnfinishedRequestsAreBounded(t *testing.T) {
	t.Parallel()
	const held = 4 << 20
	s, count := counted(t, server.Bounds{Held: held}, nil)
	s.neighbour(t)
	id := spiffe(consoleAPI)
	message := append([]byte{0}, binary.BigEndian.AppendUint32(nil, 64<<10)...)
	flood := func(streams uint32) (c rawHTTP2) {
		c = s.rawHTTP2(t)
		go func() { _, _ = io.Copy(io.Discard, silent{c}) }()
		for n := range streams {
			c.send(frameHeaders, flagEndHeaders, 2*n+1, putHeaders(putSecret))
			c.send(frameData, 0, 2*n+1, message)
			for range 3 {
				c.send(frameData, 0, 2*n+1, make([]byte, 16<<10))
			}
		}
		return c
	}
	// More than half of the bound: no new calls of this identity.
	first := flood(45)
	eventually(t, "45 requests of 48 KiB are held", func() bool { return s.face.Usage(id).Held >= 45*48<<10 })
	wantQuota(t, list(t, s.as(consoleAPI)), "")
	// More than all of it: the connection that sends it is closed, though another holds
	// as much.
	second := flood(60)
	wantCount(t, count, "memory", 1)
	eventually(t, "the second connection's part is free again", func() bool { return s.face.Usage(id).Held < 46*48<<10 })
	_ = second.Close()
	// Requests that are broken off are held no longer.
	for n := range uint32(45) {
		first.send(frameRSTStream, 0, 2*n+1, []byte{0, 0, 0, 8})
	}
	eventually(t, "nothing is held", func() bool { return s.face.Usage(id).Held == 0 })
	if err := list(t, s.as(consoleAPI)); err != nil {
		t.Errorf("a call afterwards: %v", err)
	}
}

// TestStreamsOfOneConnection: those over the bound are refused and counted.
func TestStreamsOfOneConnection(t *testing.T) {
	t.Parallel()
	s, count := counted(t, server.Bounds{}, nil)
	c := s.rawHTTP2(t)
	go func() { _, _ = io.Copy(io.Discard, silent{c}) }()
	for n := range uint32(2049) {
		c.send(frameHeaders, flagEndHeaders, 2*n+1, putHeaders(putSecret))
	}
	wantCount(t, count, "streams", 1)
}
