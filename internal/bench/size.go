package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/exto/secrets-broker/server/vault/embedded"
)

const (
	sizeCallers = 16
	sizeRounds  = 3
	// hotSecrets are how many the cached Gets ask for: as many as the smallest
	// store has.
	hotSecrets = 1000
	// fillers share commits: the more they are, the fewer it takes.
	fillers = 10_000
)

// sizeResult is what a store of so many secrets gave.
type sizeResult struct {
	secrets    int
	file       int64 // bytes
	fill       time.Duration
	start      time.Duration
	afterStart footprint
	afterReads footprint
	reads      int    // about how many came before afterReads, cold and of any secret
	cold       []pair // beside those of the smallest store
	cached     []pair
}

// footprint is what a broker has of the machine's memory.
type footprint struct{ resident, anonymous int64 }

func footprintOf(t *target) (footprint, error) {
	resident, anonymous, err := memory(t.cmd.Process.Pid)
	return footprint{resident, anonymous}, err
}

// measureSizes measures a broker on stores of several sizes. The smallest one is
// measured beside each.
func (b *bench) measureSizes(ctx context.Context) ([]sizeResult, error) {
	var results []sizeResult
	var smallest *target
	for _, secrets := range b.sizes {
		folder := filepath.Join(b.dir, fmt.Sprint("size", secrets))
		r := sizeResult{secrets: secrets}
		b.say("a store of %d secrets: filling it", secrets)
		begun := time.Now()
		if err := fillStore(ctx, folder, secrets); err != nil {
			return nil, fmt.Errorf("filling a store of %d secrets: %w", secrets, err)
		}
		r.fill = time.Since(begun)
		info, err := os.Stat(filepath.Join(folder, "store.db"))
		if err != nil {
			return nil, err
		}
		r.file = info.Size()
		b.say("a store of %d secrets: measuring", secrets)
		t, err := startBroker(ctx, b.broker, b.dir, embeddedStore(folder)...)
		if err != nil {
			return nil, err
		}
		defer t.stop()
		if smallest == nil {
			smallest = t
		}
		if err := b.measureSize(ctx, t, smallest, &r); err != nil {
			return nil, fmt.Errorf("a store of %d secrets: %w", secrets, err)
		}
		results = append(results, r)
		if t != smallest {
			t.stop()
			if err := os.RemoveAll(folder); err != nil {
				return nil, err
			}
		}
	}
	return results, nil
}

func (b *bench) measureSize(ctx context.Context, t, smallest *target, r *sizeResult) (err error) {
	r.start = t.started
	if r.afterStart, err = footprintOf(t); err != nil {
		return err
	}
	cold, err := coldGet.request(r.secrets)
	if err != nil {
		return err
	}
	coldOfSmallest, err := coldGet.request(b.sizes[0])
	if err != nil {
		return err
	}
	cached, err := cachedGet.request(hotSecrets)
	if err != nil {
		return err
	}
	for range sizeRounds {
		var c, h pair
		if c.subject, err = t.load(ctx, cold, sizeCallers, b.warm, b.window); err != nil {
			return err
		}
		if h.subject, err = t.load(ctx, cached, sizeCallers, b.warm, b.window); err != nil {
			return err
		}
		c.base, h.base = c.subject, h.subject
		if t != smallest {
			if c.base, err = smallest.load(ctx, coldOfSmallest, sizeCallers, b.warm, b.window); err != nil {
				return err
			}
		}
		r.cold, r.cached = append(r.cold, c), append(r.cached, h)
		r.reads += int(c.subject.Rate * (b.warm + b.window).Seconds())
	}
	r.afterReads, err = footprintOf(t)
	return err
}

// fillStore makes a store of so many secrets, in an order that is not that of
// their names, as they would come.
func fillStore(ctx context.Context, folder string, secrets int) (err error) {
	const stride = 611953 // a prime, so that every number comes once
	store, err := embedded.Open(embedded.Config{Dir: folder, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer func() {
		if closed := store.Close(); err == nil {
			err = closed
		}
	}()
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range fillers {
		group.Go(func() error {
			for {
				n := int(next.Add(1) - 1)
				if n >= secrets {
					return nil
				}
				if err := set(ctx, store, instance(digits(n*stride%secrets))); err != nil {
					return err
				}
			}
		})
	}
	return group.Wait()
}
