package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/exto/secrets-broker/internal/devdir"
)

const devDir = devdir.Name

// devCommand is serve with settings that need no set-up, and nothing else
// changed.
type devCommand struct {
	ListenAddress string `name:"listen-address" env:"BROKER_LISTEN_ADDRESS" default:"127.0.0.1:7443" help:"Address of the gRPC server."`
	serverSettings
}

// Run makes what is missing in .broker-dev and serves from it until ctx ends.
func (c devCommand) Run(ctx context.Context, s streams) error {
	if err := devdir.Prepare(devDir, time.Now()); err != nil {
		return devError(err)
	}
	in := func(name string) string { return filepath.Join(devDir, name) }
	serve := serveCommand{
		SecretStoreProvider: "embedded",
		ListenAddress:       c.ListenAddress,
		TLSCertFile:         in("server.pem"),
		TLSKeyFile:          in("server-key.pem"),
		TLSClientCAFile:     in("ca.pem"),
		PolicyFile:          in("policy.yaml"),
		AuditFile:           in("audit.log"),
		DataDir:             devDir,
		serverSettings:      c.serverSettings,
	}
	log, err := c.logger(s.err)
	if err != nil {
		return err
	}
	var renewing sync.WaitGroup
	renewCtx, stop := context.WithCancel(ctx)
	defer func() { stop(); renewing.Wait() }()
	renewing.Go(func() { devdir.KeepRenewed(renewCtx, devDir, log) })
	err = serve.serve(ctx, s, func(addr net.Addr) {
		if err := devdir.PrintCalls(s.out, devDir, addr.String()); err != nil {
			log.Error("the sample calls could not be printed", "error", err)
		}
	})
	if bad := (*fileError)(nil); errors.As(err, &bad) {
		return devError(bad.error) // nobody set the file
	}
	return err
}

// devError says what to do about what is wrong in the folder.
func devError(err error) error {
	return fmt.Errorf("%s: %w; end the other broker that runs here, move %s away to begin anew, or run broker dev in another folder", devDir, err, devDir)
}
