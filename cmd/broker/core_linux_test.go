package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// unlimited is a shell command that lets what it becomes leave a core file.
const unlimited = `ulimit -c unlimited && exec "$0" "$@"`

// cores are the core files in dir.
func cores(t *testing.T, dir string) []string {
	t.Helper()
	return must2(filepath.Glob(filepath.Join(dir, "*core*")))(t)
}

// TestNoCore: a crash leaves no core file, though the parent raised the limit and
// Go was told to leave one.
func TestNoCore(t *testing.T) {
	t.Parallel()
	// The same shell with another program shows that there would be one.
	dir := t.TempDir()
	control := launch(t, dir, nil, "sh", "-c", unlimited, "sh", "-c", "kill -ABRT $$")
	<-control.exited
	if len(cores(t, dir)) == 0 {
		t.Skip("nothing leaves a core file here that a test could find: ", string(must2(os.ReadFile("/proc/sys/kernel/core_pattern"))(t)))
	}
	for _, sig := range []syscall.Signal{syscall.SIGABRT, syscall.SIGSEGV, syscall.SIGQUIT} {
		for _, command := range []string{"dev", "serve"} {
			t.Run(fmt.Sprintf("%s, %v", command, sig), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				devIn(t, dir).kill()
				env := append(environ(settings(dir)), "GOTRACEBACK=crash")
				p := launch(t, dir, env, "sh", "-c", unlimited, binary, command, "--listen-address=127.0.0.1:0", "--metrics-address=127.0.0.1:0")
				p.listen()
				ctx, c := callContext(t), &canaries{hidden: map[string]string{}}
				for _, kind := range kinds {
					must2(p.as("console-api").PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", kind), Value: c.value(kind, fmt.Sprint(kind))}))(t)
					must2(p.as("console-api").GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", kind)}))(t)
				}
				p.end(sig)
				if got := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !got.Signaled() || got.CoreDump() {
					t.Errorf("got status %#x, want an end by a signal, without a core", got)
				}
				if !strings.Contains(p.err.String(), "goroutine ") {
					t.Errorf("got log %s, want the goroutines, as GOTRACEBACK says", p.err)
				}
				places := map[string]string{"standard output": p.out.String(), "the log": p.err.String()}
				filesIn(t, dir, places)
				c.wantNowhere(t, places)
				if found := cores(t, dir); len(found) > 0 {
					t.Errorf("got %v, want no core file", found)
				}
			})
		}
	}
}

// TestMemoryIsOutOfReach: another process of the broker's user reads neither its
// memory nor its environment; and what is asked about the process is still told.
func TestMemoryIsOutOfReach(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	// Root may read everything: then the broker is somebody else, who needs a way to it.
	user := &syscall.SysProcAttr{}
	if os.Getuid() == 0 {
		user.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
		for _, start := range []string{dir, filepath.Dir(binary)} {
			for path := start; path != os.TempDir() && len(path) > 1; path = filepath.Dir(path) {
				if err := os.Chmod(path, 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
		dir = filepath.Join(dir, "home")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	reads := func(pid int, file string) bool {
		cmd := exec.Command("head", "-c", "1", fmt.Sprintf("/proc/%d/%s", pid, file))
		cmd.SysProcAttr = user
		out, _ := cmd.CombinedOutput()
		return !strings.Contains(string(out), "ermission denied")
	}
	control := exec.Command("sleep", "100")
	control.SysProcAttr = user
	if err := control.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = control.Process.Kill(); _ = control.Wait() })
	p := launchAs(t, user, dir, nil, binary, "dev", "--listen-address=127.0.0.1:0", "--metrics-address=127.0.0.1:0")
	p.listen()
	for _, file := range []string{"mem", "environ", "maps"} {
		if !reads(control.Process.Pid, file) {
			t.Errorf("/proc/PID/%s of any process cannot be read: nothing is shown", file)
		}
		if reads(p.cmd.Process.Pid, file) {
			t.Errorf("/proc/PID/%s of the broker can be read by its own user", file)
		}
	}
	for _, metric := range []string{"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "process_max_fds", "process_start_time_seconds"} {
		if !strings.Contains(p.scrape(), "\n"+metric+" ") {
			t.Errorf("the metrics are without %s", metric)
		}
	}
	if code, _, stderr := runBroker(t, dir, []string{"BROKER_METRICS_ADDRESS=" + p.metrics}, "healthcheck"); code != 0 {
		t.Errorf("healthcheck: got %d, %s", code, stderr)
	}
}
