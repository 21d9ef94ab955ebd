package main

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// TestRun is make examples: the calls that it prints work as they are, and when it
// has ended nothing is left, nor does anything run on when it was killed.
func TestRun(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]struct {
		signal syscall.Signal
		code   int
	}{
		"interrupted": {syscall.SIGINT, 0},
		"hung up":     {syscall.SIGHUP, 0},
		"killed":      {syscall.SIGKILL, -1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if end.signal == syscall.SIGKILL && runtime.GOOS != "linux" {
				t.Skip("processes die with their parent on Linux alone")
			}
			dir := databaseFolder(t)
			var printed transcript
			s := newSupervisor(printed.add)
			t.Cleanup(s.stop)
			program, m, err := s.start(t.Context(), program{
				name: "run", path: filepath.Join(programs, "run"), args: []string{programs},
				env: []string{"TMPDIR=" + dir}, ready: regexp.MustCompile(`^curl .* -d @\S+create\.json (\S+)/instances$`),
			})
			if err != nil {
				t.Fatalf("%v: %s", err, strings.Join(printed.of("run"), "\n"))
			}
			if end.signal == syscall.SIGINT {
				pasted(t, printed.of("run"))
			}
			program.end(end.signal)
			if code := program.cmd.ProcessState.ExitCode(); code != end.code {
				t.Errorf("got exit code %d, want %d", code, end.code)
			}
			all := strings.Join(printed.of("run"), "\n")
			addresses := regexp.MustCompile(`(?:http|grpc|metrics)=(127\S+)`).FindAllStringSubmatch(all, -1)
			if port := regexp.MustCompile(`"127\.0\.0\.1", port (\d+)`).FindStringSubmatch(all); port != nil {
				addresses = append(addresses, []string{"", "127.0.0.1:" + port[1]})
			}
			if len(addresses) < 3 || !strings.Contains(all, "http="+strings.TrimPrefix(m[1], "http://")) {
				t.Errorf("got addresses %v, want those of the broker and %s", addresses, m[1])
			}
			for _, address := range addresses {
				eventually(t, "nobody listens on "+address[1], func() bool {
					conn, err := net.Dial("tcp", address[1])
					if err == nil {
						_ = conn.Close()
					}
					return err != nil
				})
			}
			if left, err := os.ReadDir(dir); end.code == 0 && (err != nil || len(left) != 0) {
				t.Errorf("got %v, %v left, want nothing", left, err)
			}
		})
	}
}

// pasted runs the calls that were printed, in their order.
func pasted(t *testing.T, lines []string) {
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Logf("the calls are not tried: %v", err)
		return
	}
	token := regexp.MustCompile(`^\{"id":"demo","registration_token":"exto_rt_\S+"\}\n$`)
	var got []bool
	for _, line := range lines {
		if !strings.HasPrefix(line, "curl ") {
			continue
		}
		out, err := exec.CommandContext(t.Context(), "sh", "-c", line).CombinedOutput()
		if err != nil || len(out) != 0 && !token.Match(out) {
			t.Errorf("%s: got %s, %v", line, out, err)
		}
		got = append(got, len(out) != 0)
	}
	if want := []bool{true, true, false, false, true}; !slices.Equal(got, want) {
		t.Errorf("got answers with a token %v, want %v", got, want)
	}
}
