package main

import (
	"go/ast"
	"go/constant"
	"go/types"
	"slices"
	"strings"

	"golang.org/x/tools/go/analysis"
	"golang.org/x/tools/go/types/typeutil"
)

// neverFormat keeps secrets out of everything that makes text:
//
//   - no message of the contract, and nothing that holds one, is an argument of a
//     function that formats;
//   - nor is an interface that may hold one, unless it is a parameter, and then the
//     function itself is one that formats, for its callers;
//   - the text of a secret, which is what secret.Value.Reveal gives, the fields with
//     debug_redact and the values of the Azure SDK, is touched in the functions that
//     revealing lists and nowhere else, and there it is no argument either.
//
// Calls of function values are not seen.
var neverFormat = &analysis.Analyzer{
	Name:      "neverformat",
	Doc:       "reports secrets that are formatted, or touched where nobody has to",
	Run:       runNeverFormat,
	FactTypes: []analysis.Fact{&secretText{}, &formats{}},
}

// revealing lists who may touch the text of a secret, and why.
var revealing = map[string]string{
	"(*server.service).GetSecret":    "puts it into the answer",
	"(*server.service).RotateSecret": "puts the token made into the answer",
	"server.parsePut":                "takes it out of the request",
	"server.parseRotate":             "takes it out of the request",
	"server.parseVerify":             "takes it out of the request",

	"(*server/broker.entry).weight": "its length counts in the cache",
	"(server/broker.digests).of":    "compares tokens by keyed hash",

	"(*server/vault/embedded.Store).Set": "encrypts it",
	"(*server/vault/keyvault.Vault).Set": "hands it to the SDK",
	"(*server/vault/keyvault.Vault).Get": "takes it from the SDK",

	"(*client/direct.Vault).get":     "takes it from the SDK",
	"(*client.Client).Put":           "puts it into the request",
	"(*client.Client).Rotate":        "puts it into the request, and takes the token made out of the answer",
	"(*client.Client).Get":           "takes it out of the answer",
	"(*client.Client).Verify":        "puts it into the request",
	"client.valid":                   "asks whether it is UTF-8",
	"(*client.Verifier).VerifyToken": "makes a keyed digest of it",

	"examples/console-api.handOut":       "hands the token out, once",
	"examples/worker.open":               "opens the database with it",
	"(*examples/instance.console).hello": "shows the token to the Console",
}

// apart are packages that the rule is not for.
var apart = []string{
	"gen/exto/secrets/v1",    // generated
	"secret",                 // is what hides values
	"server/vault/vaulttest", // tests, for the packages of vaults
	"internal/bench",         // its values are its own
	"internal/keyvaultfake",  // a vault for tests; its values are theirs
}

// formatting are the packages of which every function makes text of its arguments.
var formatting = []string{
	"errors", "fmt", "log", "log/slog", "strconv", "expvar", "text/template", "html/template",
	"encoding/json", "encoding/xml", "encoding/gob", "go.yaml.in/yaml/v3",
	"google.golang.org/protobuf/encoding/prototext", "google.golang.org/protobuf/encoding/protojson",
	"google.golang.org/grpc/status", "google.golang.org/grpc/grpclog",
}

// secretText marks a field that holds a secret, or a method that gives one.
type secretText struct{}

// formats marks a function that makes text of these of its parameters.
type formats struct{ Params []int }

func (*secretText) AFact()         {}
func (*secretText) String() string { return "secret" }
func (*formats) AFact()            {}
func (*formats) String() string    { return "formats" }

type checker struct {
	*analysis.Pass
	// decl is the function that is looked at; nil outside of one.
	decl *types.Func
}

func runNeverFormat(pass *analysis.Pass) (any, error) {
	if !strings.HasPrefix(pass.Pkg.Path()+"/", module) {
		return nil, nil
	}
	c := &checker{Pass: pass}
	if err := c.markRedacted(); err != nil {
		return nil, err
	}
	if slices.Contains(apart, short(pass.Pkg.Path())) {
		return nil, nil
	}
	var decls []ast.Decl
	for _, file := range pass.Files {
		if !strings.HasSuffix(pass.Fset.File(file.Pos()).Name(), "_test.go") { // tests print what they compare, and know no secrets
			decls = append(decls, file.Decls...)
		}
	}
	each := func(visit func(ast.Node)) {
		for _, d := range decls {
			c.decl = nil
			if f, ok := d.(*ast.FuncDecl); ok {
				c.decl = pass.TypesInfo.Defs[f.Name].(*types.Func)
			}
			ast.Inspect(d, func(n ast.Node) bool { visit(n); return true })
		}
	}
	for again := true; again; { // until no further function turns out to format
		again = false
		each(func(n ast.Node) { again = c.learn(n) || again })
	}
	assigned := map[ast.Expr]bool{}
	each(func(n ast.Node) {
		switch n := n.(type) {
		case *ast.AssignStmt:
			for _, l := range n.Lhs {
				assigned[l] = true
			}
		case *ast.CallExpr:
			for _, arg := range c.formatted(n) {
				c.judge(arg)
			}
		case *ast.SelectorExpr:
			if c.isText(n) && !assigned[n] && !c.mayReveal() {
				pass.Reportf(n.Sel.Pos(), "the text of a secret is touched in %s, which is not on the list of those who have to", c.name())
			}
		}
	})
	return nil, nil
}

func (c *checker) name() string {
	if c.decl == nil {
		return short(c.Pkg.Path())
	}
	return short(c.decl.FullName())
}

func (c *checker) mayReveal() bool { _, ok := revealing[c.name()]; return ok }

// learn marks the function that it is in, if n formats a parameter of it.
func (c *checker) learn(n ast.Node) (new bool) {
	call, ok := n.(*ast.CallExpr)
	if !ok || c.decl == nil {
		return false
	}
	for _, arg := range c.formatted(call) {
		if i := c.parameter(arg); i >= 0 && isOpen(c.TypesInfo.TypeOf(arg)) {
			var known formats
			c.ImportObjectFact(c.decl, &known)
			if !slices.Contains(known.Params, i) {
				c.ExportObjectFact(c.decl, &formats{append(slices.Clone(known.Params), i)})
				new = true
			}
		}
	}
	return new
}

// parameter is the place of the parameter that e is, of the function that it is in;
// -1: it is none.
func (c *checker) parameter(e ast.Expr) int {
	id, ok := ast.Unparen(e).(*ast.Ident)
	if !ok || c.decl == nil {
		return -1
	}
	params := c.decl.Signature().Params()
	for i := range params.Len() {
		if c.TypesInfo.Uses[id] == params.At(i) {
			return i
		}
	}
	return -1
}

// formatted are the arguments of which a call makes text.
func (c *checker) formatted(call *ast.CallExpr) []ast.Expr {
	switch callee := typeutil.Callee(c.TypesInfo, call).(type) {
	case *types.Builtin:
		if callee.Name() == "panic" {
			return call.Args
		}
	case *types.Func:
		if sel, ok := ast.Unparen(call.Fun).(*ast.SelectorExpr); ok && slices.Contains([]string{"String", "GoString", "Format"}, callee.Name()) && c.holdsSecret(c.TypesInfo.TypeOf(sel.X)) {
			return []ast.Expr{sel.X}
		}
		var known formats
		switch {
		case callee.Pkg() != nil && slices.Contains(formatting, callee.Pkg().Path()):
			if c.typesAlone(call) {
				return nil
			}
			return call.Args
		case c.ImportObjectFact(callee.Origin(), &known):
			var args []ast.Expr
			for _, i := range known.Params {
				if callee.Signature().Variadic() && i == callee.Signature().Params().Len()-1 {
					args = append(args, call.Args[i:]...)
				} else {
					args = append(args, call.Args[i])
				}
			}
			return args
		}
	}
	return nil
}

// typesAlone reports whether a call formats with no other verb than %T.
func (c *checker) typesAlone(call *ast.CallExpr) bool {
	for _, arg := range call.Args {
		if v := c.TypesInfo.Types[arg].Value; v != nil && v.Kind() == constant.String {
			verbs := strings.Count(constant.StringVal(v), "%")
			return verbs > 0 && verbs == strings.Count(constant.StringVal(v), "%T")
		}
	}
	return false
}

// judge reports an argument that is or may be a secret.
func (c *checker) judge(arg ast.Expr) {
	t := c.TypesInfo.TypeOf(arg)
	switch {
	case t == nil || c.TypesInfo.Types[arg].IsNil():
	case c.holdsSecret(t):
		c.Reportf(arg.Pos(), "%s may hold secrets: it must not be formatted", short(t.String()))
	case isOpen(t) && c.parameter(arg) < 0:
		c.Reportf(arg.Pos(), "what this %s holds is not known here, and it must not be formatted; %%T is all right", short(t.String()))
	default:
		ast.Inspect(arg, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok && c.isText(sel) {
				c.Reportf(sel.Sel.Pos(), "the text of a secret must not be formatted")
			}
			return true
		})
	}
}

// isText reports whether sel is the text of a secret, or the method that gives it.
func (c *checker) isText(sel *ast.SelectorExpr) bool {
	obj := c.TypesInfo.Uses[sel.Sel]
	switch obj := obj.(type) {
	case *types.Func:
		return obj.FullName() == "("+module+"secret.Value).Reveal" || c.ImportObjectFact(obj, &secretText{})
	case *types.Var:
		return obj.IsField() && (isSDKValue(obj) || c.ImportObjectFact(obj, &secretText{}))
	}
	return false
}

func isSDKValue(field *types.Var) bool {
	return field.Name() == "Value" && field.Pkg() != nil && strings.HasSuffix(field.Pkg().Path(), "/azsecrets") &&
		types.Identical(field.Type(), types.NewPointer(types.Typ[types.String]))
}

// holdsSecret reports whether t is a message of the contract or a secret of the SDK,
// or leads to one.
func (c *checker) holdsSecret(t types.Type) bool { return holds(t, map[types.Type]bool{}) }

func holds(t types.Type, seen map[types.Type]bool) bool {
	t = types.Unalias(t)
	if seen[t] {
		return false
	}
	seen[t] = true
	if named, ok := t.(*types.Named); ok && named.Obj().Pkg() != nil && strings.HasPrefix(named.Obj().Pkg().Path(), module+"gen/") {
		if m, _, _ := types.LookupFieldOrMethod(types.NewPointer(t), true, nil, "ProtoReflect"); m != nil {
			_, message := t.Underlying().(*types.Struct)
			return message
		}
	}
	switch u := t.Underlying().(type) {
	case *types.Pointer:
		return holds(u.Elem(), seen)
	case *types.Slice:
		return holds(u.Elem(), seen)
	case *types.Array:
		return holds(u.Elem(), seen)
	case *types.Chan:
		return holds(u.Elem(), seen)
	case *types.Map:
		return holds(u.Key(), seen) || holds(u.Elem(), seen)
	case *types.Struct:
		for f := range u.Fields() {
			if isSDKValue(f) || holds(f.Type(), seen) {
				return true
			}
		}
	}
	return false
}

// isOpen reports whether t is an interface that a message meets, or a slice of such.
func isOpen(t types.Type) bool {
	switch u := t.Underlying().(type) {
	case *types.Slice:
		return isOpen(u.Elem())
	case *types.Interface:
		for m := range u.Methods() {
			if !slices.Contains([]string{"String", "ProtoReflect", "ProtoMessage", "Reset", "Descriptor"}, m.Name()) {
				return false
			}
		}
		return true
	}
	return false
}
