// Command bench measures the broker in one run on one machine, beside an empty
// gRPC server with grpc-go's defaults, called the floor. Figures of two machines
// say little beside each other, and neither do those of two hours of one machine;
// ratios of two windows that follow on each other do.
//
// It starts the servers, and what loads them, as processes of their own: itself,
// with a command that is for nobody else, and the broker as it is in production.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if len(os.Args) > 1 && os.Args[1][0] != '-' {
		err = runChild(ctx, os.Args[1], os.Args[2:])
	} else {
		err = run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// runChild does what a child of this program is for.
func runChild(ctx context.Context, command string, arguments []string) error {
	switch {
	case command == "load" && len(arguments) == 0:
		runtime.GOMAXPROCS(1) // one thread is enough, and leaves the servers theirs
		return runLoad(ctx, os.Stdin, os.Stdout)
	case command == "floor" && len(arguments) == 1:
		return runFloor(ctx, arguments[0])
	case command == "fake" && len(arguments) == 0:
		return runFake(ctx, os.Stdout)
	}
	return fmt.Errorf("%s is not for you to call: bench starts its own children", command)
}

// bench is one run.
type bench struct {
	plan
	broker string // the program
	// unrecorded is the same but for the lines of calls that change nothing.
	unrecorded string
	dir        string // of certificates and stores
	progress   io.Writer
}

// plan is how much of it there is.
type plan struct {
	rounds      int
	warm        time.Duration // before each window
	window      time.Duration
	storeWindow time.Duration // of the store beside bbolt
	sizes       []int         // of stores, in secrets; the smallest first
}

var (
	wholePlan = plan{rounds: 7, warm: 200 * time.Millisecond, window: 1500 * time.Millisecond, storeWindow: 700 * time.Millisecond, sizes: []int{1_000, 100_000, 1_000_000}}
	quickPlan = plan{rounds: 3, warm: 150 * time.Millisecond, window: 400 * time.Millisecond, storeWindow: 300 * time.Millisecond, sizes: []int{1_000, 100_000}}
)

func (b *bench) say(format string, args ...any) {
	_, _ = fmt.Fprintf(b.progress, format+"\n", args...)
}

func run(ctx context.Context, arguments []string, out, progress io.Writer) (err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	broker := flags.String("broker", "bin/broker", "the broker's `program`")
	docs := flags.String("docs", "", "the `folder` to write performance.md and performance.svg to")
	unrecorded := flags.String("unrecorded", "bin/unrecorded", "the same `program`, built with the tag unrecorded")
	quick := flags.Bool("quick", false, "fewer and shorter rounds, and no store of a million secrets")
	rounds := flags.Int("rounds", 0, "how many `rounds`; 7, or 3 if quick")
	data := flags.String("data", os.TempDir(), "a `folder` for certificates and stores, which are removed afterwards")
	if err := flags.Parse(arguments); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if _, err := cpuTime(os.Getpid()); err != nil {
		return err
	}
	runtime.LockOSThread() // children are killed at the end of the thread that started them
	b := &bench{plan: wholePlan, progress: progress}
	if *quick {
		b.plan = quickPlan
	}
	if *rounds > 0 {
		b.rounds = *rounds
	}
	if b.broker, err = filepath.Abs(*broker); err != nil {
		return err
	}
	if b.unrecorded, err = filepath.Abs(*unrecorded); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(*data, "secrets-broker-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()

	r, err := b.measure(ctx)
	if err != nil {
		return err
	}
	if err := r.text(out); err != nil || *docs == "" {
		return err
	}
	return r.document(*docs)
}

// measure does all of it, one part after the other.
func (b *bench) measure(ctx context.Context) (r *report, err error) {
	r = &report{plan: b.plan, date: time.Now()}
	if r.fsync, err = fsyncTime(b.dir); err != nil {
		return nil, err
	}
	if r.calls, r.audit, r.flood, err = b.measureServers(ctx); err != nil {
		return nil, err
	}
	if r.durable, err = b.measureDurable(ctx); err != nil {
		return nil, err
	}
	r.sizes, err = b.measureSizes(ctx)
	return r, err
}

func (b *bench) measureServers(ctx context.Context) (calls []callResult, audit map[call][]pair, flood floodResult, err error) {
	b.say("starting and filling the servers")
	targets, err := b.startTargets(ctx)
	if err != nil {
		return nil, nil, flood, err
	}
	defer targets.stop()
	if err := b.warmUp(ctx, targets); err != nil {
		return nil, nil, flood, err
	}
	// First, while the disk has nothing left to do of what was put.
	if audit, err = b.measureAudit(ctx, targets); err != nil {
		return nil, nil, flood, err
	}
	if calls, err = b.measureCalls(ctx, targets); err != nil {
		return nil, nil, flood, err
	}
	flood, err = b.measureFlood(ctx, targets)
	return calls, audit, flood, err
}
