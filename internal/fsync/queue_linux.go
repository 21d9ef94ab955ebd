package fsync

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ring is the kernel's asynchronous I/O (io_setup(2) and its like), for one request at
// a time, which tells an eventfd. golang.org/x/sys knows only the calls' numbers; the
// structures are those of linux/aio_abi.h.
type ring struct {
	context uintptr
	event   *os.File
	eventFD uint32 // event's Fd would have its reads block a thread
}

// request is struct iocb.
type request struct {
	_      uint64 // data
	_, _   uint32 // key and flags
	opcode uint16
	_      int16 // priority
	fd     uint32
	_      [4]uint64 // buffer, its length, offset, and one that is reserved
	flags  uint32
	event  uint32 // the descriptor to tell
}

// reply is struct io_event.
type reply struct {
	_, _   uint64 // data and request
	result int64
	_      int64
}

const (
	opFsync   = 2 // IOCB_CMD_FSYNC, since Linux 4.18
	tellEvent = 1 // IOCB_FLAG_RESFD
)

func newQueue() queue {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil
	}
	r := &ring{event: os.NewFile(uintptr(fd), "eventfd"), eventFD: uint32(fd)}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&r.context)), 0); errno != 0 {
		_ = r.event.Close()
		return nil
	}
	return r
}

func (r *ring) sync(fd uintptr) (began bool, err error) {
	list := [1]*request{{opcode: opFsync, fd: uint32(fd), flags: tellEvent, event: r.eventFD}}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, r.context, 1, uintptr(unsafe.Pointer(&list))); errno != 0 {
		return false, errno
	}
	var told [8]byte
	if _, err := r.event.Read(told[:]); err != nil {
		return true, err
	}
	var got reply
	switch n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, r.context, 1, 1, uintptr(unsafe.Pointer(&got)), 0, 0); {
	case errno != 0:
		return true, errno
	case n != 1:
		return true, unix.EIO // there was to be one
	}
	return true, got.err()
}

// err is the error number, negative, as the kernel's functions give it.
func (r *reply) err() error {
	if r.result < 0 {
		return unix.Errno(-r.result)
	}
	return nil
}

func (r *ring) close() {
	_, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, r.context, 0, 0)
	r.context = 0 // the kernel may give another ring the same
	_ = r.event.Close()
}
