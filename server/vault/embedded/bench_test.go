package embedded_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"go.etcd.io/bbolt"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
	"github.com/exto/secrets-broker/server/vault/embedded"
)

// benchTags are as many and as long as the broker writes.
var benchTags = vault.Tags{
	"exto-format": "1", "exto-key": "instance-0b9d3c1e-5f7a-4d07-9c5e-0123456789ab", "exto-generation": "3",
	"exto-created-by": "spiffe://console.exto/console-api", "exto-epoch": "1790000000000 0b9d3c1e-5f7a-4d07-9c5e-0123456789ab",
	"exto-operation": "p:0b9d3c1e-5f7a-4d07-9c5e-0123456789ab",
}

const benchValue = "postgres://app:0123456789abcdef@db-7.internal.example:5432/orders?sslmode=verify-full"

func benchKey(b *testing.B) secret.Key {
	id, err := secret.ParseInstanceID(uuid.NewString())
	if err != nil {
		b.Fatal(err)
	}
	key, err := secret.NewKey(id, secret.DatabaseURI)
	if err != nil {
		b.Fatal(err)
	}
	return key
}

// BenchmarkDurable compares Set with what bbolt itself offers for one put of the
// same size, sealed in the same way: Update, with a commit for each, and Batch.
// Rounds alternate, since the machine may be busy with other things; the figures
// are medians.
func BenchmarkDurable(b *testing.B) {
	const (
		rounds = 7
		during = 700 * time.Millisecond
	)
	handle, err := keyset.NewHandle(aead.AES256GCMKeyTemplate())
	if err != nil {
		b.Fatal(err)
	}
	primitive, err := aead.New(handle)
	if err != nil {
		b.Fatal(err)
	}
	var attrs []byte
	for name, value := range benchTags {
		attrs = append(append(append(attrs, 0, 0), name...), value...)
	}
	header := make([]byte, 48)

	put := func(do func(func(*bbolt.Tx) error) error) error {
		key := []byte(benchKey(b).String())
		sealed, err := primitive.Encrypt([]byte(benchValue), key)
		if err != nil {
			return err
		}
		record := slices.Concat(header, attrs, sealed)
		return do(func(tx *bbolt.Tx) error { return tx.Bucket([]byte("live")).Put(key, record) })
	}
	type way struct {
		name    string
		callers int
		put     func() error
	}
	var ways []way
	// Each has a file of its own, so that none works on the larger one of another.
	for _, callers := range []int{1, 64} {
		s, err := embedded.Open(embedded.Config{Dir: b.TempDir(), Logger: quiet})
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		ways = append(ways, way{"Set", callers, func() error {
			_, err := s.Set(b.Context(), benchKey(b), vault.NewVersion{Value: secret.NewValue(benchValue), Tags: benchTags})
			return err
		}})
		for _, name := range []string{"Update", "Batch"} {
			db, err := bbolt.Open(filepath.Join(b.TempDir(), name), 0o600, &bbolt.Options{FreelistType: bbolt.FreelistMapType})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = db.Close() }()
			err = db.Update(func(tx *bbolt.Tx) error {
				_, err := tx.CreateBucket([]byte("live"))
				return err
			})
			if err != nil {
				b.Fatal(err)
			}
			do := map[string]func(func(*bbolt.Tx) error) error{"Update": db.Update, "Batch": db.Batch}[name]
			ways = append(ways, way{name, callers, func() error { return put(do) }})
		}
	}
	rates := map[string][]float64{}
	for range rounds {
		for _, way := range ways {
			var n atomic.Int64
			var wg sync.WaitGroup
			start := time.Now()
			for range way.callers {
				wg.Go(func() {
					for time.Since(start) < during {
						if err := way.put(); err != nil {
							b.Error(err)
							return
						}
						n.Add(1)
					}
				})
			}
			wg.Wait()
			at := fmt.Sprint(way.name, way.callers)
			rates[at] = append(rates[at], float64(n.Load())/time.Since(start).Seconds())
		}
	}
	median := func(at string) float64 {
		slices.Sort(rates[at])
		return rates[at][len(rates[at])/2]
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\ncallers\tSet/s\tUpdate/s\tBatch/s\tSet ÷ Update\tSet ÷ Batch\tbar\t")
	for _, callers := range []int{1, 64} {
		bar := map[int]string{1: "0.85 × Update", 64: "2 × Batch"}[callers]
		set, update, batch := median(fmt.Sprint("Set", callers)), median(fmt.Sprint("Update", callers)), median(fmt.Sprint("Batch", callers))
		fmt.Fprintf(w, "%d\t%.0f\t%.0f\t%.0f\t%.2f\t%.2f\t%s\t\n", callers, set, update, batch, set/update, set/batch, bar)
	}
	_ = w.Flush()
	b.ReportMetric(median("Set1")/median("Update1"), "x-Update-at-1")
	b.ReportMetric(median("Set64")/median("Batch64"), "x-Batch-at-64")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkMillion gives the time to open a store, which checks all of it, and to
// read from it at random, at a thousand and at a million secrets.
func BenchmarkMillion(b *testing.B) {
	for _, secrets := range []int{1_000, 1_000_000} {
		b.Run(fmt.Sprint(secrets), func(b *testing.B) {
			cfg := embedded.Config{Dir: b.TempDir(), Logger: quiet}
			s, err := embedded.Open(cfg)
			if err != nil {
				b.Fatal(err)
			}
			keys := make([]secret.Key, secrets)
			var wg sync.WaitGroup
			const callers = 1000
			for n := range callers {
				wg.Go(func() {
					for at := n; at < secrets; at += callers {
						keys[at] = benchKey(b)
						if _, err := s.Set(b.Context(), keys[at], vault.NewVersion{Value: secret.NewValue(benchValue), Tags: benchTags}); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
			b.Run("open", func(b *testing.B) {
				for b.Loop() {
					s, err := embedded.Open(cfg)
					if err != nil {
						b.Fatal(err)
					}
					b.StopTimer()
					_ = s.Close()
					b.StartTimer()
				}
			})
			s, err = embedded.Open(cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = s.Close() }()
			b.Run("get", func(b *testing.B) {
				for b.Loop() {
					if _, _, err := s.Get(b.Context(), keys[rand.IntN(secrets)], ""); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}
