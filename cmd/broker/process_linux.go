package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// protectMemory keeps what is in memory out of core files, whatever limit and
// pattern the parent set, and out of reach of other processes of the same user:
// the files of the process in /proc are root's from now on, and only root may
// trace it.
func protectMemory() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("core dumps cannot be turned off (RLIMIT_CORE): %w", err)
	}
	// The limit says nothing to a core pattern that is a pipe.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("core dumps cannot be turned off (PR_SET_DUMPABLE): %w", err)
	}
	return nil
}
