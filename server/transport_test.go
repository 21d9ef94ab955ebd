package server_test

import (
	"regexp"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/server"
)

// TestRefusedBeforeAHandler: what gRPC refuses is counted, and told with all that is
// known of it.
func TestRefusedBeforeAHandler(t *testing.T) {
	t.Parallel()
	s, count := counted(t, server.Bounds{}, nil)
	certificate := s.certificate(spiffe(consoleAPI))
	conn := s.dial(s.clientTLS(certificate))
	send := func(method string, in []byte) codes.Code {
		t.Helper()
		var out []byte
		return failed(t, conn.Invoke(callContext(t), method, in, &out, grpc.ForceCodec(bytesCodec{}))).code
	}
	for _, tt := range []struct {
		why    string
		method string
		in     []byte
		code   codes.Code
		told   bool // the method, which is one that there is
	}{
		{"decode", putSecret, []byte{0xff}, codes.Internal, true},
		{"too_large", putSecret, make([]byte, 64<<10+1), codes.ResourceExhausted, true},
		{"unknown_method", "/" + serviceName + "/PurgeSecret-s3cr3t", nil, codes.Unimplemented, false},
		{"unknown_method", "/another.Service-s3cr3t/Method", nil, codes.Unimplemented, false},
	} {
		before := count(tt.why)
		if got := send(tt.method, tt.in); got != tt.code {
			t.Errorf("%s: got %v, want %v", tt.method, got, tt.code)
		}
		wantCount(t, count, tt.why, before+1)
		parts := []string{"refused before a handler", "why=" + tt.why, "grpc.code=" + tt.code.String(), "caller=" + spiffe(consoleAPI), "serial=" + certificate.Cert.SerialNumber.Text(16), "peer.address=127.0.0.1:"}
		if tt.told {
			parts = append(parts, "grpc.method="+tt.method)
		}
		if !s.logHasLine(parts...) {
			t.Errorf("%s: no line with %q", tt.why, parts)
		}
	}
	if strings.Contains(s.log.String(), "s3cr3t") {
		t.Error("the log has names that the client made up")
	}
	w, err := conn.NewStream(callContext(t), &grpc.StreamDesc{ServerStreams: true}, "/"+serviceName+"/WatchSecrets", grpc.ForceCodec(bytesCodec{}))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.SendMsg([]byte{0xff}); err != nil {
		t.Fatal(err)
	}
	_ = w.CloseSend()
	var out []byte
	if f := failed(t, w.RecvMsg(&out)); f.code != codes.Internal {
		t.Errorf("a watch that does not decode: got %v, want INTERNAL", f.code)
	}
	wantCount(t, count, "decode", 2)
	// Headers over the limit, of clients that do not care what the server announced.
	for why, fields := range map[string]int{"headers": 5, "protocol": 1} {
		var padding [][2]string
		for range fields {
			padding = append(padding, [2]string{"x-padding", strings.Repeat("x", 17<<10/fields)})
		}
		c, block := s.rawHTTP2(t), healthCheckHeaders(padding...)
		c.send(frameHeaders, 0, 1, block[:len(block)/2])
		c.send(frameContinuation, flagEndHeaders, 1, block[len(block)/2:])
		wantCount(t, count, why, 1)
	}
	if err := list(t, secretsv1.NewSecretsBrokerServiceClient(conn)); err != nil {
		t.Errorf("a call afterwards: %v", err)
	}
}

// TestRefusalsAreToldTenASecond: the rest is a number.
func TestRefusalsAreToldTenASecond(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.config = func(c *server.Config) { c.Now = s.clock.Now } // stands still
	s.startEmbedded()
	conn := s.dial(s.clientTLS(s.certificate(spiffe(consoleAPI))))
	for range 25 {
		var out []byte
		if err := conn.Invoke(callContext(t), putSecret, []byte{0xff}, &out, grpc.ForceCodec(bytesCodec{})); err == nil {
			t.Fatal("garbage was answered")
		}
	}
	// In one number, or in two when making them took long.
	eventually(t, "the rest is told", func() bool {
		rest := 0
		for _, m := range regexp.MustCompile(`further=(\d+)`).FindAllStringSubmatch(s.log.String(), -1) {
			n, _ := strconv.Atoi(m[1])
			rest += n
		}
		return rest == 15
	})
	if n := strings.Count(s.log.String(), "why=decode"); n != 10 {
		t.Errorf("got %d lines in a second, want 10", n)
	}
	s.clock.advance(1e9)
	var out []byte
	_ = conn.Invoke(callContext(t), putSecret, []byte{0xff}, &out, grpc.ForceCodec(bytesCodec{}))
	if n := strings.Count(s.log.String(), "why=decode"); n != 11 {
		t.Errorf("got %d lines after the next second began, want 11", n)
	}
}
