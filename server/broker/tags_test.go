package broker

import (
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// fullRecord has everything that a version can bear, as long as it gets.
func fullRecord(t testing.TB) (secret.Key, record) {
	t.Helper()
	key, err := secret.ParseKey("instance-" + strings.Repeat("a", 100) + "-oidc-secret")
	if err != nil {
		t.Fatal(err)
	}
	version := func(n int) string { return fmt.Sprintf("%032x", n) }
	at := time.Date(2026, 11, 24, 2, 3, 4, 567e6, time.UTC)
	r := record{
		format:     currentFormat,
		key:        key.String(),
		generation: maxCount,
		createdBy:  "spiffe://console.exto/" + strings.Repeat("i", 512-len("spiffe://console.exto/")),
		epoch:      maxCount,
		auditID:    uuid.NewString(),
		made:       done{letter: letterRotate, id: uuid.NewString()},
		previous:   version(1),
		graceEnd:   at,
		first:      maxCount,
		deleted:    &mark{at: at, wasEnabled: false, id: uuid.NewString()},
	}
	for i := range remembered + 1 {
		r.others = append(r.others, done{letter: "dcpr"[i%4], id: uuid.NewString(), version: version(i)})
	}
	return key, r
}

// TestTagFormat: the form of each tag, by which brokers of other releases, and
// whoever looks at a version with az, know what it says.
func TestTagFormat(t *testing.T) {
	t.Parallel()
	const (
		id      = `[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}`
		version = `[0-9a-f]{32}`
		at      = `2026-11-24T02:03:04\.567Z`
		entry   = `[prdc]:` + id + `:` + version
	)
	want := map[string]string{
		"exto-format":       `1`,
		"exto-key":          `instance-a{100}-oidc-secret`,
		"exto-generation":   `9007199254740992`,
		"exto-created-by":   `spiffe://console\.exto/i+`,
		"exto-epoch":        `9007199254740992 ` + id,
		"exto-operation":    `r:` + id,
		"exto-operations-1": entry + `(?:,` + entry + `){3}`,
		"exto-operations-2": entry + `(?:,` + entry + `){4}`,
		"exto-previous":     version + ` ` + at,
		"exto-first":        `9007199254740992`,
		"exto-deleted":      at + ` disabled ` + id,
	}
	key, r := fullRecord(t)
	tags, dropped := r.tags(key, nil)
	if got, want := slices.Sorted(maps.Keys(tags)), slices.Sorted(maps.Keys(want)); !slices.Equal(got, want) || len(got) > 11 || len(dropped) != 0 {
		t.Fatalf("got tags %v, want %v, at most 11", got, want)
	}
	for name, form := range want {
		if !regexp.MustCompile(`^(?:` + form + `)$`).MatchString(tags[name]) {
			t.Errorf("%s: got %q, want the form %s", name, tags[name], form)
		}
	}
	if err := vault.CheckTags(tags); err != nil {
		t.Error(err)
	}
	if got := parseTags(tags); !reflect.DeepEqual(got, r) {
		t.Errorf("got %+v\nback, want %+v", got, r)
	}
	r.deleted.wasEnabled = true
	if tags, _ := r.tags(key, nil); !strings.Contains(tags[tagDeleted], " enabled ") {
		t.Errorf("got %q, want it to say that it was enabled", tags[tagDeleted])
	}
}

// TestTagsOfAnUpdateOfSomebodyElsesVersion: it stays at generation 0.
func TestTagsOfAnUpdateOfSomebodyElsesVersion(t *testing.T) {
	t.Parallel()
	key, full := fullRecord(t)
	tags, _ := record{deleted: full.deleted, others: full.others}.tags(key, nil)
	for _, name := range []string{tagGeneration, tagCreatedBy, tagEpoch, tagOperation} {
		if _, ok := tags[name]; ok {
			t.Errorf("got %s, which only the broker's own versions bear", name)
		}
	}
	if r := parseTags(tags); r.generation != 0 || r.createdBy != "" || r.deleted == nil || len(r.others) != len(full.others) {
		t.Errorf("got %+v", r)
	}
}

func TestTagsOfOthersAreCarriedInOrderOfName(t *testing.T) {
	t.Parallel()
	key, r := fullRecord(t)
	bears := vault.Tags{"exto-generation": "77", "exto-first": "77", "exto-later": "kept"}
	for i := range 6 {
		bears[fmt.Sprintf("team-%d", i)] = "x"
	}
	tags, dropped := r.tags(key, bears)
	if want := []string{"team-3", "team-4", "team-5"}; !slices.Equal(dropped, want) {
		t.Errorf("got %v dropped, want %v", dropped, want)
	}
	if len(tags) != vault.MaxTags || tags["team-2"] != "x" || tags["exto-later"] != "kept" || tags[tagGeneration] == "77" {
		t.Errorf("got %v", tags)
	}
}

// FuzzParseTags: whatever a person writes into the tags is read without panic, and
// what is written from it fits the vault and reads the same.
func FuzzParseTags(f *testing.F) {
	key, full := fullRecord(f)
	seed := func(tags vault.Tags) {
		f.Add(tags[tagGeneration], tags[tagCreatedBy], tags[tagEpoch], tags[tagOperation], tags[tagOperations1], tags[tagOperations2], tags[tagPrevious], tags[tagFirst], tags[tagDeleted])
	}
	tags, _ := full.tags(key, nil)
	seed(tags)
	seed(vault.Tags{})
	seed(vault.Tags{tagGeneration: "9223372036854775807", tagEpoch: "9223372036854775807 x", tagOperation: "p:", tagOperations1: ":::,,p:x:y:z", tagOperations2: "p:\x00:1",
		tagPrevious: " 2026-01-01T00:00:00Z", tagFirst: "-9223372036854775808", tagDeleted: "9999-12-31T23:59:59-01:00 enabled x"})
	f.Fuzz(func(t *testing.T, generation, createdBy, epoch, operation, operations1, operations2, previous, first, deleted string) {
		in := vault.Tags{tagGeneration: generation, tagCreatedBy: createdBy, tagEpoch: epoch, tagOperation: operation, tagOperations1: operations1,
			tagOperations2: operations2, tagPrevious: previous, tagFirst: first, tagDeleted: deleted}
		if vault.CheckTags(in) != nil {
			t.Skip("no vault stores these")
		}
		r := parseTags(in)
		if r.generation < 0 || r.epoch < 0 || r.first < 0 || r.generation+1 <= 0 || r.epoch+1 <= 0 {
			t.Errorf("got generation %d, epoch %d, first %d", r.generation, r.epoch, r.first)
		}
		if h := r.history("v"); len(h) > remembered+1 {
			t.Errorf("got %d operations in the history", len(h))
		}
		out, _ := r.tags(key, in)
		if err := vault.CheckTags(out); err != nil {
			t.Error(err)
		}
		r.format, r.key = currentFormat, key.String()
		if again := parseTags(out); !reflect.DeepEqual(again, r) {
			t.Errorf("got %+v\nback, want %+v", again, r)
		}
	})
}
