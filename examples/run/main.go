// Command run runs the examples on this machine: a broker on an encrypted store,
// PostgreSQL where it is installed and SQLite elsewhere, the Console API, the
// worker and one instance. It prints calls to try, and ends all with Ctrl-C. What
// it makes is in a temporary folder, and removed.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"text/template"
	"time"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: run FOLDER, which has the programs broker, console-api, worker and instance")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	defer stop()
	if err := run(ctx, os.Args[1], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "examples:", err)
		os.Exit(1)
	}
}

// interval is between the calls of the instance, for somebody who reads along.
const interval = 5 * time.Second

// run starts all, and ends all when ctx ends or one of them does.
func run(ctx context.Context, bin string, out io.Writer) (err error) {
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "secrets-broker-examples-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	dbDir, err := os.MkdirTemp("", "secrets-broker-database-") // apart: it may belong to another user
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dbDir)) }()
	var printing sync.Mutex
	s := &system{bin: bin, dir: dir, supervisor: newSupervisor(func(process, line string) {
		printing.Lock()
		defer printing.Unlock()
		fmt.Fprintf(out, "%-11s | %s\n", process, line)
	})}
	defer s.stop()

	s.db, err = startPostgres(ctx, s.supervisor, dbDir)
	if errors.Is(err, errNoPostgres) {
		s.line("examples", err.Error()+": SQLite takes its place, and the worker can open no instance's database")
		s.db, err = startSQLite(dbDir), nil
	}
	for _, step := range []func() error{
		func() error { return err },
		s.prepare,
		func() error { _, err := s.addresses(ctx); return err },
		func() error {
			_, err := s.startBroker(ctx, "SECRET_STORE_PROVIDER=embedded", "BROKER_DATA_DIR="+dir)
			return err
		},
		func() error { _, err := s.startConsole(ctx); return err },
		func() error { return s.startWorker(ctx, time.Second) },
		func() error { return s.create(ctx) },
		func() error { return s.startInstance(ctx, interval) },
	} {
		if err := step(); err != nil {
			if ctx.Err() != nil {
				return nil // told to end
			}
			return err
		}
	}
	printing.Lock()
	err = calls.Execute(out, map[string]string{
		"Console": "http://" + s.console, "Operator": s.operatorFile(), "Create": s.bodyFile("create"), "Connection": s.bodyFile("connection"),
	})
	printing.Unlock()
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return nil
	case name := <-s.failed:
		return fmt.Errorf("%s ended", name)
	}
}

var calls = template.Must(template.New("calls").Parse(`
All is running. Paste any of these into another terminal, and watch this one. Ctrl-C ends it all.

# rotate the token of the instance; the old one is good for ten more minutes
curl -sS -H @{{.Operator}} -d '{"grace": "10m"}' {{.Console}}/instances/demo/rotate
# rotate it, and the old one is refused at once
curl -sS -H @{{.Operator}} -d '{"grace": "0s"}' {{.Console}}/instances/demo/rotate
# give it another database
curl -sS -H @{{.Operator}} -X PUT -d @{{.Connection}} {{.Console}}/instances/demo/connection
# decommission it: its calls are refused from now on
curl -sS -H @{{.Operator}} -X DELETE {{.Console}}/instances/demo
# create it again: it goes on
curl -sS -H @{{.Operator}} -d @{{.Create}} {{.Console}}/instances

`))
