package main

import (
	"fmt"
	"strings"

	"github.com/exto/secrets-broker/server/audit"
)

type auditVerifyCommand struct {
	Files []string `arg:"" name:"file" help:"Files of audit logs, in any order; those of several brokers together too."`
	Head  string   `name:"head" placeholder:"HASH" help:"A head=HASH that the log of a broker once said. A line has to have this hash: so everything up to it is there."`
}

// Run names the first line that was tampered with, or says that all holds.
func (c auditVerifyCommand) Run(s streams) error {
	report, err := audit.Verify(c.Files, c.Head)
	var b strings.Builder
	for _, chain := range report.Chains {
		fmt.Fprintf(&b, "chain %s holds: %d lines, sequence %d to %d, in %s\n", chain.ID, chain.Lines, chain.First, chain.Last, strings.Join(chain.Files, " "))
		if chain.First > 1 {
			b.WriteString("  it goes on from older files, which were not given\n")
		}
		fmt.Fprintf(&b, "  head %s\n", chain.Head)
		if n := len(chain.Open); n > 0 {
			fmt.Fprintf(&b, "  intents without outcome: %d, such as %s\n", n, chain.Open[0])
		} else {
			b.WriteString("  every intent has its outcome\n")
		}
		if chain.Torn != "" {
			fmt.Fprintf(&b, "  %s is torn, as a kill in the middle of a write leaves it; the next start cuts it off\n", chain.Torn)
		}
	}
	if report.HeadAt != "" {
		fmt.Fprintf(&b, "head %s stands at %s\n", c.Head, report.HeadAt)
	}
	if _, werr := fmt.Fprint(s.out, b.String()); err == nil {
		err = werr
	}
	return err
}
