// Command console-api is a Console API that keeps its instances' secrets with the
// broker: it makes, rotates, connects and decommissions instances, and lets them
// in by their tokens, which it never holds.
//
// It is told by the environment:
//
//	LISTEN_ADDRESS        of HTTP, on loopback: there is no TLS here
//	OPERATOR_HEADER_FILE  0600, one line "Authorization: Bearer …": who sends this
//	                      header is the operator. curl takes the file as -H @FILE
//	DATABASE_URL          postgres://… or sqlite:FILE
//	BROKER_ADDRESS BROKER_CERT_FILE BROKER_KEY_FILE BROKER_CA_FILE
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/examples/rows"
	"github.com/exto/secrets-broker/secret"
)

func main() {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		slog.Error("console-api ended", "error", err)
		os.Exit(1)
	}
}

// run serves until ctx ends, and then waits for the requests under way.
func run(ctx context.Context) (err error) {
	operator, err := readOperator(os.Getenv("OPERATOR_HEADER_FILE"))
	if err != nil {
		return fmt.Errorf("OPERATOR_HEADER_FILE: %w", err)
	}
	table, err := rows.Open(os.Getenv("DATABASE_URL"))
	if err != nil {
		return fmt.Errorf("DATABASE_URL: %w", err)
	}
	defer func() { err = errors.Join(err, table.Close()) }()
	if err := table.Prepare(ctx); err != nil {
		return fmt.Errorf("the table of instances: %w", err)
	}
	broker, err := client.New(os.Getenv("BROKER_ADDRESS"), client.Config{
		CertFile: os.Getenv("BROKER_CERT_FILE"),
		KeyFile:  os.Getenv("BROKER_KEY_FILE"),
		CAFile:   os.Getenv("BROKER_CA_FILE"),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, broker.Close()) }()
	verifier := client.NewVerifier(ctx, broker, client.VerifierOptions{Instances: 1000})

	listener, err := net.Listen("tcp", os.Getenv("LISTEN_ADDRESS"))
	if err != nil {
		return fmt.Errorf("LISTEN_ADDRESS: %w", err)
	}
	if !listener.Addr().(*net.TCPAddr).IP.IsLoopback() {
		return errors.Join(errors.New("LISTEN_ADDRESS: tokens must not travel without TLS: only loopback, such as 127.0.0.1:8080"), listener.Close())
	}
	server := &http.Server{
		Handler:           (&api{broker: broker, verifier: verifier, table: table, operator: operator}).routes(),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		IdleTimeout:       2 * time.Minute,
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	slog.Info("listening", "http", listener.Addr().String())
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	wait, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return server.Shutdown(wait)
}

// readOperator reads the token of the operator, and refuses one that others on
// this machine can read.
func readOperator(file string) (secret.Value, error) {
	info, err := os.Stat(file)
	if err != nil {
		return secret.Value{}, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return secret.Value{}, fmt.Errorf("%s: others can read it: chmod 600", file)
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return secret.Value{}, err
	}
	token, ok := strings.CutPrefix(strings.TrimSpace(string(content)), "Authorization: Bearer ")
	if !ok || token == "" {
		return secret.Value{}, fmt.Errorf("%s: its one line must be Authorization: Bearer TOKEN", file)
	}
	return secret.NewValue(token), nil
}
