package main

import (
	"go/ast"
	"go/types"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/tools/go/analysis"
)

// noWeak reports what is broken, or unsafe in a process that holds secrets.
var noWeak = &analysis.Analyzer{
	Name: "noweak",
	Doc:  "reports broken cryptography, guessable randomness, unsafe memory, debugging endpoints and unverified TLS",
	Run:  runNoWeak,
}

var weak = map[string]string{
	"crypto/md5": "broken", "crypto/sha1": "broken", "crypto/des": "broken", "crypto/rc4": "broken",
	"math/rand": "guessable; take crypto/rand", "math/rand/v2": "guessable; take crypto/rand",
	"unsafe": "reaches all memory", "plugin": "loads code", "net/http/pprof": "shows memory to whoever asks", "expvar": "shows the command line to whoever asks",
}

// weakAllowed are imports that do no harm where they are.
var weakAllowed = []string{
	"internal/bench math/rand/v2", // chooses what is asked
	"client math/rand/v2",         // spreads retries over time
	"gen/exto/secrets/v1 unsafe",  // generated
	"internal/fsync unsafe",       // hands the kernel a file's descriptor; no secret comes there
}

func runNoWeak(pass *analysis.Pass) (any, error) {
	if !strings.HasPrefix(pass.Pkg.Path()+"/", module) {
		return nil, nil
	}
	for _, file := range pass.Files {
		if strings.HasSuffix(pass.Fset.File(file.Pos()).Name(), "_test.go") {
			continue
		}
		for _, spec := range file.Imports {
			path, _ := strconv.Unquote(spec.Path.Value)
			if why, ok := weak[path]; ok && !slices.Contains(weakAllowed, short(pass.Pkg.Path())+" "+path) {
				pass.Reportf(spec.Pos(), "%s: %s", path, why)
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if id, ok := n.(*ast.Ident); ok {
				if v, ok := pass.TypesInfo.Uses[id].(*types.Var); ok && v.IsField() && v.Pkg().Path() == "crypto/tls" && v.Name() == "InsecureSkipVerify" {
					pass.Reportf(id.Pos(), "InsecureSkipVerify: TLS with anybody")
				}
			}
			return true
		})
	}
	return nil, nil
}
