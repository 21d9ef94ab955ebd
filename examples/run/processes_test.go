package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// programs is the folder with all programs, built once for all tests.
var programs string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	flag.Parse()
	dir, err := os.MkdirTemp("", "examples-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	programs = dir + string(filepath.Separator) // go build takes it for a folder
	for folder, packages := range map[string][]string{
		"../..": {"./cmd/broker"},
		"..":    {"./console-api", "./worker", "./instance", "./run"},
	} {
		build := exec.Command("go", append([]string{"build", "-o", programs}, packages...)...)
		build.Dir = folder
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building %v: %v\n%s", packages, err, out)
			return 1
		}
	}
	return m.Run()
}

// transcript keeps what processes print.
type transcript struct {
	mu    sync.Mutex
	lines map[string][]string
}

func (s *transcript) add(process, line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lines == nil {
		s.lines = map[string][]string{}
	}
	s.lines[process] = append(s.lines[process], line)
}

func (s *transcript) of(process string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.lines[process])
}

// last is the last line of a process that holds text; empty when there is none.
func (s *transcript) last(process, text string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, line := range slices.Backward(s.lines[process]) {
		if strings.Contains(line, text) {
			return line
		}
	}
	return ""
}

// eventually waits until something holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	end := time.After(90 * time.Second)
	for again := time.Tick(10 * time.Millisecond); !holds(); {
		select {
		case <-again:
		case <-end:
			t.Fatalf("not seen: %s", what)
		}
	}
}

// databaseFolder is a folder that another user can reach too.
func databaseFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "examples-database-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
