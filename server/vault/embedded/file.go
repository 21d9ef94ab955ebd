package embedded

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/tink-crypto/tink-go/v2/tink"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

const (
	storeName = "store.db"
	keyName   = "store.key"
	tempMark  = ".tmp-" // follows the name of the file that it will be

	format = 1 // of the file; raised when an older broker could not read it

	lockTimeout = time.Second
	lockRetry   = 20 * time.Millisecond

	// mapSize is the address space that is reserved at open, which costs nothing:
	// bbolt need not wait for readers to map a file that has grown, up to here.
	mapSize = 1 << 30
)

var (
	metaFormat = []byte("format")
	metaCheck  = []byte("check")
)

var errLocked = errors.New("locked")

// prepare sees to it that the folder holds a key and a store, and gives the key.
// Neither is ever replaced: a store without its key is an error, not a reason to
// make another key.
func prepare(dir, storePath, keyPath string, log *slog.Logger) (tink.AEAD, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// Held while files are made: whoever has it may take temporary files for
	// leftovers of a crash.
	lock, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Close() }()
	if err := flock(lock); errors.Is(err, errLocked) {
		return nil, fmt.Errorf("another process is starting in %s", dir)
	} else if err != nil {
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	}
	removeTemps(storePath)
	removeTemps(keyPath)

	haveStore, err := exists(storePath)
	if err != nil {
		return nil, err
	}
	haveKey, err := exists(keyPath)
	if err != nil {
		return nil, err
	}
	switch {
	case haveStore && !haveKey:
		return nil, fmt.Errorf("%s is there but its key %s is missing: put the key back, nothing else opens the store", storePath, keyPath)
	case !haveKey:
		if err := makeKey(keyPath); err != nil {
			return nil, err
		}
		log.Info("made the key of the secret store", "path", keyPath)
	}
	primitive, err := loadKey(keyPath, log)
	if err != nil {
		return nil, err
	}
	if !haveStore {
		if err := create(storePath, primitive); err != nil {
			return nil, fmt.Errorf("creating %s: %w", storePath, err)
		}
	}
	return primitive, nil
}

// create makes an empty store. It has its name only when it is complete and on
// disk, so that whatever is found under that name was once a whole store.
func create(path string, primitive tink.AEAD) (err error) {
	check, err := primitive.Encrypt([]byte(checkText), []byte(purposeCheck))
	if err != nil {
		return err
	}
	temp, err := createTemp(path)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(temp.Name()) // the next start does it otherwise
		}
	}()
	db, err := bbolt.Open(temp.Name(), 0o600, boltOptions(temp))
	if err != nil {
		return errors.Join(err, temp.Close())
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range []string{tableMeta, tableLive, tableDeleted, tableVersions} {
			if _, err := tx.CreateBucket([]byte(name)); err != nil {
				return err
			}
		}
		meta := openTable(tx, tableMeta)
		var sum uint64
		for _, entry := range [][2][]byte{{metaFormat, {format}}, {metaCheck, check}} {
			data := seal(tableMeta, entry[0], entry[1])
			if err := meta.bucket.Put(entry[0], data); err != nil {
				return err
			}
			sum += tally(data)
		}
		return meta.bucket.SetSequence(sum)
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return err
	}
	return publish(temp.Name(), path)
}

// openFile locks the store, checks all of it and opens it. Nothing is written.
func (s *Store) openFile(keyPath string) (err error) {
	file, err := os.OpenFile(s.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = file.Close()
		}
	}()
	if err := flock(file); errors.Is(err, errLocked) {
		return fmt.Errorf("%s is in use by another process", s.path)
	} else if err != nil {
		return fmt.Errorf("locking %s: %w", s.path, err)
	}
	if s.info, err = file.Stat(); err != nil {
		return err
	}
	found, err := verify(file)
	if err != nil {
		return fmt.Errorf("%s: %w", s.path, err)
	}
	check, err := s.aead.Decrypt(found.check, []byte(purposeCheck))
	if err != nil || string(check) != checkText {
		return fmt.Errorf("%s does not open %s: it is the key of another store", keyPath, s.path)
	}
	if s.metas, err = unix.Mmap(int(file.Fd()), 0, 2*found.pageSize, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("mapping %s: %w", s.path, err)
	}
	// When nobody can touch them any more, rather than at Close.
	runtime.AddCleanup(s, func(metas []byte) { _ = unix.Munmap(metas) }, s.metas)
	s.file, s.lastID = file, int(found.txid)
	err = guard(func() (err error) {
		s.db, err = bbolt.Open(s.path, 0o600, boltOptions(file))
		return err
	})
	if err != nil {
		return fmt.Errorf("opening %s: %w", s.path, err)
	}
	return nil
}

// boltOptions make bbolt use a file that is open and locked already: between the
// check of a file and its use it could become another one.
func boltOptions(file *os.File) *bbolt.Options {
	return &bbolt.Options{
		Timeout:         lockTimeout,
		FreelistType:    bbolt.FreelistMapType,
		InitialMmapSize: mapSize,
		NoStatistics:    true, // a lock that all readers would share
		OpenFile:        func(string, int, os.FileMode) (*os.File, error) { return file, nil },
	}
}

// flock waits up to lockTimeout for the exclusive lock, else errLocked. Closing
// the file gives it back.
func flock(file *os.File) error {
	for deadline := time.Now().Add(lockTimeout); ; time.Sleep(lockRetry) {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.EWOULDBLOCK):
			return err
		case !time.Now().Before(deadline):
			return errLocked
		}
	}
}

// createTemp makes the file, 0600, that publish will give the name path.
func createTemp(path string) (*os.File, error) {
	return os.CreateTemp(filepath.Dir(path), filepath.Base(path)+tempMark+"*")
}

// removeTemps removes what a crash left of createTemp. What can't be removed, as
// in a folder that is mounted read-only for the key, does no harm.
func removeTemps(path string) {
	entries, _ := os.ReadDir(filepath.Dir(path))
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), filepath.Base(path)+tempMark) && e.Type().IsRegular() {
			_ = os.Remove(filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
}

// publish gives a finished file its name, durably. A file that has the name
// already stays: os.Link refuses where os.Rename would overwrite.
func publish(temp, path string) error {
	if err := os.Link(temp, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return errors.Join(err, os.Remove(temp))
	}
	if err := os.Remove(temp); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
