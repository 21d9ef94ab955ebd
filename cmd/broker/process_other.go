//go:build unix && !linux

package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// protectMemory keeps what is in memory out of core files, whatever limit the
// parent set. Linux alone can do more.
func protectMemory() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("core dumps cannot be turned off (RLIMIT_CORE): %w", err)
	}
	return nil
}
