// Command vet is the project's own checks, for go vet -vettool: that secrets are
// never formatted, and that nothing weak or unsafe is used.
package main

import (
	"strings"

	"golang.org/x/tools/go/analysis/unitchecker"
)

const module = "github.com/exto/secrets-broker/"

func main() { unitchecker.Main(neverFormat, noWeak) }

// short is a name without the module's path.
func short(name string) string { return strings.ReplaceAll(name, module, "") }
