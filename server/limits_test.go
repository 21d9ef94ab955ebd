package server_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
)

const serviceName = "exto.secrets.v1.SecretsBrokerService"

// padded is a request of exactly this many bytes on the wire.
func padded(t *testing.T, size int) *secretsv1.PutSecretRequest {
	t.Helper()
	in := &secretsv1.PutSecretRequest{Ref: ref("demo", uriKind), Value: strings.Repeat("x", size)}
	in.Value = in.Value[:size-(proto.Size(in)-size)]
	if got := proto.Size(in); got != size {
		t.Fatalf("got a request of %d bytes, want %d", got, size)
	}
	return in
}

func TestRequestSize(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	c := s.as(consoleAPI)
	_, err := c.PutSecret(callContext(t), padded(t, 64<<10))
	wantReason(t, err, secret.InvalidValue, secret.NotApplied) // a handler saw it
	_, err = c.PutSecret(callContext(t), padded(t, 64<<10+1))
	if f := failed(t, err); f.code != codes.ResourceExhausted || len(f.status.Details()) > 0 {
		t.Errorf("over 64 KiB: got %v, want RESOURCE_EXHAUSTED without details", err)
	}
	if calls := s.vault.Calls(); len(calls) > 0 {
		t.Errorf("the vault was asked: %v", calls)
	}
	if _, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{}); err != nil {
		t.Errorf("a call afterwards, on the same connection: %v", err)
	}
}

// bytesCodec sends bytes as they are.
type bytesCodec struct{}

func (bytesCodec) Name() string                       { return "proto" }
func (bytesCodec) Marshal(v any) ([]byte, error)      { return v.([]byte), nil }
func (bytesCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }

var _ encoding.Codec = bytesCodec{}

func TestMalformedMessages(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI)))
	good, err := proto.Marshal(ref("demo", uriKind))
	if err != nil {
		t.Fatal(err)
	}
	withRef := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), good)
	for name, in := range map[string][]byte{
		"not UTF-8":        protowire.AppendBytes(protowire.AppendTag(withRef, 2, protowire.BytesType), []byte("postgres://h/\xff")),
		"does not decode":  append(withRef, 0xff),
		"another type":     protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.EndGroupType), 1),
		"cut off in a ref": withRef[:len(withRef)-1],
	} {
		var out []byte
		err := conn.Invoke(callContext(t), "/"+serviceName+"/PutSecret", in, &out, grpc.ForceCodec(bytesCodec{}))
		if f := failed(t, err); f.code != codes.Internal || len(f.status.Details()) > 0 {
			t.Errorf("%s: got %v, want INTERNAL without details", name, err)
		}
	}
	if calls := s.vault.Calls(); len(calls) > 0 {
		t.Errorf("the vault was asked: %v", calls)
	}
	var out []byte
	if err := conn.Invoke(callContext(t), "/"+serviceName+"/PutSecret", protowire.AppendString(protowire.AppendTag(withRef, 2, protowire.BytesType), "postgres://h/db"), &out, grpc.ForceCodec(bytesCodec{})); err != nil {
		t.Errorf("the same by hand, but well-formed: %v", err)
	}
}

func TestHeaderSize(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	list := func(size int) error {
		ctx := metadata.AppendToOutgoingContext(callContext(t), "x-padding", strings.Repeat("x", size))
		_, err := s.as(consoleAPI).ListSecrets(ctx, &secretsv1.ListSecretsRequest{})
		return err
	}
	if err := list(15 << 10); err != nil {
		t.Errorf("headers of about 15 KiB: %v", err)
	}
	if err := list(16 << 10); err == nil {
		t.Error("headers over 16 KiB: got an answer")
	}

	// A client that does not care what the server announced.
	for _, tt := range []struct {
		padding  int
		answered bool
	}{{10 << 10, true}, {17 << 10, false}} {
		c := s.rawHTTP2(t)
		block := healthCheckHeaders([2]string{"x-padding", strings.Repeat("x", tt.padding)})
		half := len(block) / 2
		c.send(frameHeaders, 0, 1, block[:half])
		c.send(frameContinuation, flagEndHeaders, 1, block[half:])
		c.send(frameData, flagEndStream, 1, make([]byte, 5))
		if answered := c.answered(t); answered != tt.answered {
			t.Errorf("%d bytes of padding: got answered %v, want %v", tt.padding, answered, tt.answered)
		}
	}
}

// answered reports whether stream 1 is answered, rather than refused or closed
// with its connection.
func (c rawHTTP2) answered(t *testing.T) bool {
	t.Helper()
	for {
		f, err := c.next()
		switch {
		case isTimeout(err):
			t.Fatal("neither an answer nor a refusal")
		case err != nil, f.kind == frameRSTStream && f.stream == 1, f.kind == frameGoAway:
			return false
		case f.kind == frameHeaders:
			return true
		}
	}
}

// healthCheckHeaders are those of a call of Check, and further ones, none of them
// indexed or Huffman-coded.
func healthCheckHeaders(further ...[2]string) []byte {
	block := []byte{0x83, 0x87} // :method POST, :scheme https
	for _, h := range append([][2]string{
		{":path", "/grpc.health.v1.Health/Check"}, {":authority", "localhost"},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	}, further...) {
		block = append(block, 0)
		for _, s := range h {
			block = append(append(block, hpackLength(len(s))...), s...)
		}
	}
	return block
}

// hpackLength is the length of a string that is not Huffman-coded.
func hpackLength(n int) []byte {
	if n < 127 {
		return []byte{byte(n)}
	}
	return binary.AppendUvarint([]byte{127}, uint64(n-127))
}

// rawHTTP2 is a connection on which frames are sent by hand.
type rawHTTP2 struct{ *tls.Conn }

type frame struct {
	kind    byte
	stream  uint32
	payload []byte
}

const (
	frameData         = 0x0
	frameHeaders      = 0x1
	frameRSTStream    = 0x3
	frameSettings     = 0x4
	framePing         = 0x6
	frameGoAway       = 0x7
	frameContinuation = 0x9

	flagEndStream  = 0x1
	flagEndHeaders = 0x4
)

// rawHTTP2 is past the handshake and the exchange of settings.
func (s *system) rawHTTP2(t *testing.T) rawHTTP2 {
	t.Helper()
	cfg := s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI))
	cfg.NextProtos, cfg.ServerName = []string{"h2"}, "127.0.0.1"
	conn, err := tls.Dial("tcp", s.addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	deadline, _ := callContext(t).Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	c := rawHTTP2{conn}
	c.send(frameSettings, 0, 0, nil)
	for c.receive(t).kind != frameSettings {
	}
	return c
}

func (c rawHTTP2) send(kind, flags byte, stream uint32, payload []byte) {
	head := make([]byte, 9, 9+len(payload))
	binary.BigEndian.PutUint32(head, uint32(len(payload))<<8)
	head[3], head[4] = kind, flags
	binary.BigEndian.PutUint32(head[5:], stream)
	// The server may have closed already; then receive tells why.
	_, _ = c.Write(append(head, payload...))
}

func (c rawHTTP2) next() (frame, error) {
	head := make([]byte, 9)
	if _, err := io.ReadFull(c, head); err != nil {
		return frame{}, err
	}
	f := frame{kind: head[3], stream: binary.BigEndian.Uint32(head[5:]), payload: make([]byte, binary.BigEndian.Uint32(head)>>8)}
	_, err := io.ReadFull(c, f.payload)
	return f, err
}

func (c rawHTTP2) receive(t *testing.T) frame {
	t.Helper()
	f, err := c.next()
	if err != nil {
		t.Fatalf("reading a frame: %v", err)
	}
	return f
}

func TestPingsThatComeTooFast(t *testing.T) {
	t.Parallel()
	c := startSystem(t).rawHTTP2(t)
	for range 10 {
		c.send(framePing, 0, 0, make([]byte, 8))
	}
	for {
		if f := c.receive(t); f.kind == frameGoAway {
			const enhanceYourCalm = 0xb
			if code := binary.BigEndian.Uint32(f.payload[4:]); code != enhanceYourCalm || string(f.payload[8:]) != "too_many_pings" {
				t.Errorf("got GOAWAY %d %q, want too_many_pings", code, f.payload[8:])
			}
			return
		}
	}
}

// TestManyStreamsLeaveRoomForCalls: 1,024 streams that stay open, and calls
// beside them, on one connection.
func TestManyStreamsLeaveRoomForCalls(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI)))
	ctx := callContext(t)
	for n := range 1024 {
		w, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{Service: serviceName})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Recv(); err != nil {
			t.Fatalf("stream %d: %v", n, err)
		}
	}
	c := secretsv1.NewSecretsBrokerServiceClient(conn)
	for range 10 {
		if _, err := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{}); err != nil {
			t.Fatalf("a call beside 1,024 streams: %v", err)
		}
	}
}

// TestUnfinishedHandshakesAreShed looks at what the server does about those who
// connect and then say nothing, or too little.
func TestUnfinishedHandshakesAreShed(t *testing.T) {
	t.Parallel()
	if server.HandshakeTimeout > 30*time.Second {
		t.Errorf("got %v for a handshake, want 30 s at most", server.HandshakeTimeout)
	}
	s := newSystem(t)
	s.config = func(c *server.Config) { c.SetHandshakeTimeout(100 * time.Millisecond) }
	s.startEmbedded()
	for name, said := range map[string]string{"nothing": "", "half a ClientHello": "\x16\x03\x01\x02\x00\x01\x00"} {
		conn := s.silent(t, said)
		if _, err := io.ReadAll(conn); isTimeout(err) {
			t.Errorf("a client that says %s: the connection is still open", name)
		}
	}
	// TLS is done, HTTP/2 is not.
	cfg := s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI))
	cfg.NextProtos, cfg.ServerName = []string{"h2"}, "127.0.0.1"
	conn := tls.Client(s.silent(t, ""), cfg)
	if _, err := io.ReadAll(conn); isTimeout(err) {
		t.Error("a client without HTTP/2 preface: the connection is still open")
	}
}

// silent is a connection on which the client says this and no more. Reading from
// it ends with a timeout when the server keeps it open for the whole test.
func (s *system) silent(t *testing.T, said string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	deadline, _ := callContext(t).Deadline()
	if err := conn.SetReadDeadline(deadline); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, said); err != nil {
		t.Fatal(err)
	}
	return conn
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// shutdown begins a shutdown with this bound and gives a channel that is closed
// when it is over.
func (s *system) shutdown(bound context.Context) <-chan struct{} {
	over := make(chan struct{})
	go func() {
		defer close(over)
		s.face.Shutdown(bound)
	}()
	return over
}

// wantClosed waits for a channel to be closed.
func wantClosed(t *testing.T, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-callContext(t).Done():
		t.Fatalf("%s never happened", what)
	}
}

// notServing waits until a watch says NOT_SERVING or ends.
func notServing(t *testing.T, w grpc.ServerStreamingClient[healthpb.HealthCheckResponse]) {
	t.Helper()
	for {
		got, err := w.Recv()
		if err != nil {
			if code := status.Code(err); code == codes.DeadlineExceeded {
				t.Fatalf("the watch neither ended nor said NOT_SERVING: %v", err)
			}
			return
		}
		if got.GetStatus() == healthpb.HealthCheckResponse_NOT_SERVING {
			return
		}
	}
}

func (s *system) watchHealth(t *testing.T, conn *grpc.ClientConn) grpc.ServerStreamingClient[healthpb.HealthCheckResponse] {
	t.Helper()
	w, err := healthpb.NewHealthClient(conn).Watch(callContext(t), &healthpb.HealthCheckRequest{Service: serviceName})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := w.Recv(); err != nil || got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("got %v, %v, want SERVING", got, err)
	}
	return w
}

// TestShutdownLetsCallsFinish: a shutdown says NOT_SERVING at its beginning and
// waits for the calls under way.
func TestShutdownLetsCallsFinish(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI)))
	w := s.watchHealth(t, conn)
	reached, release := make(chan struct{}, 2), make(chan struct{})
	s.vault.SetBefore(func(context.Context, string, secret.Key) error {
		select {
		case reached <- struct{}{}:
		default:
		}
		<-release
		return nil
	})
	c := secretsv1.NewSecretsBrokerServiceClient(conn)
	ended := make(chan error, 2)
	go func() {
		_, err := c.PutSecret(callContext(t), &secretsv1.PutSecretRequest{Ref: ref("demo", tokenKind), Value: "tok"})
		ended <- err
	}()
	go func() {
		_, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
		ended <- err
	}()
	<-reached
	<-reached
	over := s.shutdown(callContext(t))
	notServing(t, w)
	select {
	case <-over:
		t.Error("the shutdown did not wait for the calls")
	case err := <-ended:
		t.Errorf("a call ended early: %v", err)
	default:
	}
	close(release)
	for range 2 {
		if err := <-ended; err != nil {
			t.Errorf("a call under way at the shutdown: %v", err)
		}
	}
	wantClosed(t, over, "the end of the shutdown")
	if _, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{}); failed(t, err).code != codes.Unavailable {
		t.Errorf("a call after the shutdown: got %v, want UNAVAILABLE", err)
	}
}

// TestHealthDuringShutdown: a check on a connection that is still open.
func TestHealthDuringShutdown(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	// The shutdown waits for this call, so that health is asked during it.
	x := s.in(t, "demo", "active")
	reached, release := x.hang("Get", false)
	ended := make(chan error, 1)
	go func() {
		_, err := x.get("")
		ended <- err
	}()
	<-reached
	c := s.rawHTTP2(t)
	// Before the server has read anything of HTTP/2 a connection is a handshake to it.
	c.send(framePing, 0, 0, make([]byte, 8))
	for c.receive(t).kind != framePing {
	}
	over := s.shutdown(callContext(t))
	// The server says GOAWAY with the highest stream id first, and takes streams
	// that were on their way until the client answered its ping.
	for c.receive(t).kind != frameGoAway {
	}
	in, err := proto.Marshal(&healthpb.HealthCheckRequest{Service: serviceName})
	if err != nil {
		t.Fatal(err)
	}
	c.send(frameHeaders, flagEndHeaders, 1, healthCheckHeaders())
	c.send(frameData, flagEndStream, 1, append([]byte{0, 0, 0, 0, byte(len(in))}, in...))
	var f frame
	for f.kind != frameData || f.stream != 1 {
		f = c.receive(t)
	}
	out := &healthpb.HealthCheckResponse{}
	if err := proto.Unmarshal(f.payload[5:], out); err != nil || out.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("got %v, %v, want NOT_SERVING", out, err)
	}
	_ = c.Close()
	release()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	wantClosed(t, over, "the end of the shutdown")
}

// TestShutdownIsBounded: a call that hangs is cut off at the bound.
func TestShutdownIsBounded(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI)))
	w := s.watchHealth(t, conn)
	reached := make(chan struct{})
	s.vault.SetBefore(func(ctx context.Context, _ string, _ secret.Key) error {
		close(reached)
		<-ctx.Done()
		return ctx.Err()
	})
	ended := make(chan error, 1)
	go func() {
		_, err := secretsv1.NewSecretsBrokerServiceClient(conn).GetSecret(callContext(t), &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind)})
		ended <- err
	}()
	<-reached
	bound, cut := context.WithCancel(context.Background())
	defer cut()
	over := s.shutdown(bound)
	notServing(t, w)
	select {
	case <-over:
		t.Error("the shutdown did not wait for the call")
	default:
	}
	cut()
	wantClosed(t, over, "the end of the shutdown")
	if err := <-ended; failed(t, err).code != codes.Unavailable {
		t.Errorf("the call that was cut off: got %v, want UNAVAILABLE", err)
	}
}

// TestStreamsDoNotHoldUpAShutdown: neither do those that are open for good, nor
// connections in the middle of a handshake. The bound of this shutdown never
// comes.
func TestStreamsDoNotHoldUpAShutdown(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.config = func(c *server.Config) { c.SetHandshakeTimeout(time.Hour) }
	s.startEmbedded()
	conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + operator)))
	w := s.watchHealth(t, conn)
	idle, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(callContext(t))
	if err != nil {
		t.Fatal(err)
	}
	used, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(callContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := used.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
			t.Fatal(err)
		}
		if _, err := used.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	unfinished := []net.Conn{s.silent(t, ""), s.silent(t, "\x16\x03\x01\x02\x00\x01\x00")}
	// A later connection that was accepted: the ones before it were, too.
	if _, err := s.as(consoleAPI).ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{}); err != nil {
		t.Fatal(err)
	}

	over := s.shutdown(context.Background())
	notServing(t, w)
	for _, r := range []grpc.BidiStreamingClient[reflectionpb.ServerReflectionRequest, reflectionpb.ServerReflectionResponse]{idle, used} {
		if _, err := r.Recv(); failed(t, err).code != codes.Unavailable {
			t.Errorf("reflection at a shutdown: got %v, want UNAVAILABLE", err)
		} else if f := failed(t, err); f.reason != secret.ShuttingDown {
			t.Errorf("reflection at a shutdown: got reason %q, want SHUTTING_DOWN", f.reason)
		}
	}
	for _, conn := range unfinished {
		if _, err := io.ReadAll(conn); isTimeout(err) {
			t.Error("an unfinished handshake goes on in spite of the shutdown")
		}
	}
	wantClosed(t, over, "the end of the shutdown")
}
