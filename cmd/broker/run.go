package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/exto/secrets-broker/server/authz"
)

// commands is the command line. Each flag has its environment variable beside
// it; the flag wins.
type commands struct {
	Serve       serveCommand       `cmd:"" help:"Serve the secrets of a vault, configured by environment or flags."`
	Dev         devCommand         `cmd:"" help:"Serve on this machine with no set-up: embedded store, certificates and policy in .broker-dev."`
	Healthcheck healthcheckCommand `cmd:"" help:"Ask a running broker on this machine whether it is ready. Exits 0 or 1 within 2 s."`
	Policy      struct {
		Check policyCheckCommand `cmd:"" help:"Say whether a policy file is good, or which line is not."`
	} `cmd:"" help:"Look at policy files."`
	Audit struct {
		Verify auditVerifyCommand `cmd:"" help:"Say whether audit logs hold, or which line was changed, dropped, moved or doubled."`
	} `cmd:"" help:"Look at audit logs."`
}

// streams are where a command writes: results to out, the log to err.
type streams struct{ out, err io.Writer }

// run parses args and runs the command that they name until it is done or ctx
// ends. The error is one line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var (
		cli    commands
		exited bool
	)
	parser, err := kong.New(&cli,
		kong.Name("broker"),
		kong.Description("The secrets broker: typed access to the secrets of customer instances, over mutual TLS."),
		kong.Writers(stdout, stderr),
		kong.Exit(func(int) { exited = true }), // --help
		kong.BindTo(ctx, (*context.Context)(nil)),
		kong.Bind(streams{stdout, stderr}),
	)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		args = []string{"--help"}
	}
	command, err := parser.Parse(args)
	if exited {
		return nil
	}
	if err != nil {
		return commandLineError(parser.Model, err)
	}
	return command.Run()
}

// commandLineError says what to do about an error of kong's. Where that names a
// flag, the value may as well have come from its variable.
func commandLineError(app *kong.Application, err error) error {
	for _, command := range app.Leaves(false) {
		for _, f := range command.Flags {
			rest, ok := strings.CutPrefix(err.Error(), "--"+f.Name)
			if ok && len(f.Envs) == 1 && f.HasDefault && strings.IndexAny(rest, ": ") == 0 {
				return fmt.Errorf("%s (--%s)%s; set it to a value such as %s", f.Envs[0], f.Name, rest, f.Default)
			}
		}
	}
	return fmt.Errorf("%w; see broker --help", err)
}

// logSettings say how the log looks. It goes to standard error, always.
type logSettings struct {
	Format string `name:"log-format" env:"BROKER_LOG_FORMAT" default:"text" enum:"text,json" help:"Form of the log: text or json."`
	Level  string `name:"log-level" env:"BROKER_LOG_LEVEL" default:"info" enum:"debug,info,warn,error" help:"Least level that is logged: debug (every call), info, warn or error."`
}

func (s logSettings) logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(s.Level)); err != nil {
		return nil, err
	}
	options := &slog.HandlerOptions{Level: level}
	if s.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return slog.New(slog.NewTextHandler(w, options)), nil
}

type policyCheckCommand struct {
	File string `arg:"" help:"The policy file, in YAML."`
}

// Run says whether the file is a good policy.
func (c policyCheckCommand) Run(s streams) error {
	if _, err := readPolicy(c.File); err != nil {
		return err
	}
	_, err := fmt.Fprintf(s.out, "%s: good\n", c.File)
	return err
}

func readPolicy(file string) (*authz.Policy, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	policy, err := authz.ParsePolicy(data)
	if err != nil {
		return nil, fmt.Errorf("policy %s: %w", file, err)
	}
	return policy, nil
}
