package main

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/exto/secrets-broker/"

// imported is what a package imports: itself, and by whatever way.
type imported struct {
	ImportPath    string
	Imports, Deps []string
}

// packages are those of the module. The go command is asked once.
var packages = sync.OnceValues(func() (map[string]imported, error) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", module+"...").Output()
	all := map[string]imported{}
	for lines := json.NewDecoder(strings.NewReader(string(out))); err == nil && lines.More(); {
		var p imported
		err = lines.Decode(&p)
		all[p.ImportPath] = p
	}
	return all, err
})

// TestClientImports keeps what other programs get with the client library small.
func TestClientImports(t *testing.T) {
	t.Parallel()
	for _, dep := range must2(packages())(t)[module+"client"].Deps {
		domain, _, _ := strings.Cut(dep, "/")
		if strings.Contains(domain, ".") && !slices.ContainsFunc([]string{
			module + "gen/", module + "secret", "google.golang.org/", "golang.org/x/", "github.com/google/uuid",
		}, func(allowed string) bool { return strings.HasPrefix(dep, allowed) }) {
			t.Errorf("client imports %s, by whatever way", dep)
		}
	}
}

// TestImports keeps what is for tests out of the product, and what is the
// broker's out of its callers.
func TestImports(t *testing.T) {
	t.Parallel()
	all := must2(packages())(t)
	for _, test := range []struct {
		root, has string
		never     []string // beginnings of paths
	}{
		{module + "cmd/broker", module + "server/vault/keyvault", []string{module + "internal/keyvaultfake", module + "server/vault/vaulttest", module + "client"}},
		{module + "client", module + "gen/exto/secrets/v1", []string{module + "server", module + "internal/", module + "client/", "github.com/Azure/", "github.com/AzureAD/"}},
		{module + "client/direct", module + "client", []string{module + "server", module + "internal/keyvaultfake", module + "client/brokertest"}},
	} {
		deps := all[test.root].Deps
		if !slices.Contains(deps, test.has) {
			t.Errorf("%s: got %d packages without %s, want all that it imports", test.root, len(deps), test.has)
		}
		for _, dep := range deps {
			for _, never := range test.never {
				if strings.HasPrefix(dep, never) {
					t.Errorf("%s imports %s, by whatever way", test.root, dep)
				}
			}
		}
	}
}

// TestAzureImports: two packages, and what stands in for Azure, know its SDK.
func TestAzureImports(t *testing.T) {
	t.Parallel()
	var got []string
	for path, p := range must2(packages())(t) {
		if slices.ContainsFunc(p.Imports, func(i string) bool { return strings.HasPrefix(i, "github.com/Azure/azure-sdk-for-go/") }) {
			got = append(got, strings.TrimPrefix(path, module))
		}
	}
	slices.Sort(got)
	if want := []string{"client/direct", "server/vault/keyvault"}; !slices.Equal(got, want) {
		t.Errorf("Azure's SDK is imported by %v, want %v", got, want)
	}
}
