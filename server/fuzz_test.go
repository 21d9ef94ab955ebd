package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/server"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault/noop"
)

// framed is a gRPC message as it stands on the wire.
func framed(message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
}

// FuzzRequest sends bytes as the body of each RPC, over TLS and HTTP/2. It looks
// that each call ends, with a status that is no defect, and that the server serves
// on. Bytes that are not framed are the frames themselves.
func FuzzRequest(f *testing.F) {
	s := newFuzzed(f)
	conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI)))
	tlsConfig := s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI))
	transport := &http.Transport{TLSClientConfig: tlsConfig, ForceAttemptHTTP2: true}
	f.Cleanup(transport.CloseIdleConnections)

	methods := make([]string, 0, len(decisions()))
	for method, d := range decisions() {
		if d.request != nil {
			methods = append(methods, method)
		}
	}
	slices.Sort(methods)
	for i, method := range methods {
		valid, err := proto.Marshal(decisions()[method].request("demo"))
		if err != nil {
			f.Fatal(err)
		}
		for _, body := range [][]byte{
			nil, valid, valid[:len(valid)/2], append(slices.Clone(valid), valid...),
			append(slices.Clone(valid), 0x12, 0x02, 0xff, 0xfe),                                     // not UTF-8
			append(slices.Clone(valid), 0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f),                         // longer than it is
			append(slices.Clone(valid), bytes.Repeat([]byte{0x0b}, 20_000)...),                      // groups in groups
			append(slices.Clone(valid), 0x1a, 0x02, 0x10, 0xff, 0x22, 0x0b, 0x08, 0xff, 0xff, 0xff), // durations
		} {
			f.Add(byte(i), true, body)
		}
		for _, body := range [][]byte{
			nil, framed(valid), framed(valid)[:7], append(framed(valid), framed(valid)...),
			append([]byte{1}, framed(valid)[1:]...), // said to be compressed
			{0, 0xff, 0xff, 0xff, 0xff, 1},
		} {
			f.Add(byte(i), false, body)
		}
	}
	healthy := healthpb.NewHealthClient(conn)
	f.Fuzz(func(t *testing.T, method byte, message bool, body []byte) {
		if message {
			body = framed(body)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		path := methods[int(method)%len(methods)]
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+s.addr+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/grpc")
		req.Header.Set("TE", "trailers")
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		defer func() { _ = resp.Body.Close() }()
		status := resp.Header
		if status.Get("Grpc-Status") == "" && path == secretsv1.SecretsBrokerService_WatchSecrets_FullMethodName {
			// A watch stays open: its first event is the answer.
			if _, err := io.ReadFull(resp.Body, make([]byte, 5)); err != nil && err != io.EOF {
				t.Fatalf("%s: %v", path, err)
			}
		} else {
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			if status.Get("Grpc-Status") == "" {
				status = resp.Trailer
			}
			if status.Get("Grpc-Status") == "" || strings.Contains(status.Get("Grpc-Message"), "DEFECT") {
				t.Errorf("%s: got status %q, %q, want one that is no defect", path, status.Get("Grpc-Status"), status.Get("Grpc-Message"))
			}
		}
		if _, err := healthy.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
			t.Fatalf("%s: the server afterwards: %v", path, err)
		}
	})
}

// newFuzzed is a system without a store and with a log that nobody reads.
func newFuzzed(f *testing.F) *system {
	f.Helper()
	s := newSystem(f)
	s.config = func(cfg *server.Config) { cfg.Logger = slog.New(slog.DiscardHandler) }
	s.heart = func(cfg *broker.Config) { cfg.Logger = slog.New(slog.DiscardHandler) }
	s.startOn(noop.New(slog.New(slog.DiscardHandler)))
	return s
}
