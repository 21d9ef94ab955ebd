//go:build !linux

package fsync

func newQueue() queue { return nil }
