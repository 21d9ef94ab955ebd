// Command run-keyvault runs a broker against a Key Vault in memory, for trying
// azure-keyvault without a subscription. The broker is the program that runs in
// production, as a process of its own, and has no switch for this: it finds the
// vault and the token service under their real names by way of HTTPS_PROXY,
// trusts them by SSL_CERT_FILE, and says who it is by the environment credential.
//
// It is for Linux: on macOS Go takes no notice of SSL_CERT_FILE.
package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/exto/secrets-broker/internal/devdir"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

// listening is the broker's line in its log when it takes calls.
var listening = regexp.MustCompile(`msg=listening grpc=(\S+)`)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: run-keyvault BROKER, which is the path of the broker's binary")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "run-keyvault:", err)
		os.Exit(1)
	}
}

// run starts the vault and the broker, and ends with the broker.
func run(broker string) (err error) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	fake, err := keyvaultfake.Start(keyvaultfake.Config{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fake.Close()) }()
	if err := devdir.Prepare(devdir.Name, time.Now()); err != nil {
		return fmt.Errorf("%s: %w", devdir.Name, err)
	}
	var renewing sync.WaitGroup
	ctx, stop := context.WithCancel(context.Background())
	defer func() { stop(); renewing.Wait() }()
	renewing.Go(func() { devdir.KeepRenewed(ctx, devdir.Name, slog.Default()) })
	in := func(name string) string { return filepath.Join(devdir.Name, name) }
	if err := devdir.WriteFile(in("keyvault-ca.pem"), fake.CAPEM(), 0o644); err != nil {
		return err
	}

	cmd := exec.Command(broker, "serve")
	// All that the broker is told, so that nothing of the shell's own settings
	// leads it to a real vault.
	cmd.Env = slices.Concat(fake.Env(), fake.Broker().Env(), []string{
		"SSL_CERT_FILE=" + in("keyvault-ca.pem"),
		"BROKER_TLS_CERT_FILE=" + in("server.pem"),
		"BROKER_TLS_KEY_FILE=" + in("server-key.pem"),
		"BROKER_TLS_CLIENT_CA_FILE=" + in("ca.pem"),
		"BROKER_POLICY_FILE=" + in("policy.yaml"),
		"BROKER_LISTEN_ADDRESS=" + cmp.Or(os.Getenv("BROKER_LISTEN_ADDRESS"), "127.0.0.1:7443"),
		"BROKER_METRICS_ADDRESS=" + cmp.Or(os.Getenv("BROKER_METRICS_ADDRESS"), "127.0.0.1:9464"),
		"PATH=" + os.Getenv("PATH"),
		"HOME=" + os.Getenv("HOME"),
	})
	cmd.Stdout = os.Stdout
	log, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	// In a group of its own, so that Ctrl-C reaches the broker once, by way of this
	// process: at the second it ends without waiting for its calls. It does not
	// outlive this process, nor the thread that starts it, which is why that is
	// kept.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // it may have ended
		}
	}()
	follow(log)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s serve: %w", broker, err)
	}
	return nil
}

// follow passes the broker's log on to its end, and prints the calls to try when
// the broker takes them.
func follow(log io.Reader) {
	lines := bufio.NewReader(log)
	for {
		line, err := lines.ReadString('\n')
		_, _ = os.Stderr.WriteString(line)
		if m := listening.FindStringSubmatch(line); m != nil {
			if err := devdir.PrintCalls(os.Stdout, devdir.Name, m[1]); err != nil {
				slog.Error("the sample calls could not be printed", "error", err)
			}
		}
		if err != nil {
			return
		}
	}
}
