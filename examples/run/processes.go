package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// patience is how long a process has to end when it is told to.
const patience = 20 * time.Second

// supervisor starts processes, and ends them all.
type supervisor struct {
	// line gets what they print, line by line; it is called concurrently.
	line func(process, line string)
	// failed gets the name of one that ended unasked.
	failed  chan string
	starts  chan func()
	running []*process // in order of their start
}

// program says what to start.
type program struct {
	name string
	path string
	args []string
	dir  string
	env  []string // all of it, but for PATH and HOME
	user *syscall.Credential
	// ready matches the line that the process prints when it is of use. Nil: it is
	// at once.
	ready *regexp.Regexp
	// stop is the signal that ends it. 0: SIGTERM.
	stop syscall.Signal
}

type process struct {
	program
	cmd    *exec.Cmd
	exited chan struct{}
}

func newSupervisor(line func(process, line string)) *supervisor {
	s := &supervisor{line: line, failed: make(chan string, 16), starts: make(chan func())}
	go func() {
		// On Linux a process that dies with its parent dies with the thread that
		// started it, so one thread starts them all.
		runtime.LockOSThread()
		for start := range s.starts {
			start()
		}
	}()
	return s
}

// start runs a program until it is ready, and gives what ready matched.
func (s *supervisor) start(ctx context.Context, p program) (*process, []string, error) {
	proc := &process{program: p, exited: make(chan struct{})}
	matched := make(chan []string, 1)
	lines := &lineWriter{each: func(line string) {
		s.line(p.name, line)
		if p.ready != nil {
			if m := p.ready.FindStringSubmatch(line); m != nil {
				select {
				case matched <- m:
				default: // it said so before
				}
			}
		}
	}}
	proc.cmd = exec.Command(p.path, p.args...)
	proc.cmd.Dir = p.dir
	proc.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}, p.env...)
	proc.cmd.Stdout, proc.cmd.Stderr = lines, lines
	// In a group of its own, so that Ctrl-C does not reach it but by way of stop.
	proc.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: p.user}
	dieWithParent(proc.cmd.SysProcAttr)
	started := make(chan error)
	s.starts <- func() { started <- proc.cmd.Start() }
	if err := <-started; err != nil {
		return nil, nil, fmt.Errorf("starting %s: %w", p.name, err)
	}
	s.running = append(s.running, proc)
	go func() {
		_ = proc.cmd.Wait() // how it ended tells cmd.ProcessState
		close(proc.exited)
		select {
		case s.failed <- p.name:
		default:
		}
	}()
	if p.ready == nil {
		return proc, nil, nil
	}
	select {
	case m := <-matched:
		return proc, m, nil
	case <-proc.exited:
		return nil, nil, fmt.Errorf("%s ended before it was ready: its output says why", p.name)
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
}

// end sends a signal and waits until the process has ended; one that does not is
// killed.
func (p *process) end(signal syscall.Signal) {
	_ = p.cmd.Process.Signal(signal) // it may have ended
	select {
	case <-p.exited:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
}

// stop ends all processes, the last one first.
func (s *supervisor) stop() {
	for len(s.running) > 0 {
		last := s.running[len(s.running)-1]
		s.running = s.running[:len(s.running)-1]
		signal := last.program.stop
		if signal == 0 {
			signal = syscall.SIGTERM
		}
		last.end(signal)
	}
	close(s.starts)
}

// lineWriter cuts what is written into lines.
type lineWriter struct {
	each func(line string)
	mu   sync.Mutex
	rest []byte
}

func (w *lineWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rest = append(w.rest, b...)
	for {
		line, rest, found := bytes.Cut(w.rest, []byte("\n"))
		if !found {
			return len(b), nil
		}
		w.rest = rest
		w.each(strings.TrimSuffix(string(line), "\r"))
	}
}
