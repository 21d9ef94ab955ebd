// Command instance is a customer's instance: it reads its three secrets when it
// starts, holds them, and calls the Console with its token through every rotation,
// without a restart.
//
// It is told by the environment:
//
//	INSTANCE_ID
//	CONSOLE_URL  of the Console API
//	INTERVAL     between two calls; 1s if unset
//	BROKER_ADDRESS BROKER_CERT_FILE BROKER_KEY_FILE BROKER_CA_FILE
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/secret"
)

func main() {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		slog.Error("instance ended", "error", err)
		os.Exit(1)
	}
}

// run calls the Console until ctx ends. It does not start without its secrets.
func run(ctx context.Context) (err error) {
	interval, err := time.ParseDuration(cmp.Or(os.Getenv("INTERVAL"), "1s"))
	if err != nil || interval <= 0 {
		return errors.New("INTERVAL: it must be a duration such as 1s")
	}
	id, err := secret.ParseInstanceID(os.Getenv("INSTANCE_ID"))
	if err != nil {
		return fmt.Errorf("INSTANCE_ID: %w", err)
	}
	address, err := url.JoinPath(os.Getenv("CONSOLE_URL"), "v1/instances", id.String(), "hello")
	if err != nil {
		return fmt.Errorf("CONSOLE_URL: %w", err)
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
	own, err := client.NewInstance(ctx, broker, id, client.InstanceOptions{})
	if err != nil {
		return err
	}
	slog.Info("ready", "token", own.Token.Value().Generation, "database_uri", own.DatabaseURI.Value().Generation, "oidc_client_secret", own.OIDCClientSecret.Value().Generation)

	console := &console{address: address, token: own.Token, http: &http.Client{Timeout: time.Minute}}
	uriChanged := own.DatabaseURI.Changed()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			console.call(ctx)
		case <-uriChanged: // its pool of connections would be made anew here
			uriChanged = own.DatabaseURI.Changed()
			if held := own.DatabaseURI.Value(); held.Err != nil {
				slog.Warn("no database", "error", held.Err)
			} else {
				slog.Info("another database", "generation", held.Generation)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// console calls the Console API and counts what it answers.
type console struct {
	address                string
	token                  *client.Source
	http                   *http.Client
	calls, refused, failed int
}

// call makes one call. When the token is refused it asks for a newer one, and
// calls again with that if there is one.
func (c *console) call(ctx context.Context) {
	held := c.token.Value()
	for {
		status, err := c.hello(ctx, held.Value)
		if ctx.Err() != nil {
			return
		}
		c.calls++
		switch {
		case status == http.StatusUnauthorized:
			c.refused++
		case err != nil || status != http.StatusOK:
			c.failed++
		}
		slog.Info("called", "status", status, "generation", held.Generation, "calls", c.calls, "refused", c.refused, "failed", c.failed, "error", err)
		if status != http.StatusUnauthorized {
			return
		}
		newer, err := c.token.Unauthorized(ctx, held.Version)
		if err != nil || newer.Version == held.Version {
			return // no newer token: refused until there is one
		}
		held = newer
	}
}

func (c *console) hello(ctx context.Context, token secret.Value) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.address, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+token.Reveal())
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, resp.Body) // so that the connection is used again
	return resp.StatusCode, errors.Join(err, resp.Body.Close())
}
