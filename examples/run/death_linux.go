package main

import "syscall"

// dieWithParent sees to it that a process does not outlive this one, however that
// ends.
func dieWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGKILL }
