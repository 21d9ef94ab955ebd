//go:build !linux

package main

import (
	"errors"
	"syscall"
	"time"
)

var errLinuxOnly = errors.New("bench runs on Linux alone: elsewhere it cannot tell what a server costs")

func attributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{} }

func cpuTime(int) (time.Duration, error) { return 0, errLinuxOnly }

func memory(int) (resident, anonymous int64, err error) { return 0, 0, errLinuxOnly }
