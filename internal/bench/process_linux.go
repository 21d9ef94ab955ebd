package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// attributes put a child in a group of its own, so that Ctrl-C reaches it by way
// of this process alone, and have it killed at the end of the thread that starts
// it, which run keeps.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// cpuTime is what all threads of a process have used, in user mode and in the
// kernel. It is that process's clock, which knows it to the nanosecond where
// /proc/PID/stat counts ticks, and forgets no thread that ended.
func cpuTime(process int) (time.Duration, error) {
	const scheduled = 2 // CPUCLOCK_SCHED of the kernel's posix-timers.h
	var used unix.Timespec
	if err := unix.ClockGettime(int32(^process<<3|scheduled), &used); err != nil {
		return 0, fmt.Errorf("the CPU time of process %d: %w", process, err)
	}
	return time.Duration(used.Nano()), nil
}

// memory is what a process has of the machine's memory, and what of that is not
// pages of files.
func memory(process int) (resident, anonymous int64, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", process))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(status)) {
		for name, to := range map[string]*int64{"VmRSS:": &resident, "RssAnon:": &anonymous} {
			if f := strings.Fields(line); len(f) == 3 && f[0] == name {
				kilobytes, err := strconv.ParseInt(f[1], 10, 64)
				if err != nil {
					return 0, 0, err
				}
				*to = kilobytes << 10
			}
		}
	}
	return resident, anonymous, nil
}
