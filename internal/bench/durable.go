package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/embedded"
)

// The ways to put something on disk for good: the store, and what bbolt itself
// offers for one put of the same size, sealed in the same way.
const (
	storeSet    = "Set"
	boltUpdate  = "Update" // a commit for each
	boltBatch   = "Batch"
	liveBucket  = "live"
	durableFew  = 1
	durableMany = 64
)

// durableResult is how many puts a second each way did, round by round.
type durableResult map[durableWay][]float64

type durableWay struct {
	name    string
	callers int
}

// ratios divides a way's rate by another's in each round.
func (d durableResult) ratios(way, base durableWay) spread {
	var all []float64
	for round, rate := range d[way] {
		all = append(all, rate/d[base][round])
	}
	return spreadOf(all)
}

// storeTags are as many and as long as the broker writes, and say to it what it
// writes itself.
func storeTags(key secret.Key) vault.Tags {
	return vault.Tags{
		"exto-format": "1", "exto-key": key.String(), "exto-generation": "3",
		"exto-created-by": "spiffe://console.exto/console-api", "exto-epoch": "1790000000000 0b9d3c1e-5f7a-4d07-9c5e-0123456789ab",
		"exto-operation": "p:0b9d3c1e-5f7a-4d07-9c5e-0123456789ab",
	}
}

func uriKey(instance string) (secret.Key, error) {
	id, err := secret.ParseInstanceID(instance)
	if err != nil {
		return secret.Key{}, err
	}
	return secret.NewKey(id, secret.DatabaseURI)
}

// durablePut is one put by one way.
type durablePut struct {
	durableWay
	put func(context.Context) error
}

// measureDurable compares the ways, each with one caller and with many.
func (b *bench) measureDurable(ctx context.Context) (durableResult, error) {
	var puts []durablePut
	for _, callers := range []int{durableFew, durableMany} {
		// Each way has a file of its own, so that none works on the larger one of
		// another.
		dir := filepath.Join(b.dir, fmt.Sprint("durable", callers))
		store, err := embedded.Open(embedded.Config{Dir: dir, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			return nil, err
		}
		defer func() { _ = store.Close() }()
		puts = append(puts, durablePut{durableWay{storeSet, callers}, func(ctx context.Context) error { return set(ctx, store, uuid.NewString()) }})
		for _, name := range []string{boltUpdate, boltBatch} {
			db, put, err := boltPut(filepath.Join(dir, name), name)
			if err != nil {
				return nil, err
			}
			defer func() { _ = db.Close() }()
			puts = append(puts, durablePut{durableWay{name, callers}, put})
		}
	}
	result := durableResult{}
	for round := range b.rounds {
		b.say("the store beside bbolt: round %d of %d", round+1, b.rounds)
		if round > 0 {
			slices.Reverse(puts)
		}
		for _, p := range puts {
			rate, err := p.rate(ctx, b.storeWindow)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", p.name, err)
			}
			result[p.durableWay] = append(result[p.durableWay], rate)
		}
	}
	return result, nil
}

// rate is how many puts a second the callers get done.
func (p durablePut) rate(ctx context.Context, window time.Duration) (float64, error) {
	var n atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	for range p.callers {
		group.Go(func() error {
			for time.Since(start) < window {
				if err := p.put(ctx); err != nil {
					return err
				}
				n.Add(1)
			}
			return nil
		})
	}
	err := group.Wait()
	return float64(n.Load()) / time.Since(start).Seconds(), err
}

// set stores the database URI of an instance.
func set(ctx context.Context, store *embedded.Store, instance string) error {
	key, err := uriKey(instance)
	if err != nil {
		return err
	}
	_, err = store.Set(ctx, key, vault.NewVersion{Value: secret.NewValue(databaseURI(numberMark)), Tags: storeTags(key)})
	return err
}

// boltPut is a put straight into a bbolt file, of what set stores, sealed alike.
func boltPut(path, how string) (*bbolt.DB, func(context.Context) error, error) {
	handle, err := keyset.NewHandle(aead.AES256GCMKeyTemplate())
	if err != nil {
		return nil, nil, err
	}
	primitive, err := aead.New(handle)
	if err != nil {
		return nil, nil, err
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return nil, nil, err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucket([]byte(liveBucket))
		return err
	})
	if err != nil {
		_ = db.Close()
		return nil, nil, err
	}
	do := map[string]func(func(*bbolt.Tx) error) error{boltUpdate: db.Update, boltBatch: db.Batch}[how]
	return db, func(ctx context.Context) error {
		key, err := uriKey(uuid.NewString())
		if err != nil {
			return err
		}
		header := make([]byte, 48) // of a record, without its attributes
		for name, value := range storeTags(key) {
			header = append(append(append(header, 0, 0), name...), value...)
		}
		name := []byte(key.String())
		sealed, err := primitive.Encrypt([]byte(databaseURI(numberMark)), name)
		if err != nil {
			return err
		}
		record := slices.Concat(header, sealed)
		if err := ctx.Err(); err != nil {
			return err
		}
		return do(func(tx *bbolt.Tx) error { return tx.Bucket([]byte(liveBucket)).Put(name, record) })
	}, nil
}

// fsyncTime is the median time of a small durable write in that folder, by which
// puts of one machine compare with those of another.
func fsyncTime(dir string) (time.Duration, error) {
	f, err := os.CreateTemp(dir, "fsync-*")
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close(); _ = os.Remove(f.Name()) }()
	var took []time.Duration
	page := make([]byte, 4096)
	for range 25 {
		begun := time.Now()
		if _, err := f.Write(page); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		took = append(took, time.Since(begun))
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}
