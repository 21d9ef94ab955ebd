package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestClientImports keeps what other programs get with the client library small.
func TestClientImports(t *testing.T) {
	t.Parallel()
	const module = "github.com/exto/secrets-broker/"
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", module+"client").Output()
	if err != nil {
		t.Fatalf("go list -deps: %v", err)
	}
	for _, dep := range strings.Fields(string(out)) {
		if !slices.ContainsFunc([]string{
			module + "client", module + "gen/", module + "secret", "google.golang.org/", "golang.org/x/", "github.com/google/uuid",
		}, func(allowed string) bool { return strings.HasPrefix(dep, allowed) }) {
			t.Errorf("client imports %s, by whatever way", dep)
		}
	}
}

// TestImports keeps what is for tests out of the product, and what is the
// broker's out of its callers.
func TestImports(t *testing.T) {
	t.Parallel()
	const module = "github.com/exto/secrets-broker/"
	for _, test := range []struct {
		root, has string
		never     []string // beginnings of paths
	}{
		{module + "cmd/broker", module + "server/vault/keyvault", []string{module + "internal/keyvaultfake", module + "server/vault/vaulttest", module + "client"}},
		{module + "client", module + "gen/exto/secrets/v1", []string{module + "server", module + "internal/", module + "client/", "github.com/Azure/", "github.com/AzureAD/"}},
		{module + "client/direct", module + "client", []string{module + "server", module + "internal/keyvaultfake", module + "client/brokertest"}},
	} {
		out, err := exec.Command("go", "list", "-deps", test.root).Output()
		if err != nil {
			t.Fatalf("go list -deps %s: %v", test.root, err)
		}
		deps := strings.Fields(string(out))
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
	const module = "github.com/exto/secrets-broker/"
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}}: {{join .Imports " "}}`, module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var got []string
	for line := range strings.Lines(string(out)) {
		importer, imports, _ := strings.Cut(line, ": ")
		if strings.Contains(imports, "github.com/Azure/azure-sdk-for-go/") {
			got = append(got, strings.TrimPrefix(importer, module))
		}
	}
	if want := []string{"client/direct", "server/vault/keyvault"}; !slices.Equal(got, want) {
		t.Errorf("Azure's SDK is imported by %v, want %v", got, want)
	}
}
