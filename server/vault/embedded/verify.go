package embedded

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"os"

	"golang.org/x/sys/unix"
)

// The file format of bbolt, as far as its reader trusts it:
// https://pkg.go.dev/go.etcd.io/bbolt/internal/common. All of it is little-endian
// on the platforms that we build for.
const (
	pageHeader  = 16 // id 8, flags 2, count 2, overflow 4
	elementSize = 16 // leaf: flags, position, key size, value size; branch: position, key size, page id
	bucketSize  = 16 // root page id, sequence

	pageBranch   = 0x01
	pageLeaf     = 0x02
	pageMeta     = 0x04
	pageFreelist = 0x10

	leafBucket = 0x01 // an element's flag

	boltMagic   = 0xED0CDAED
	boltVersion = 2
	metaSummed  = 56 // bytes of a meta that its checksum covers

	maxDepth = 64 // of a tree; no store comes near it
)

// contents is what verify found.
type contents struct {
	pageSize int
	txid     uint64 // of the last commit
	check    []byte // the record of the key
}

// verify reads the whole file and reports the first thing in it that is not as
// it was written. bbolt believes every page that it maps: a damaged one makes it
// crash the process, overwrite live pages, or not find a secret that is there.
// After verify it has nothing left to believe. The file is locked by the caller.
func verify(file *os.File) (c contents, err error) {
	info, err := file.Stat()
	if err != nil {
		return c, err
	}
	switch {
	case !info.Mode().IsRegular():
		return c, errors.New("not a regular file")
	case info.Size() == 0:
		return c, errors.New("the file is empty: restore it from a backup, a new store is made only where there is none")
	}
	data, err := unix.Mmap(int(file.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return c, fmt.Errorf("mapping: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(data)) }()
	_ = unix.Madvise(data, unix.MADV_WILLNEED) // only a hint

	im := &image{data: data}
	if err := guard(func() error { return im.verify(&c) }); err != nil {
		if !errors.Is(err, errFormat) {
			err = fmt.Errorf("damaged (%w): restore it from a backup", err)
		}
		return contents{}, err
	}
	return c, nil
}

var errFormat = errors.New("made by a newer broker")

// image is the file in memory.
type image struct {
	data     []byte
	pageSize uint64
	pages    uint64 // high-water mark: no page from here on is in use
	freelist uint64
	root     uint64
	txid     uint64
	used     []uint64 // a bit for each page that something refers to
}

// page is a page, or the inline page in a bucket's entry.
type page struct {
	id       uint64
	data     []byte // with its overflow
	flags    uint16
	count    int
	overflow uint32 // pages that follow
}

func (p page) bad(what string) error { return fmt.Errorf("page %d: %s", p.id, what) }

func (im *image) verify(c *contents) error {
	if err := im.readMeta(); err != nil {
		return err
	}
	if err := im.readFreelist(); err != nil {
		return err
	}
	buckets := map[string][]byte{}
	root, err := im.page(im.root)
	if err != nil {
		return err
	}
	err = im.walk(root, func(flags uint32, key, value []byte) error {
		if flags != leafBucket {
			return errors.New("an entry of the root is no table")
		}
		buckets[string(key)] = value
		return nil
	})
	if err != nil {
		return err
	}

	found := map[string][]byte{}
	err = im.walkTable(tableMeta, buckets, func(key, content []byte) error {
		found[string(key)] = bytes.Clone(content)
		return nil
	})
	if err != nil {
		return err
	}
	f := found[string(metaFormat)]
	if len(f) != 1 || f[0] == 0 {
		return errors.New("no format is recorded")
	}
	if f[0] > format {
		return fmt.Errorf("format %d, %w: this one reads format %d", f[0], errFormat, format)
	}
	c.check, c.pageSize, c.txid = found[string(metaCheck)], int(im.pageSize), im.txid
	for _, name := range []string{tableLive, tableDeleted, tableVersions} {
		if err := im.walkTable(name, buckets, nil); err != nil {
			return err
		}
	}
	if len(buckets) != 4 {
		return errors.New("there are unknown tables")
	}
	return nil
}

// readMeta takes the newer of the two meta pages. Both must be sound: a commit
// writes one of them in a single sector, so no crash damages it, and bbolt would
// quietly fall back to the other, a state without the last commit.
func (im *image) readMeta() error {
	if len(im.data) < pageHeader+metaSummed+8 {
		return errors.New("cut off")
	}
	u64 := binary.LittleEndian.Uint64
	pageSize := uint64(binary.LittleEndian.Uint32(im.data[pageHeader+8:]))
	for n := range uint64(2) {
		at := n * pageSize
		if at+pageHeader+metaSummed+8 > uint64(len(im.data)) {
			return errors.New("cut off, or the first meta page is damaged")
		}
		if !metaSound(im.data[at:], n) {
			return fmt.Errorf("meta page %d is not what was written there", n)
		}
		m := im.data[at+pageHeader:]
		if txid := u64(m[48:]); n == 0 || txid > im.txid {
			im.root, im.freelist, im.pages, im.txid = u64(m[16:]), u64(m[32:]), u64(m[40:]), txid
		}
	}
	im.pageSize = pageSize
	if have := uint64(len(im.data)) / pageSize; im.pages > have {
		return fmt.Errorf("cut off: %d of %d pages are there", have, im.pages)
	}
	im.used = make([]uint64, im.pages/64+1)
	return nil
}

// metaSound reports whether data begins with meta page n as bbolt writes it.
func metaSound(data []byte, n uint64) bool {
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	p, m := parsePage(data), data[pageHeader:]
	h := fnv.New64a()
	_, _ = h.Write(m[:metaSummed])
	return p.id == n && p.flags == pageMeta && u32(m) == boltMagic && u32(m[4:]) == boltVersion &&
		u64(m[48:])%2 == n && u64(m[metaSummed:]) == h.Sum64()
}

// take marks a page as referred to. A second reference would let bbolt free or
// overwrite what is still in use.
func (im *image) take(id uint64) error {
	if id < 2 || id >= im.pages {
		return fmt.Errorf("page %d is out of range", id)
	}
	if im.used[id/64]&(1<<(id%64)) != 0 {
		return fmt.Errorf("page %d is used twice", id)
	}
	im.used[id/64] |= 1 << (id % 64)
	return nil
}

// page takes a page with its overflow.
func (im *image) page(id uint64) (page, error) {
	if err := im.take(id); err != nil {
		return page{}, err
	}
	p := parsePage(im.data[id*im.pageSize : (id+1)*im.pageSize])
	if p.id != id {
		return page{}, fmt.Errorf("page %d says that it is page %d", id, p.id)
	}
	end := id + 1 + uint64(p.overflow)
	for n := id + 1; n < end; n++ {
		if err := im.take(n); err != nil {
			return page{}, err
		}
	}
	p.data = im.data[id*im.pageSize : end*im.pageSize]
	return p, nil
}

func parsePage(data []byte) page {
	return page{
		id:       binary.LittleEndian.Uint64(data),
		data:     data,
		flags:    binary.LittleEndian.Uint16(data[8:]),
		count:    int(binary.LittleEndian.Uint16(data[10:])),
		overflow: binary.LittleEndian.Uint32(data[12:]),
	}
}

// readFreelist takes the pages that bbolt will give out for new content.
func (im *image) readFreelist() error {
	p, err := im.page(im.freelist)
	if err != nil {
		return err
	}
	if p.flags != pageFreelist {
		return p.bad("not a free list")
	}
	ids, count := p.data[pageHeader:], uint64(p.count)
	if count == 0xFFFF { // the count is the first element then
		count, ids = binary.LittleEndian.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids))/8 {
		return p.bad("the free list does not fit")
	}
	for n := range count {
		if err := im.take(binary.LittleEndian.Uint64(ids[8*n:])); err != nil {
			return fmt.Errorf("free list: %w", err)
		}
	}
	return nil
}

// walkTable checks a table and gives its records without their checksums to
// visit, which may be nil.
func (im *image) walkTable(name string, buckets map[string][]byte, visit func(key, content []byte) error) error {
	entry, ok := buckets[name]
	if !ok || len(entry) < bucketSize {
		return fmt.Errorf("the table %s is missing", name)
	}
	malformed := fmt.Errorf("the table %s has a malformed entry", name)
	var p page
	root := binary.LittleEndian.Uint64(entry)
	if root != 0 {
		if len(entry) != bucketSize {
			return malformed
		}
		var err error
		if p, err = im.page(root); err != nil {
			return err
		}
	} else { // small tables are within the root's leaf
		if len(entry) < bucketSize+pageHeader {
			return malformed
		}
		if p = parsePage(entry[bucketSize:]); p.id != 0 || p.flags != pageLeaf || p.overflow != 0 {
			return malformed
		}
	}
	var sum uint64
	size := bucketSize + pageHeader
	err := im.walk(p, func(flags uint32, key, value []byte) error {
		if flags != 0 {
			return errors.New("a record is marked as a table")
		}
		content, err := unseal(name, key, value)
		if err != nil {
			return err
		}
		sum += tally(value)
		size += elementSize + len(key) + len(value)
		if visit == nil {
			return nil
		}
		return visit(key, content)
	})
	if err != nil {
		return fmt.Errorf("table %s: %w", name, err)
	}
	if root == 0 && size != len(entry) {
		return malformed
	}
	if sum != binary.LittleEndian.Uint64(entry[8:]) {
		return fmt.Errorf("the table %s has lost or gained records", name)
	}
	return nil
}

// walk checks the tree below p and visits its leaf elements. Keys increase over
// the whole tree, and the key by which a branch finds a child is the child's
// first: with both, a search finds whatever is in a leaf.
func (im *image) walk(p page, visit func(flags uint32, key, value []byte) error) error {
	var last []byte
	var descend func(p page, first []byte, depth int) error
	descend = func(p page, first []byte, depth int) error {
		if p.flags != pageLeaf && p.flags != pageBranch {
			return p.bad("neither branch nor leaf")
		}
		if p.count == 0 && (depth > 0 || p.flags == pageBranch) {
			return p.bad("empty")
		}
		if depth > maxDepth {
			return p.bad("too deep")
		}
		for n := range p.count {
			at := uint64(pageHeader + n*elementSize)
			if at+elementSize > uint64(len(p.data)) {
				return p.bad("its elements do not fit")
			}
			e := p.data[at : at+elementSize]
			u32 := binary.LittleEndian.Uint32
			var flags, position, keySize, valueSize uint32
			if p.flags == pageLeaf {
				flags, position, keySize, valueSize = u32(e), u32(e[4:]), u32(e[8:]), u32(e[12:])
			} else {
				position, keySize = u32(e), u32(e[4:])
			}
			from := at + uint64(position)
			split := from + uint64(keySize)
			to := split + uint64(valueSize)
			if keySize == 0 || to > uint64(len(p.data)) {
				return p.bad("an element does not fit")
			}
			key := p.data[from:split]
			if n == 0 && first != nil && !bytes.Equal(key, first) {
				return p.bad("its first key is not the one that its parent has")
			}
			if p.flags == pageBranch {
				child, err := im.page(binary.LittleEndian.Uint64(e[8:]))
				if err != nil {
					return err
				}
				if err := descend(child, key, depth+1); err != nil {
					return err
				}
				continue
			}
			if last != nil && bytes.Compare(last, key) >= 0 {
				return p.bad("its keys are out of order")
			}
			last = key
			if err := visit(flags, key, p.data[split:to]); err != nil {
				return p.bad(err.Error())
			}
		}
		return nil
	}
	return descend(p, nil, 0)
}
