package embedded

import (
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"
)

func TestZZ(t *testing.T) {
	for seed := int64(0); seed < 12; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewSource(seed))
			path := filepath.Join(t.TempDir(), "x")
			o := boltOptions(nil)
			o.OpenFile = os.OpenFile
			o.NoSync = true
			o.InitialMmapSize = 0
			db, err := bbolt.Open(path, 0o600, o)
			if err != nil {
				t.Fatal(err)
			}
			keys := map[string]bool{}
			for round := 0; round < 1500; round++ {
				err := db.Update(func(tx *bbolt.Tx) error {
					for b := 0; b < 3; b++ {
						bk, _ := tx.CreateBucketIfNotExists([]byte(fmt.Sprint("b", b)))
						n := rng.Intn(60)
						del := (round/100)%2 == 1
						for i := 0; i < n; i++ {
							if rng.Intn(10) < 3 == !del {
								for k := range keys {
									bk.Delete([]byte(k))
									delete(keys, k)
									break
								}
								continue
							}
							k := fmt.Sprintf("instance-%x%s", rng.Intn(100000), "x-dburi-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"[:rng.Intn(40)])
							sz := rng.Intn(400)
							if rng.Intn(50) == 0 {
								sz = rng.Intn(30000)
							}
							bk.Put([]byte(k), make([]byte, sz))
							keys[k] = true
						}
						// range deletes
						if rng.Intn(5) == 0 {
							c := bk.Cursor()
							k, _ := c.Seek([]byte(fmt.Sprintf("instance-%x", rng.Intn(100000))))
							var ks [][]byte
							for i := 0; k != nil && i < rng.Intn(300); i++ {
								ks = append(ks, append([]byte{}, k...))
								k, _ = c.Next()
							}
							for _, k := range ks {
								bk.Delete(k)
							}
						}
					}
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				data, _ := os.ReadFile(path)
				im := &image{data: data}
				if err := im.readMeta(); err != nil {
					t.Fatal(err)
				}
				if err := im.readFreelist(); err != nil {
					t.Fatal(err)
				}
				root, err := im.page(im.root)
				if err != nil {
					t.Fatal(err)
				}
				n := 0
				err = im.walk(root, func(flags uint32, key, value []byte) error {
					if r := le(value); r != 0 {
						p, err := im.page(r)
						if err != nil {
							return err
						}
						return im.walk(p, func(uint32, []byte, []byte) error { n++; return nil })
					}
					return im.walk(parsePage(value[16:]), func(uint32, []byte, []byte) error { n++; return nil })
				})
				if err != nil {
					t.Fatal(round, err)
				}
				leak := 0
				for id := uint64(2); id < im.pages; id++ {
					if im.used[id/64]&(1<<(id%64)) == 0 {
						leak++
					}
				}
				if leak > 0 {
					t.Fatal("leak", leak)
				}
				if round%500 == 499 {
					t.Log(round, n, im.pages)
				}
			}
			db.Close()
		})
	}
}

func le(b []byte) (v uint64) {
	for i := 7; i >= 0; i-- {
		v = v<<8 | uint64(b[i])
	}
	return
}
