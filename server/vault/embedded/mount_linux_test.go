package embedded_test

import "golang.org/x/sys/unix"

// mountSmall needs root.
func mountSmall(dir string) error { return unix.Mount("none", dir, "tmpfs", 0, "size=3m") }

func unmount(dir string) error { return unix.Unmount(dir, unix.MNT_DETACH) }
