package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"text/template"
	"time"
)

const (
	devDir = ".broker-dev"
	// renewEvery is how often a running dev broker looks for certificates that
	// end soon.
	renewEvery = time.Hour
)

// devPolicy is the policy that a new folder gets.
//
//go:embed dev_policy.yaml
var devPolicy []byte

//go:embed dev_calls.tmpl
var devCalls string

// devCommand is serve with settings that need no set-up, and nothing else
// changed.
type devCommand struct {
	ListenAddress string `name:"listen-address" env:"BROKER_LISTEN_ADDRESS" default:"127.0.0.1:7443" help:"Address of the gRPC server."`
	serverSettings
}

// Run makes what is missing in .broker-dev and serves from it until ctx ends.
func (c devCommand) Run(ctx context.Context, s streams) error {
	if err := prepareDev(devDir, time.Now()); err != nil {
		return fmt.Errorf("%s: %w", devDir, err)
	}
	in := func(name string) string { return filepath.Join(devDir, name) }
	serve := serveCommand{
		SecretStoreProvider: "embedded",
		ListenAddress:       c.ListenAddress,
		TLSCertFile:         in("server.pem"),
		TLSKeyFile:          in("server-key.pem"),
		TLSClientCAFile:     in("ca.pem"),
		PolicyFile:          in("policy.yaml"),
		DataDir:             devDir,
		serverSettings:      c.serverSettings,
	}
	log, err := c.logger(s.err)
	if err != nil {
		return err
	}
	renewed := make(chan struct{})
	renewCtx, stop := context.WithCancel(ctx)
	defer func() { stop(); <-renewed }()
	go func() {
		defer close(renewed)
		tick := time.NewTicker(renewEvery)
		defer tick.Stop()
		for {
			select {
			case <-renewCtx.Done():
				return
			case now := <-tick.C:
				if err := ensureCertificates(devDir, now); err != nil {
					log.Error("certificates were not renewed", "error", err)
				}
			}
		}
	}()
	return serve.serve(ctx, s, func(addr net.Addr) {
		var calls bytes.Buffer
		if err := template.Must(template.New("calls").Parse(devCalls)).Execute(&calls, map[string]string{"Dir": devDir, "Address": addr.String()}); err != nil {
			log.Error("the sample calls could not be printed", "error", err)
		}
		_, _ = s.out.Write(calls.Bytes())
	})
}

// prepareDev makes the folder and what is missing in it. A policy that is there
// stays as it is.
func prepareDev(dir string, now time.Time) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, content := range map[string][]byte{".gitignore": []byte("*\n"), "policy.yaml": devPolicy} {
		file := filepath.Join(dir, name)
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			if err := writeFile(file, content, 0o644); err != nil {
				return err
			}
		}
	}
	return ensureCertificates(dir, now)
}

// writeFile puts a whole file in place or none.
func writeFile(name string, content []byte, mode fs.FileMode) error {
	temp, err := os.CreateTemp(filepath.Dir(name), ".new-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(temp.Name()) }()
	_, err = temp.Write(content)
	if err = errors.Join(err, temp.Chmod(mode), temp.Sync(), temp.Close()); err != nil {
		return err
	}
	return os.Rename(temp.Name(), name)
}
