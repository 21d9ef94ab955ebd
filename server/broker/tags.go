package broker

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// The storage format: what the broker writes into the tags of a version, at most
// 11 of the vault's 15. Whoever may list can read them, so nothing derived from
// a value is there. Tags are added to within a major version, never changed.
const (
	tagFormat      = "exto-format"       // currentFormat
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

	currentFormat = 1
	tagTime       = "2006-01-02T15:04:05.000Z07:00"
	// remembered is how many further operations a request id outlives. The ids of
	// that many fit into two tags of 512 characters, and one more: see
	// deletesAndOthers.
	remembered = 8
	perTag     = remembered / 2

	maxID      = 36 // of an operation: a UUID
	maxVersion = 32
	// maxCount bounds what is read as generation or epoch: a broker gets nowhere
	// near it, and counting on from it does not overflow.
	maxCount = 1 << 53
)

var brokerTags = []string{
	tagFormat, tagKey, tagGeneration, tagCreatedBy, tagEpoch, tagOperation,
	tagOperations1, tagOperations2, tagPrevious, tagFirst, tagDeleted,
}

// Letters of operations in tags.
const (
	letterPut     = 'p'
	letterRotate  = 'r'
	letterDelete  = 'd'
	letterRecover = 'c'
)

// done is an operation that was done: which, under which id, and the version
// that it made, deleted or recovered.
type done struct {
	letter  byte
	id      string
	version string
}

// record is what the broker's tags say of a version. The zero record is that of
// a version written by somebody else.
type record struct {
	format     int
	key        string
	generation int64
	createdBy  string
	epoch      int64
	auditID    string
	made       done   // without version; zero id: not made by the broker
	others     []done // newest first, at most remembered, or one more
	previous   string
	graceEnd   time.Time
	first      int64
	deleted    *mark
}

// mark is what a delete leaves on the version: while it stands and the version
// is disabled, the secret is deleted to every caller, whatever the vault says.
type mark struct {
	at         time.Time
	wasEnabled bool
	id         string
}

// parseTags reads tags. What a person broke reads as not there.
func parseTags(t vault.Tags) record {
	var r record
	r.format, _ = strconv.Atoi(t[tagFormat])
	r.key = t[tagKey]
	r.generation = parseCount(t[tagGeneration])
	epoch, auditID, _ := strings.Cut(t[tagEpoch], " ")
	if r.epoch = parseCount(epoch); r.epoch == 0 {
		// Without it nothing says whether the version is a late one.
		r.generation = 0
	}
	if r.generation == 0 {
		r.epoch = 0
	} else {
		r.createdBy = t[tagCreatedBy]
		if isID(auditID, maxID) {
			r.auditID = auditID
		}
		if letter, id, ok := strings.Cut(t[tagOperation], ":"); ok && isLetter(letter) && isID(id, maxID) {
			r.made = done{letter: letter[0], id: id}
		}
	}
	for _, name := range []string{tagOperations1, tagOperations2} {
		for entry := range strings.SplitSeq(t[name], ",") {
			if f := strings.Split(entry, ":"); len(f) == 3 && isLetter(f[0]) && isID(f[1], maxID) && isID(f[2], maxVersion) {
				r.others = append(r.others, done{f[0][0], f[1], f[2]})
			}
		}
	}
	r.others = r.others[:min(len(r.others), remembered+1)]
	if version, end, ok := strings.Cut(t[tagPrevious], " "); ok && isID(version, maxVersion) {
		if at, ok := parseTime(end); ok {
			r.previous, r.graceEnd = version, at
		}
	}
	r.first = parseCount(t[tagFirst])
	if f := strings.Split(t[tagDeleted], " "); len(f) == 3 && isID(f[2], maxID) {
		if at, ok := parseTime(f[0]); ok {
			r.deleted = &mark{at: at, wasEnabled: f[1] == "enabled", id: f[2]}
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
	return len(s) == 1 && strings.Contains(string([]byte{letterPut, letterRotate, letterDelete, letterRecover}), s)
}

func parseTime(s string) (time.Time, bool) {
	at, err := time.Parse(time.RFC3339, s)
	at = at.UTC().Truncate(time.Millisecond)
	return at, err == nil && !at.IsZero() && at.Year() > 0 && at.Year() <= 9999
}

// tags writes the record for a version of key. The tags of others that the
// version bears are carried over in order of name as far as the vault's limit
// allows; dropped names those that were not.
func (r record) tags(key secret.Key, bears vault.Tags) (t vault.Tags, dropped []string) {
	t = vault.Tags{tagFormat: strconv.Itoa(currentFormat), tagKey: key.String()}
	if r.generation > 0 {
		t[tagGeneration] = strconv.FormatInt(r.generation, 10)
		t[tagCreatedBy] = r.createdBy
		t[tagEpoch] = strconv.FormatInt(r.epoch, 10) + " " + r.auditID
		t[tagOperation] = string(r.made.letter) + ":" + r.made.id
	}
	half := min(perTag, len(r.others))
	for name, others := range map[string][]done{tagOperations1: r.others[:half], tagOperations2: r.others[half:]} {
		var entries []string
		for _, d := range others {
			entries = append(entries, string(d.letter)+":"+d.id+":"+d.version)
		}
		if len(entries) > 0 {
			t[name] = strings.Join(entries, ",")
		}
	}
	if r.previous != "" {
		t[tagPrevious] = r.previous + " " + formatTime(r.graceEnd)
	}
	if r.first > 0 {
		t[tagFirst] = strconv.FormatInt(r.first, 10)
	}
	if m := r.deleted; m != nil {
		before := "disabled"
		if m.wasEnabled {
			before = "enabled"
		}
		t[tagDeleted] = formatTime(m.at) + " " + before + " " + m.id
	}
	for _, name := range slices.Sorted(maps.Keys(bears)) {
		if slices.Contains(brokerTags, name) {
			continue
		}
		if len(t) == vault.MaxTags {
			dropped = append(dropped, name)
			continue
		}
		t[name] = bears[name]
	}
	return t, dropped
}

func formatTime(t time.Time) string { return t.UTC().Format(tagTime) }

// history lists the operations that are remembered with version as the newest
// version, newest first. The one at place i has had i further operations, and
// its id is remembered for remembered of them.
func (r record) history(version string) []done {
	var h []done
	if r.deleted != nil {
		h = append(h, done{letterDelete, r.deleted.id, version})
	}
	// Deletes and recovers of this very version came after the write that made it.
	made := 0
	for made < len(r.others) && r.others[made].version == version {
		made++
	}
	h = append(h, r.others[:made]...)
	if r.made.id != "" {
		h = append(h, done{r.made.letter, r.made.id, version})
	}
	h = append(h, r.others[made:]...)
	return h[:min(len(h), remembered+1)]
}

// later orders versions of the broker's own: the greatest (epoch, generation) is
// the current one.
func (r record) later(than record) bool {
	return cmp.Or(cmp.Compare(r.epoch, than.epoch), cmp.Compare(r.generation, than.generation)) > 0
}
