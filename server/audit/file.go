package audit

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// newMark follows the path in the name of a file that is being begun. It has the
// path's name only when it is complete, so that whatever is found there is.
const newMark = ".new"

const (
	lockTimeout = time.Second
	lockRetry   = 20 * time.Millisecond
)

// resolve follows symbolic links once: a file is moved and begun in its own folder.
func (l *Log) resolve() error {
	path, err := filepath.EvalSymlinks(l.cfg.Path)
	if err == nil {
		l.cfg.Path = path
		return nil
	}
	if _, there := os.Lstat(l.cfg.Path); there == nil {
		return fmt.Errorf("%s: is a symbolic link that leads nowhere", l.cfg.Path)
	}
	return nil // it is to be made
}

// openFile goes on with the file at the path, or begins one.
func (l *Log) openFile() error {
	path := l.cfg.Path
	last := path
	info, err := os.Stat(path)
	switch {
	case err == nil && !info.Mode().IsRegular():
		return fmt.Errorf("%s: is no regular file", path)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	case err != nil || info.Size() == 0:
		// Stopped in the middle of a rotation, or new.
		numbers, err := numbered(path)
		if err != nil {
			return err
		}
		if len(numbers) == 0 {
			l.chain = uuid.NewString()
			if err := l.rotate(); err != nil {
				return err
			}
			l.log.Info("audit log: a new chain begins", "path", path, "chain", l.chain)
			return nil
		}
		last = newest(path, numbers)
	}
	f, err := os.OpenFile(last, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	if err := l.resume(f); err != nil {
		_ = f.Close()
		return err
	}
	if last != path {
		return l.rotate()
	}
	// What a stop in the middle of a rotation left, before it had its name.
	_ = os.Remove(path + newMark)
	return nil
}

// resume takes on the chain and the open intents of a file.
func (l *Log) resume(f *os.File) error {
	if err := lock(f); err != nil {
		return err
	}
	now, err := os.Stat(f.Name())
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(now, info) {
		return fmt.Errorf("%s: is in use by another process", l.cfg.Path)
	}
	found, err := scan(f)
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	l.chain, l.seq, l.head = found.chain, found.seq, found.hash
	for _, body := range found.open {
		l.open[idOf(body)] = body
		l.unclosed = append(l.unclosed, recordOf(body))
	}
	l.use(l.cfg.wrap(f), found.end)
	l.unended = found.unended
	length := info.Size() - found.end
	if length == 0 {
		return nil
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(f, found.end, length)); err != nil {
		return err
	}
	l.torn = append(l.torn, l.tornEntry(length, hash(sum.Sum(nil))))
	l.log.Warn("audit log: a torn last line is cut off", "path", f.Name(), "bytes", length)
	if err := l.file.Truncate(found.end); err != nil {
		l.unended = true // a file that can only grow
		l.size += length
	}
	l.poke()
	return nil
}

// use makes f the file that is written. The caller is the writer, or Open.
func (l *Log) use(f file, size int64) {
	l.mu.Lock()
	if l.file != nil {
		l.retired = append(l.retired, l.file)
	}
	l.file = f
	l.made = true // or stopped before the directory was synced
	l.mu.Unlock()
	l.out, l.size, l.begun, l.moved, l.unended = f, size, 0, false, false
	l.fileSize.Store(size)
}

// rotate begins a new file at the path, with the chain going on: what is there
// now becomes NAME.N. On an error all is as before.
func (l *Log) rotate() error {
	path := l.cfg.Path
	f, err := os.OpenFile(path+newMark, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err = lock(f); err != nil {
		_ = f.Close()
		return err
	}
	seq, head := l.seq, l.head
	var b []byte
	add := func(body []byte) {
		start := len(b)
		seq++
		b = appendLine(b, seq, body, &head)
		head = sha256.Sum256(b[start:])
		b = append(b, '\n')
	}
	add(l.entry(TypeSystem, l.begin()).body)
	l.mu.Lock()
	for _, body := range l.open {
		add(body)
	}
	l.mu.Unlock()
	wrapped := l.cfg.wrap(f)
	err = wrapped.Truncate(0) // of a rotation that was stopped
	if err == nil {
		_, err = wrapped.Write(b)
	}
	if err == nil {
		err = wrapped.Sync()
	}
	if err == nil {
		err = l.exchange()
	}
	if err != nil {
		_ = os.Remove(f.Name())
		_ = wrapped.Close()
		return err
	}
	l.seq, l.head = seq, head
	l.use(wrapped, int64(len(b)))
	l.begun = l.size
	l.logHead()
	return nil
}

// begin is the first line of a file.
func (l *Log) begin() *Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.system
	return &Record{Type: TypeSystem, Action: actionBegin, Chain: l.chain, System: &s}
}

// exchange gives the present file the next number, if it still has the path, and
// the new one the path.
func (l *Log) exchange() error {
	path := l.cfg.Path
	numbers, err := numbered(path)
	if err != nil {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil && info.Size() > 0 {
		if l.file == nil || l.foreign(path) {
			return fmt.Errorf("%s: is in use by another process", path) // it was not there a moment ago
		}
		next := 1
		if len(numbers) > 0 {
			next = numbers[len(numbers)-1] + 1
		}
		if err := os.Rename(path, name(path, next)); err != nil {
			return err
		}
		numbers = append(numbers, next)
	}
	if err := os.Rename(path+newMark, path); err != nil {
		return err
	}
	if keep := l.cfg.Keep; keep > 0 && len(numbers) > keep {
		for _, n := range numbers[:len(numbers)-keep] {
			if err := os.Remove(name(path, n)); err != nil {
				l.log.Error("audit log: an old file could not be removed", "error", err)
			}
		}
	}
	return nil
}

// place sees to it that the file has its path, and room for so many bytes more.
func (l *Log) place(size int) error {
	if !l.onFile() {
		return nil
	}
	if l.moved {
		return l.rotate()
	}
	// A file that has only what it began with takes any record.
	if most := l.cfg.MaxBytes; most > 0 && l.size > l.begun && !l.unended && l.size+int64(size) > most {
		if err := l.rotate(); err != nil {
			l.rotates.fall(err) // the present file will do
		} else {
			l.rotates.back()
		}
	}
	return nil
}

// checkPath finds out whether the file was moved away, removed or emptied.
func (l *Log) checkPath() {
	if !l.onFile() {
		return
	}
	mine, err := l.file.Stat()
	if err != nil {
		return // the next write will say
	}
	there, err := os.Stat(l.cfg.Path)
	elsewhere, cut, was := err != nil || !os.SameFile(mine, there), mine.Size() < l.size, l.moved
	if l.moved = elsewhere || cut; was || !l.moved {
		return
	}
	switch stat, ok := mine.Sys().(*syscall.Stat_t); {
	case cut:
		l.log.Warn("the audit log was cut off by somebody else; a new file begins, and audit verify says which lines are missing", "path", l.cfg.Path)
	case ok && stat.Nlink == 0:
		l.log.Warn("the audit log was removed; a new file begins, and the lines of the old one are lost", "path", l.cfg.Path)
	default:
		l.log.Info("the audit log was moved; a new file begins", "path", l.cfg.Path)
	}
}

// foreign reports whether the file at the path is another process's.
func (l *Log) foreign(path string) bool {
	if mine, err := l.file.Stat(); err == nil {
		if there, err := os.Stat(path); err == nil && os.SameFile(mine, there) {
			return false
		}
	}
	f, err := os.Open(path)
	if err != nil {
		return false // which whatever is done next will say
	}
	defer func() { _ = f.Close() }()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// newest is the file among those with a number that was written last. The log itself
// counts them up; others who rename them may count otherwise.
func newest(path string, numbers []int) string {
	last, most := "", int64(-1)
	for _, n := range numbers {
		if seq := lastSeq(name(path, n)); last == "" || seq >= most {
			last, most = name(path, n), seq
		}
	}
	return last
}

// lastSeq is the sequence of a file's last whole line, or -1.
func lastSeq(path string) int64 {
	f, err := os.Open(path)
	if err != nil {
		return -1
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return -1
	}
	seq := int64(-1)
	for lines := newLines(io.NewSectionReader(f, max(0, info.Size()-2*maxLine), 2*maxLine)); ; {
		b, whole, err := lines.next()
		if err != nil {
			return seq
		}
		if p, bad := parseLine(b); whole && bad == nil {
			seq = p.seq
		}
	}
}

// syncFiles syncs the files before the present one, closes them, and syncs that;
// and the directory, if a file was made in it.
func (l *Log) syncFiles(retired []file, f file, made bool) (err error) {
	for _, r := range retired {
		err = errors.Join(err, r.Sync(), r.Close())
	}
	if err = errors.Join(err, f.Sync()); err != nil || !made {
		return err
	}
	dir, err := os.Open(filepath.Dir(l.cfg.Path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// lock makes f this process's alone, until it is closed. It waits for one that is
// about to end.
func lock(f *os.File) error {
	for deadline := time.Now().Add(lockTimeout); ; time.Sleep(lockRetry) {
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.EWOULDBLOCK):
			return fmt.Errorf("locking %s: %w", f.Name(), err)
		case time.Now().After(deadline):
			return fmt.Errorf("%s: is in use by another process", strings.TrimSuffix(f.Name(), newMark))
		}
	}
}

func name(path string, number int) string { return path + "." + strconv.Itoa(number) }

// numbered gives the numbers of the files that were rotated, in order.
func numbered(path string) (numbers []int, err error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), filepath.Base(path)+".")
		if n, err := strconv.Atoi(rest); ok && err == nil && n > 0 && strconv.Itoa(n) == rest {
			numbers = append(numbers, n)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	slices.Sort(numbers)
	return numbers, nil
}
