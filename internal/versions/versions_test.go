package versions_test

import (
	"testing"
	"time"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/server/vault"
)

// TestArrangeWhatIsDisabled: the vault says no more than that the current version is
// disabled. Of those of the same second somebody else's is taken for it.
func TestArrangeWhatIsDisabled(t *testing.T) {
	t.Parallel()
	now := time.Now().Truncate(time.Second)
	for name, test := range map[string]struct {
		outside time.Time
		want    int64 // generation
	}{
		"the same second": {now, 0},
		"a second before": {now.Add(-time.Second), 2},
		"a second after":  {now.Add(time.Second), 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var l versions.List
			for generation, enabled := range []bool{false, false, false, true} {
				v := versions.New(vault.Properties{Created: now, Enabled: enabled})
				if v.Generation = int64(generation); generation == 0 {
					v.Created = test.outside
				}
				l = append(l, v)
			}
			if !l.Arrange("") || l[0].Generation != test.want || len(l) != 4 {
				t.Errorf("got %v, want generation %d first", l, test.want)
			}
		})
	}
	if (versions.List{versions.New(vault.Properties{Created: now, Enabled: true})}).Arrange("") {
		t.Error("none is disabled: got true, want false")
	}
}
