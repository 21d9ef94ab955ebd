package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"
)

// endWithin is how long a child may take to end when it is told to.
const endWithin = 20 * time.Second

// child is a process that this one started. It is told to end by the end of the
// context too, and is killed if it does not.
type child struct {
	name   string
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
	pipe   *os.File // that stdout reads
	log    *logTail
	end    context.CancelFunc
	exited chan struct{}
}

// startChild runs a program with that environment alone, so that nothing of the
// shell's settings makes one server another than the others.
func startChild(ctx context.Context, name string, env []string, program string, arguments ...string) (*child, error) {
	ctx, end := context.WithCancel(ctx)
	c := &child{name: name, log: &logTail{listening: make(chan []string, 1)}, end: end, exited: make(chan struct{})}
	c.cmd = exec.CommandContext(ctx, program, arguments...)
	c.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}, env...)
	c.cmd.Stderr = c.log
	c.cmd.SysProcAttr = attributes()
	c.cmd.Cancel = func() error { return c.cmd.Process.Signal(syscall.SIGTERM) }
	c.cmd.WaitDelay = endWithin
	var err error
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		end()
		return nil, err
	}
	// Not StdoutPipe, which Wait closes under its reader.
	reader, writer, err := os.Pipe()
	if err != nil {
		end()
		return nil, err
	}
	c.cmd.Stdout, c.stdout, c.pipe = writer, bufio.NewReader(reader), reader
	err = c.cmd.Start()
	_ = writer.Close()
	if err != nil {
		end()
		_ = reader.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	go func() {
		_ = c.cmd.Wait() // how it ended is in its state
		end()
		close(c.exited)
	}()
	return c, nil
}

// startServer is startChild at a lower priority. A load stands for machines elsewhere: it
// is to have a core when it needs one, and not wait for the server whose answers it times.
func startServer(ctx context.Context, name string, env []string, program string, arguments ...string) (*child, error) {
	return startChild(ctx, name, env, "nice", append([]string{program}, arguments...)...)
}

// startSelf runs this program's command of that name.
func startSelf(ctx context.Context, command string, arguments ...string) (*child, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return startChild(ctx, "bench "+command, nil, program, append([]string{command}, arguments...)...)
}

// stop ends the child and waits for it. It may be called again.
func (c *child) stop() {
	c.end()
	<-c.exited
	_ = c.pipe.Close()
}

// read waits for a line of the child's standard output, or for its end.
func (c *child) read() ([]byte, error) {
	line, err := c.stdout.ReadBytes('\n')
	if err != nil {
		return nil, c.died()
	}
	return line, nil
}

func (c *child) readJSON(to any) error {
	line, err := c.read()
	if err != nil {
		return err
	}
	return json.Unmarshal(line, to)
}

// died says why a child ended that was to go on.
func (c *child) died() error {
	<-c.exited
	return fmt.Errorf("%s ended before its time (%v): %s", c.name, c.cmd.ProcessState, strings.TrimSpace(c.log.String()))
}

// listeningLine is a server's line in its log when it takes calls.
var listeningLine = regexp.MustCompile(`msg=listening grpc=(\S+) metrics=(\S+)\n`)

// logTail keeps the last of a log, and finds the listeningLine in it.
type logTail struct {
	mu        sync.Mutex
	text      []byte
	found     bool
	listening chan []string // gets the addresses once
}

func (l *logTail) Write(p []byte) (int, error) {
	const most = 16 << 10
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	if !l.found {
		if m := listeningLine.FindSubmatch(l.text); m != nil {
			l.found = true
			l.listening <- []string{string(m[1]), string(m[2])}
		}
	}
	if over := len(l.text) - most; over > 0 {
		l.text = append(l.text[:0], l.text[over:]...)
	}
	return len(p), nil
}

func (l *logTail) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}
