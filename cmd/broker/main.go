// Command broker is the secrets broker: the one process that owns the
// connection to the vault and serves the secrets of customer instances to
// callers known by mutual TLS.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	// A limit on file sizes has to be an error of the write that meets it, as a
	// full disk is, and not the end of the process.
	// So has the end of whoever reads standard output.
	signal.Ignore(syscall.SIGXFSZ, syscall.SIGPIPE)
	err := protectMemory() // before anything secret is in it
	if err == nil {
		err = checkDebug(os.Getenv("GODEBUG"))
	}
	if err == nil {
		err = run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	}
	if err != nil {
		// One line, whatever was joined into it.
		fmt.Fprintln(os.Stderr, "broker: "+strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

// checkDebug refuses what has Go's HTTP/2 print all that is sent and received,
// secrets and access tokens too.
func checkDebug(godebug string) error {
	if strings.Contains(godebug, "http2debug=1") || strings.Contains(godebug, "http2debug=2") { // as the packages look for it
		return errors.New("GODEBUG has http2debug, which prints every secret to the log; leave it out")
	}
	return nil
}
