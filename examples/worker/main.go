// Command worker works on the databases of all instances: it takes a row's
// db_uri_ref, holds the URI that the broker has under that name, and goes over to
// another database when the URI changes.
//
// It is told by the environment:
//
//	DATABASE_URL  of the Console's rows: postgres://… or sqlite:FILE
//	INTERVAL      between two looks at the rows; 1s if unset
//	BROKER_ADDRESS BROKER_CERT_FILE BROKER_KEY_FILE BROKER_CA_FILE
package main

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/examples/rows"
	"github.com/exto/secrets-broker/secret"
)

// retry is how long it waits before it tries a database again.
const retry = 5 * time.Second

func main() {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		slog.Error("worker ended", "error", err)
		os.Exit(1)
	}
}

// run works until ctx ends.
func run(ctx context.Context) (err error) {
	interval, err := time.ParseDuration(cmp.Or(os.Getenv("INTERVAL"), "1s"))
	if err != nil || interval <= 0 {
		return errors.New("INTERVAL: it must be a duration such as 1s")
	}
	table, err := rows.Open(os.Getenv("DATABASE_URL"))
	if err != nil {
		return fmt.Errorf("DATABASE_URL: %w", err)
	}
	defer func() { err = errors.Join(err, table.Close()) }()
	broker, err := client.New(os.Getenv("BROKER_ADDRESS"), client.Config{
		CertFile: os.Getenv("BROKER_CERT_FILE"),
		KeyFile:  os.Getenv("BROKER_KEY_FILE"),
		CAFile:   os.Getenv("BROKER_CA_FILE"),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, broker.Close()) }()

	var working sync.WaitGroup
	defer working.Wait()
	stops := map[string]context.CancelFunc{} // by db_uri_ref
	defer func() {
		for _, stop := range stops {
			stop()
		}
	}()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		active, err := table.Active(ctx)
		if err != nil { // it goes on with those that it has
			slog.Warn("the rows were not read", "error", err)
		} else {
			gone := stops
			stops = map[string]context.CancelFunc{}
			for _, row := range active {
				ref := row.DBURIRef
				stop := gone[ref]
				if stop == nil {
					var rowCtx context.Context
					rowCtx, stop = context.WithCancel(ctx)
					working.Go(func() { work(rowCtx, broker, ref) })
				}
				delete(gone, ref)
				stops[ref] = stop
			}
			for _, stop := range gone {
				stop()
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// work keeps one instance's database open, whichever it is at the time, until ctx
// ends.
func work(ctx context.Context, broker *client.Client, ref string) {
	log := slog.With("db_uri_ref", ref)
	key, err := client.ParseKey(ref)
	if err != nil {
		log.Error("the row is not usable", "error", err)
		return
	}
	uri, err := hold(ctx, broker, key, log)
	if err != nil {
		return // ctx ended
	}
	var db *sql.DB
	use := func(other *sql.DB) {
		if db != nil {
			_ = db.Close()
		}
		db = other
	}
	defer use(nil)
	for {
		changed, held := uri.Changed(), uri.Value()
		var again <-chan time.Time
		if errors.Is(held.Err, client.ErrNotFound) || errors.Is(held.Err, client.ErrDisabled) {
			log.Warn("database closed", "error", held.Err)
			use(nil)
		} else if opened, name, err := open(ctx, held.Value); err != nil {
			log.Warn("database not opened", "database", name, "generation", held.Generation, "error", err)
			again = time.After(retry)
		} else {
			log.Info("database opened", "database", name, "generation", held.Generation)
			use(opened)
		}
		select {
		case <-changed:
		case <-again:
		case <-ctx.Done():
			return
		}
	}
}

// hold begins to hold a URI, and does not give up before ctx ends.
func hold(ctx context.Context, broker *client.Client, key secret.Key, log *slog.Logger) (*client.Source, error) {
	for {
		uri, err := client.NewSource(ctx, broker, key, client.SourceOptions{AllowMissing: true})
		if err == nil {
			return uri, nil
		}
		log.Warn("the URI was not read", "error", err)
		select {
		case <-time.After(retry):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// open opens a database and brings its tables up to date. The name is what may be
// logged of a URI.
func open(ctx context.Context, uri secret.Value) (db *sql.DB, name string, err error) {
	config, err := pgx.ParseConfig(uri.Reveal())
	if err != nil { // its error quotes the URI
		return nil, "", errors.New("this worker has no driver for it: only for postgres://")
	}
	db = stdlib.OpenDB(*config)
	for _, statement := range []string{
		`create table if not exists worker_visits (at timestamptz not null)`,
		`insert into worker_visits values (now())`,
	} {
		if _, err := db.ExecContext(ctx, statement); err != nil {
			return nil, config.Database, errors.Join(err, db.Close())
		}
	}
	return db, config.Database, nil
}
