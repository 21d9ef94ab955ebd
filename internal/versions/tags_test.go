package versions

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
)

// fullRecord has everything that a version can bear, as long as it gets.
func fullRecord(t testing.TB) (secret.Key, Record) {
	t.Helper()
	key, err := secret.ParseKey("instance-" + strings.Repeat("a", 100) + "-oidc-secret")
	if err != nil {
		t.Fatal(err)
	}
	version := func(n int) string { return fmt.Sprintf("%032x", n) }
	at := time.Date(2026, 11, 24, 2, 3, 4, 567e6, time.UTC)
	r := Record{
		Format:     CurrentFormat,
		Name:       key.String(),
		Generation: maxCount,
		CreatedBy:  "spiffe://console.exto/" + strings.Repeat("i", 512-len("spiffe://console.exto/")),
		Epoch:      maxCount,
		AuditID:    uuid.NewString(),
		Made:       Done{Letter: LetterRotate, ID: uuid.NewString()},
		Previous:   version(1),
		GraceEnd:   at,
		First:      maxCount,
		Deleted:    &Mark{At: at, WasEnabled: false, ID: uuid.NewString()},
	}
	for i := range Remembered + 1 {
		r.Others = append(r.Others, Done{Letter: "dcpr"[i%4], ID: uuid.NewString(), Version: version(i)})
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
	tags, dropped := r.Encode(key, nil)
	if got, want := slices.Sorted(maps.Keys(tags)), slices.Sorted(maps.Keys(want)); !slices.Equal(got, want) || len(got) > 11 || len(dropped) != 0 {
		t.Fatalf("got tags %v, want %v, at most 11", got, want)
	}
	for name, form := range want {
		if !regexp.MustCompile(`^(?:` + form + `)$`).MatchString(tags[name]) {
			t.Errorf("%s: got %q, want the form %s", name, tags[name], form)
		}
	}
	if err := tags.Check(); err != nil {
		t.Error(err)
	}
	if got := Parse(tags); !reflect.DeepEqual(got, r) {
		t.Errorf("got %+v\nback, want %+v", got, r)
	}
	r.Deleted.WasEnabled = true
	if tags, _ := r.Encode(key, nil); !strings.Contains(tags[tagDeleted], " enabled ") {
		t.Errorf("got %q, want it to say that it was enabled", tags[tagDeleted])
	}
}

// TestTagsOfAnUpdateOfSomebodyElsesVersion: it stays at generation 0.
func TestTagsOfAnUpdateOfSomebodyElsesVersion(t *testing.T) {
	t.Parallel()
	key, full := fullRecord(t)
	tags, _ := Record{Deleted: full.Deleted, Others: full.Others}.Encode(key, nil)
	for _, name := range []string{tagGeneration, tagCreatedBy, tagEpoch, tagOperation} {
		if _, ok := tags[name]; ok {
			t.Errorf("got %s, which only the broker's own versions bear", name)
		}
	}
	if r := Parse(tags); r.Generation != 0 || r.CreatedBy != "" || r.Deleted == nil || len(r.Others) != len(full.Others) {
		t.Errorf("got %+v", r)
	}
}

func TestTagsOfOthersAreCarriedInOrderOfName(t *testing.T) {
	t.Parallel()
	key, r := fullRecord(t)
	bears := Tags{"exto-generation": "77", "exto-first": "77", "exto-later": "kept"}
	for i := range 6 {
		bears[fmt.Sprintf("team-%d", i)] = "x"
	}
	tags, dropped := r.Encode(key, bears)
	if want := []string{"team-3", "team-4", "team-5"}; !slices.Equal(dropped, want) {
		t.Errorf("got %v dropped, want %v", dropped, want)
	}
	if len(tags) != MaxTags || tags["team-2"] != "x" || tags["exto-later"] != "kept" || tags[tagGeneration] == "77" {
		t.Errorf("got %v", tags)
	}
}

// FuzzParseTags: whatever a person writes into the tags is read without panic, and
// what is written from it fits the vault and reads the same.
func FuzzParseTags(f *testing.F) {
	key, full := fullRecord(f)
	seed := func(tags Tags) {
		f.Add(tags[tagGeneration], tags[tagCreatedBy], tags[tagEpoch], tags[tagOperation], tags[tagOperations1], tags[tagOperations2], tags[tagPrevious], tags[tagFirst], tags[tagDeleted])
	}
	tags, _ := full.Encode(key, nil)
	seed(tags)
	seed(Tags{})
	seed(Tags{tagGeneration: "9223372036854775807", tagEpoch: "9223372036854775807 x", tagOperation: "p:", tagOperations1: ":::,,p:x:y:z", tagOperations2: "p:\x00:1",
		tagPrevious: " 2026-01-01T00:00:00Z", tagFirst: "-9223372036854775808", tagDeleted: "9999-12-31T23:59:59-01:00 enabled x"})
	f.Fuzz(func(t *testing.T, generation, createdBy, epoch, operation, operations1, operations2, previous, first, deleted string) {
		in := Tags{tagGeneration: generation, tagCreatedBy: createdBy, tagEpoch: epoch, tagOperation: operation, tagOperations1: operations1,
			tagOperations2: operations2, tagPrevious: previous, tagFirst: first, tagDeleted: deleted}
		if in.Check() != nil {
			t.Skip("no vault stores these")
		}
		r := Parse(in)
		if r.Generation < 0 || r.Epoch < 0 || r.First < 0 || r.Generation+1 <= 0 || r.Epoch+1 <= 0 {
			t.Errorf("got generation %d, epoch %d, first %d", r.Generation, r.Epoch, r.First)
		}
		if h := r.History("v"); len(h) > Remembered+1 {
			t.Errorf("got %d operations in the history", len(h))
		}
		out, _ := r.Encode(key, in)
		if err := out.Check(); err != nil {
			t.Error(err)
		}
		r.Format, r.Name = CurrentFormat, key.String()
		if again := Parse(out); !reflect.DeepEqual(again, r) {
			t.Errorf("got %+v\nback, want %+v", again, r)
		}
	})
}
