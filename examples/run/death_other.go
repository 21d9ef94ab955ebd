//go:build !linux

package main

import "syscall"

// dieWithParent does nothing: only Linux can do this. A kill -9 of this process
// leaves the others running.
func dieWithParent(*syscall.SysProcAttr) {}
