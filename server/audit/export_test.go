package audit

import "os"

// File is what a log asks of its file.
type File = file

// Wrap puts something between a log and its files.
func (c Config) Wrap(wrap func(*os.File) File) Config {
	c.wrap = wrap
	return c
}
