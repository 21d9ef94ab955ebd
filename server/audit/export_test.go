package audit

import (
	"os"
	"time"
)

// File is what a log asks of its file.
type File = file

// Wrap puts something between a log and its files.
func (c Config) Wrap(wrap func(*os.File) File) Config {
	c.wrap = wrap
	return c
}

// Hangs sets how long a write may take before new records are refused at once.
func (c Config) Hangs(d time.Duration) Config {
	c.hangs = d
	return c
}

// Free sets how many bytes the file system of the log seems to have left.
func (c Config) Free(free func() (uint64, error)) Config {
	c.free = free
	return c
}

// InUse is the present file.
func (l *Log) InUse() File {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file
}
