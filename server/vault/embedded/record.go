package embedded

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"maps"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// The tables of the store, each a bucket.
//
//	meta      format, check
//	live      name          → the newest version of a live name
//	deleted   name          → the newest version of a deleted name
//	versions  name 0x00 id  → each older version, whether its name is live or deleted
//
// The newest version is in the record of its name: what is current can't
// contradict what is stored, and Get and List need one look.
const (
	tableMeta     = "meta"
	tableLive     = "live"
	tableDeleted  = "deleted"
	tableVersions = "versions"
)

// Every record ends with a CRC-32C of its table, key and content, and every
// table counts and adds up those sums (see tally). bbolt has no checksums of its
// own but in the meta pages; without these a flipped bit in a name would read as
// "no such secret".
const sumSize = 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(table string, key, content []byte) uint32 {
	sum := crc32.Update(0, castagnoli, []byte(table))
	sum = crc32.Update(sum, castagnoli, key)
	return crc32.Update(sum, castagnoli, content)
}

// seal appends the checksum to content.
func seal(table string, key, content []byte) []byte {
	return binary.LittleEndian.AppendUint32(content, checksum(table, key, content))
}

var errRecord = errors.New("a record is damaged")

// unseal is content again, or errRecord when it is not what was stored there.
func unseal(table string, key, data []byte) ([]byte, error) {
	n := len(data) - sumSize
	if n < 0 {
		return nil, errRecord
	}
	if binary.LittleEndian.Uint32(data[n:]) != checksum(table, key, data[:n]) {
		return nil, errRecord
	}
	return data[:n], nil
}

// tally is what a sealed record adds to its table's tally: one for the count,
// and its checksum. The sum over the table is kept in the sequence number of the
// bucket, so that a leaf that is missing, or stale, is noticed at open.
func tally(data []byte) uint64 {
	return 1<<32 + uint64(binary.LittleEndian.Uint32(data[len(data)-sumSize:]))
}

// record is one version as it is stored. Its byte slices may point into the
// store's memory map: they live no longer than the transaction.
type record struct {
	version [16]byte
	enabled bool
	created int64  // Unix seconds, like the two below
	deleted int64  // 0 while live
	purge   int64  // 0 while live
	attrs   []byte // content type and tags, by encodeAttrs
	sealed  []byte // the value, encrypted
}

const (
	recordHeader = 1 + 3*8 + 16
	flagEnabled  = 1
)

func (r record) encode(table string, key []byte) []byte {
	b := make([]byte, 0, recordHeader+binary.MaxVarintLen32+len(r.attrs)+len(r.sealed)+sumSize)
	var flags byte
	if r.enabled {
		flags |= flagEnabled
	}
	b = append(b, flags)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.created))
	b = binary.LittleEndian.AppendUint64(b, uint64(r.deleted))
	b = binary.LittleEndian.AppendUint64(b, uint64(r.purge))
	b = append(b, r.version[:]...)
	b = appendBytes(b, r.attrs)
	b = append(b, r.sealed...)
	return seal(table, key, b)
}

func decodeRecord(table string, key, data []byte) (record, error) {
	b, err := unseal(table, key, data)
	if err != nil || len(b) < recordHeader {
		return record{}, errRecord
	}
	r := record{
		enabled: b[0]&flagEnabled != 0,
		created: int64(binary.LittleEndian.Uint64(b[1:])),
		deleted: int64(binary.LittleEndian.Uint64(b[9:])),
		purge:   int64(binary.LittleEndian.Uint64(b[17:])),
		version: [16]byte(b[25:recordHeader]),
	}
	var ok bool
	if r.attrs, r.sealed, ok = cutBytes(b[recordHeader:]); !ok {
		return record{}, errRecord
	}
	return r, nil
}

// properties copies all that it gives.
func (r record) properties(key secret.Key) (vault.Properties, error) {
	contentType, tags, err := decodeAttrs(r.attrs)
	if err != nil {
		return vault.Properties{}, err
	}
	return vault.Properties{
		Key:         key,
		Version:     hex.EncodeToString(r.version[:]),
		Enabled:     r.enabled,
		Created:     time.Unix(r.created, 0).UTC(),
		ContentType: contentType,
		Tags:        tags,
	}, nil
}

func (r record) deletedProperties(key secret.Key) (vault.Deleted, error) {
	p, err := r.properties(key)
	return vault.Deleted{
		Properties: p,
		DeletedAt:  time.Unix(r.deleted, 0).UTC(),
		PurgeAt:    time.Unix(r.purge, 0).UTC(),
	}, err
}

// purged reports whether a deleted record is past its purge time: it is absent
// then, whether or not it has been swept away.
func (r record) purged(now time.Time) bool { return !now.Before(time.Unix(r.purge, 0)) }

func encodeAttrs(contentType string, tags vault.Tags) []byte {
	b := appendBytes(nil, contentType)
	for _, name := range slices.Sorted(maps.Keys(tags)) {
		b = appendBytes(appendBytes(b, name), tags[name])
	}
	return b
}

func decodeAttrs(b []byte) (contentType string, tags vault.Tags, err error) {
	field, b, ok := cutBytes(b)
	contentType = string(field)
	for ok && len(b) > 0 {
		var name, value []byte
		if name, b, ok = cutBytes(b); !ok {
			break
		}
		if value, b, ok = cutBytes(b); !ok {
			break
		}
		if tags == nil {
			tags = vault.Tags{}
		}
		tags[string(name)] = string(value)
	}
	if !ok {
		return "", nil, errRecord
	}
	return contentType, tags, nil
}

func appendBytes[T string | []byte](b []byte, s T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func cutBytes(b []byte) (field, rest []byte, ok bool) {
	n, width := binary.Uvarint(b)
	if width <= 0 || n > uint64(len(b)-width) {
		return nil, nil, false
	}
	b = b[width:]
	return b[:n], b[n:], true
}

// parseVersion accepts what properties writes: 32 lower-case hex characters.
func parseVersion(s string) (id [16]byte, ok bool) {
	if len(s) != hex.EncodedLen(len(id)) {
		return id, false
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil || hex.EncodeToString(id[:]) != s {
		return id, false
	}
	return id, true
}

// olderKey is the key of an older version in its table. Names have no byte below
// '-', so that the versions of a name stand together.
func olderKey(name []byte, version [16]byte) []byte {
	return append(olderPrefix(name), version[:]...)
}

func olderPrefix(name []byte) []byte {
	return append(append(make([]byte, 0, len(name)+1+16), name...), 0)
}

// table is a bucket whose records are sealed and counted.
type table struct {
	name   string
	bucket *bbolt.Bucket
}

func openTable(tx *bbolt.Tx, name string) table {
	return table{name, tx.Bucket([]byte(name))}
}

// get reports whether there is a record at key. Its error is errRecord.
func (t table) get(key []byte) (r record, ok bool, err error) {
	data := t.bucket.Get(key)
	if data == nil {
		return record{}, false, nil
	}
	r, err = decodeRecord(t.name, key, data)
	return r, err == nil, err
}

// put panics when bbolt refuses, which it has no reason to; see attempt.
func (t table) put(key []byte, r record) {
	data := r.encode(t.name, key)
	sum := t.bucket.Sequence() + tally(data)
	if old := t.bucket.Get(key); old != nil {
		sum -= tally(old)
	}
	must(t.bucket.Put(key, data))
	must(t.bucket.SetSequence(sum))
}

// delete panics like put.
func (t table) delete(key []byte) {
	old := t.bucket.Get(key)
	if old == nil {
		return
	}
	sum := t.bucket.Sequence() - tally(old)
	must(t.bucket.Delete(key))
	must(t.bucket.SetSequence(sum))
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
