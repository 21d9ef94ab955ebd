package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

// TestReadmeListsEverySetting keeps the table of variables and the program one.
func TestReadmeListsEverySetting(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	parser, err := kong.New(&commands{})
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{} // variable → its line
	for line := range strings.Lines(string(readme)) {
		if cells := strings.Split(line, "|"); len(cells) > 3 {
			for _, name := range strings.Fields(cells[1]) {
				rows[strings.Trim(name, "`")] = line
			}
		}
	}
	seen := 0
	for _, command := range parser.Model.Children {
		if command.Name != "serve" {
			continue
		}
		for _, flag := range command.Flags {
			seen++
			if len(flag.Envs) != 1 {
				t.Errorf("--%s: got variables %v, want one", flag.Name, flag.Envs)
				continue
			}
			env := flag.Envs[0]
			if got, want := flag.Name, strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(env, "BROKER_")), "_", "-"); got != want {
				t.Errorf("%s: got flag --%s, want --%s", env, got, want)
			}
			if row := rows[env]; row == "" {
				t.Errorf("README.md has no row for %s", env)
			} else if flag.HasDefault && !strings.Contains(row, "`"+flag.Default+"`") {
				t.Errorf("README.md: the row of %s has not its default %s: %s", env, flag.Default, row)
			}
		}
	}
	if seen < 10 {
		t.Errorf("got %d flags of serve, want all of them", seen)
	}
}

// TestSecurityPageNamesTests: each test that docs/security.md promises is there.
func TestSecurityPageNamesTests(t *testing.T) {
	t.Parallel()
	const docs = "../../docs"
	page := must2(os.ReadFile(filepath.Join(docs, "security.md")))(t)
	links := regexp.MustCompile(`\[((?:Test|Fuzz)\w+)\]\(([^)]+)\)`).FindAllStringSubmatch(string(page), -1)
	if len(links) < 30 {
		t.Errorf("got %d links to tests", len(links))
	}
	for _, l := range links {
		source := must2(os.ReadFile(filepath.Join(docs, l[2])))(t)
		if !strings.Contains(string(source), "\nfunc "+l[1]+"(") {
			t.Errorf("%s has no %s", l[2], l[1])
		}
	}
}

// TestGoBlocksAreCompiled: the Go code in the pages stands, line for line, in a file
// that is compiled. Only the indentation may differ.
func TestGoBlocksAreCompiled(t *testing.T) {
	t.Parallel()
	const root = "../.."
	plain := func(text string) string {
		var b strings.Builder
		for line := range strings.Lines(text) {
			b.WriteString("\n" + strings.TrimSpace(line))
		}
		return b.String() + "\n"
	}
	var pages, sources []string
	if err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || path != root && strings.HasPrefix(d.Name(), ".")):
			return filepath.SkipDir
		case filepath.Ext(path) == ".md":
			pages = append(pages, path)
		case filepath.Ext(path) == ".go":
			sources = append(sources, plain(string(must2(os.ReadFile(path))(t))))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	blocks := 0
	for _, page := range pages {
		for _, m := range regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllStringSubmatch(string(must2(os.ReadFile(page))(t)), -1) {
			blocks++
			if !slices.ContainsFunc(sources, func(source string) bool { return strings.Contains(source, plain(m[1])) }) {
				t.Errorf("%s: no Go file has\n%s", page, m[1])
			}
		}
	}
	if blocks < 4 {
		t.Errorf("got %d blocks, want those of README.md and examples/README.md", blocks)
	}
}
