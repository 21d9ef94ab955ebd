package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/devdir"
	"github.com/exto/secrets-broker/server"
)

// floor is the least that a gRPC server does: it answers every call with one and
// the same message, which is one that the broker gave before.
type floor struct {
	secretsv1.UnimplementedSecretsBrokerServiceServer
	get    secretsv1.GetSecretResponse
	verify secretsv1.VerifyTokenResponse
}

func (f *floor) GetSecret(context.Context, *secretsv1.GetSecretRequest) (*secretsv1.GetSecretResponse, error) {
	return &f.get, nil
}

func (f *floor) VerifyToken(context.Context, *secretsv1.VerifyTokenRequest) (*secretsv1.VerifyTokenResponse, error) {
	return &f.verify, nil
}

// Files in which the floor finds its answers.
const (
	floorGetFile    = "floor-get.pb"
	floorVerifyFile = "floor-verify.pb"
)

func writeAnswer(dir, name string, answer proto.Message) error {
	encoded, err := proto.Marshal(answer)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), encoded, 0o600)
}

func readAnswer(dir, name string, answer proto.Message) error {
	encoded, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	return proto.Unmarshal(encoded, answer)
}

// runFloor is the floor's process: grpc-go as it is without any option but the
// broker's own TLS, and the metrics that the broker has too. It ends with its
// standard input.
func runFloor(ctx context.Context, dir string) error {
	f := &floor{}
	if err := errors.Join(readAnswer(dir, floorGetFile, &f.get), readAnswer(dir, floorVerifyFile, &f.verify)); err != nil {
		return err
	}
	cert, key := devdir.PairFiles(dir, "server")
	trust, err := server.OpenTrust(server.TrustConfig{Logger: slog.Default(), Files: server.Files{
		Cert: cert, Key: key, ClientCA: filepath.Join(dir, "ca.pem"), Policy: filepath.Join(dir, "policy.yaml"),
	}})
	if err != nil {
		return err
	}
	calls, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	operations, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	go func() { _ = http.Serve(operations, promhttp.HandlerFor(metrics, promhttp.HandlerOpts{})) }() // to the end of the process

	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(trust.TLS())))
	secretsv1.RegisterSecretsBrokerServiceServer(s, f)
	// As the broker says it, so that both are started alike.
	slog.New(slog.NewTextHandler(os.Stderr, nil)).Info("listening", "grpc", calls.Addr().String(), "metrics", operations.Addr().String())
	go func() {
		untilReleased(ctx, os.Stdin)
		s.Stop()
	}()
	return s.Serve(calls)
}

// untilReleased waits until the parent closes this process's standard input or
// ends, or until ctx does.
func untilReleased(ctx context.Context, in io.Reader) {
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, in)
		close(ended)
	}()
	wait(ctx, ended)
}
