package versions

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/exto/secrets-broker/secret"
)

// The storage format: what the broker writes into the tags of a version, at most
// 11 of the vault's 15. Whoever may list can read them, so nothing derived from
// a value is there. Tags are added to within a major version, never changed.
const (
	tagFormat      = "exto-format"       // CurrentFormat
	tagKey         = "exto-key"          // the key, against versions copied under another name
	tagGeneration  = "exto-generation"   // of this version
	tagCreatedBy   = "exto-created-by"   // SPIFFE ID
	tagEpoch       = "exto-epoch"        // the writer's epoch, space, the audit id of the write
	tagOperation   = "exto-operation"    // p or r, colon, operation id: the write that made this version
	tagOperations1 = "exto-operations-1" // the last others: letter, id, version, with colons; commas between; newest first
	tagOperations2 = "exto-operations-2"
	tagPrevious    = "exto-previous" // the version that a rotate replaced, space, the end of its grace
	tagFirst       = "exto-first"    // lowest generation served
	tagDeleted     = "exto-deleted"  // time, enabled or disabled before, operation id, with spaces

	// CurrentFormat is that of the tags written now. A higher one is read, never
	// written over.
	CurrentFormat = 1
	tagTime       = "2006-01-02T15:04:05.000Z07:00"
	// Remembered is how many further operations a request id outlives. The ids of
	// that many fit into two tags of 512 characters, and one more: that of the write
	// that made the version, when there were so many deletes and recovers since.
	Remembered = 8
	perTag     = Remembered / 2

	maxID = 36 // of an operation: a UUID
	// MaxVersion is how long the id of a version gets.
	MaxVersion = 32
	// maxCount bounds what is read as generation or epoch: a broker gets nowhere
	// near it, and counting on from it does not overflow.
	maxCount = 1 << 53
)

var brokerTags = []string{
	tagFormat, tagKey, tagGeneration, tagCreatedBy, tagEpoch, tagOperation,
	tagOperations1, tagOperations2, tagPrevious, tagFirst, tagDeleted,
}

// The letters of operations in tags: put, rotate, delete and recover.
const (
	LetterPut     = 'p'
	LetterRotate  = 'r'
	LetterDelete  = 'd'
	LetterRecover = 'c'
)

// Done is an operation that was done: which, under which id, and the version
// that it made, deleted or recovered.
type Done struct {
	Letter  byte
	ID      string
	Version string
}

// Record is what the broker's tags say of a version. The zero Record is that of
// a version written by somebody else.
type Record struct {
	Format     int
	Name       string // the key as it was written; empty: the tags name none
	Generation int64
	CreatedBy  string
	Epoch      int64
	AuditID    string
	Made       Done   // without version; zero id: not made by the broker
	Others     []Done // newest first, at most remembered, or one more
	Previous   string // the version that this one replaced by a rotate
	GraceEnd   time.Time
	First      int64 // lowest generation served
	Deleted    *Mark
}

// Mark is what a delete leaves on the version: while it stands and the version
// is disabled, the secret is deleted to every caller, whatever the vault says.
type Mark struct {
	At         time.Time
	WasEnabled bool
	ID         string
}

// Parse reads tags. What a person broke reads as not there.
func Parse(t Tags) Record {
	var r Record
	r.Format, _ = strconv.Atoi(t[tagFormat])
	r.Name = t[tagKey]
	r.Generation = parseCount(t[tagGeneration])
	epoch, auditID, _ := strings.Cut(t[tagEpoch], " ")
	if r.Epoch = parseCount(epoch); r.Epoch == 0 {
		// Without it nothing says whether the version is a late one.
		r.Generation = 0
	}
	if r.Generation == 0 {
		r.Epoch = 0
	} else {
		r.CreatedBy = t[tagCreatedBy]
		if isID(auditID, maxID) {
			r.AuditID = auditID
		}
		if letter, id, ok := strings.Cut(t[tagOperation], ":"); ok && isLetter(letter) && isID(id, maxID) {
			r.Made = Done{Letter: letter[0], ID: id}
		}
	}
	for _, name := range []string{tagOperations1, tagOperations2} {
		for entry := range strings.SplitSeq(t[name], ",") {
			if f := strings.Split(entry, ":"); len(f) == 3 && isLetter(f[0]) && isID(f[1], maxID) && isID(f[2], MaxVersion) {
				r.Others = append(r.Others, Done{f[0][0], f[1], f[2]})
			}
		}
	}
	r.Others = r.Others[:min(len(r.Others), Remembered+1)]
	if version, end, ok := strings.Cut(t[tagPrevious], " "); ok && isID(version, MaxVersion) {
		if at, ok := parseTime(end); ok {
			r.Previous, r.GraceEnd = version, at
		}
	}
	r.First = parseCount(t[tagFirst])
	if f := strings.Split(t[tagDeleted], " "); len(f) == 3 && isID(f[2], maxID) {
		if at, ok := parseTime(f[0]); ok {
			r.Deleted = &Mark{At: at, WasEnabled: f[1] == "enabled", ID: f[2]}
		}
	}
	return r
}

// parseCount reads a generation or an epoch; 0 for what is neither.
func parseCount(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > maxCount {
		return 0
	}
	return n
}

// isID reports whether s can be the id of an operation or a version. A longer one
// would make the tags that carry it on too long for the vault.
func isID(s string, most int) bool {
	return s != "" && len(s) <= most && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '-')
	}) < 0
}

func isLetter(s string) bool {
	return len(s) == 1 && strings.Contains(string([]byte{LetterPut, LetterRotate, LetterDelete, LetterRecover}), s)
}

func parseTime(s string) (time.Time, bool) {
	at, err := time.Parse(time.RFC3339, s)
	at = at.UTC().Truncate(time.Millisecond)
	return at, err == nil && !at.IsZero() && at.Year() > 0 && at.Year() <= 9999
}

// Encode writes the record for a version of key. The tags of others that the
// version bears are carried over in order of name as far as the vault's limit
// allows; dropped names those that were not.
func (r Record) Encode(key secret.Key, bears Tags) (t Tags, dropped []string) {
	t = Tags{tagFormat: strconv.Itoa(CurrentFormat), tagKey: key.String()}
	if r.Generation > 0 {
		t[tagGeneration] = strconv.FormatInt(r.Generation, 10)
		t[tagCreatedBy] = r.CreatedBy
		t[tagEpoch] = strconv.FormatInt(r.Epoch, 10) + " " + r.AuditID
		t[tagOperation] = string(r.Made.Letter) + ":" + r.Made.ID
	}
	half := min(perTag, len(r.Others))
	for name, others := range map[string][]Done{tagOperations1: r.Others[:half], tagOperations2: r.Others[half:]} {
		var entries []string
		for _, d := range others {
			entries = append(entries, string(d.Letter)+":"+d.ID+":"+d.Version)
		}
		if len(entries) > 0 {
			t[name] = strings.Join(entries, ",")
		}
	}
	if r.Previous != "" {
		t[tagPrevious] = r.Previous + " " + formatTime(r.GraceEnd)
	}
	if r.First > 0 {
		t[tagFirst] = strconv.FormatInt(r.First, 10)
	}
	if m := r.Deleted; m != nil {
		before := "disabled"
		if m.WasEnabled {
			before = "enabled"
		}
		t[tagDeleted] = formatTime(m.At) + " " + before + " " + m.ID
	}
	for _, name := range slices.Sorted(maps.Keys(bears)) {
		if slices.Contains(brokerTags, name) {
			continue
		}
		if len(t) == MaxTags {
			dropped = append(dropped, name)
			continue
		}
		t[name] = bears[name]
	}
	return t, dropped
}

func formatTime(t time.Time) string { return t.UTC().Format(tagTime) }

// History lists the operations that are remembered with version as the newest
// version, newest first. The one at place i has had i further operations, and
// its id is remembered for remembered of them.
func (r Record) History(version string) []Done {
	var h []Done
	if r.Deleted != nil {
		h = append(h, Done{LetterDelete, r.Deleted.ID, version})
	}
	// Deletes and recovers of this very version came after the write that made it.
	made := 0
	for made < len(r.Others) && r.Others[made].Version == version {
		made++
	}
	h = append(h, r.Others[:made]...)
	if r.Made.ID != "" {
		h = append(h, Done{r.Made.Letter, r.Made.ID, version})
	}
	h = append(h, r.Others[made:]...)
	return h[:min(len(h), Remembered+1)]
}

// EndGrace ends a grace that still runs.
func (r *Record) EndGrace(now time.Time) {
	if r.Previous != "" && now.Before(r.GraceEnd) {
		r.GraceEnd = now
	}
}

// Later orders versions of the broker's own: the greatest (epoch, generation) is
// the current one.
func (r Record) Later(than Record) bool {
	return cmp.Or(cmp.Compare(r.Epoch, than.Epoch), cmp.Compare(r.Generation, than.Generation)) > 0
}
