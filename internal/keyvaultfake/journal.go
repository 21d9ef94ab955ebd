package keyvaultfake

import (
	"net/url"
	"sync"
	"time"
)

// Op is what a request asks for.
type Op string

// The operations. One request has one; a request that the services do not know has
// none.
const (
	OpSet         Op = "Set"
	OpGet         Op = "Get"
	OpVersions    Op = "Versions"
	OpUpdate      Op = "Update"
	OpDelete      Op = "Delete"
	OpGetDeleted  Op = "GetDeleted"
	OpRecover     Op = "Recover"
	OpPurge       Op = "Purge"
	OpList        Op = "List"
	OpListDeleted Op = "ListDeleted"
	OpToken       Op = "Token"
	OpDiscovery   Op = "Discovery"
	OpIdentity    Op = "Identity" // a token from the managed identity endpoint
)

// vaultOps are those that need a right.
var vaultOps = []Op{OpSet, OpGet, OpVersions, OpUpdate, OpDelete, OpGetDeleted, OpRecover, OpPurge, OpList, OpListDeleted}

func (op Op) writes() bool {
	switch op {
	case OpSet, OpUpdate, OpDelete, OpRecover, OpPurge:
		return true
	}
	return false
}

// Request is what the journal keeps of a request.
type Request struct {
	Seq             int       // from 1, in order of arrival
	At              time.Time // of arrival, by the fake's clock
	Op              Op
	Method, Path    string // the path without the query
	Name, Version   string // of the secret; the name in lower case
	Query           url.Values
	Challenge       bool   // it bore no bearer token, which the vault answers with the challenge
	Principal       string // client id; empty when none is known
	ClientRequestID string // x-ms-client-request-id
	RequestID       string // x-ms-request-id, as answered
	Status          int    // as answered; 0 while under way, and when the connection was cut
	Inner           string // error.innererror.code as answered, or else error.code
	Fault           bool   // a fault was injected
}

// journal is safe for concurrent use.
type journal struct {
	mu      sync.Mutex
	seq     int
	entries []*Request
}

func (j *journal) begin(r Request) *Request {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.seq++
	r.Seq = j.seq
	j.entries = append(j.entries, &r)
	return &r
}

func (j *journal) update(change func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	change()
}

// Journal is what was asked since the start or the last reset, in order of arrival.
// An answer is in it before it goes out.
func (f *Fake) Journal() []Request {
	f.journal.mu.Lock()
	defer f.journal.mu.Unlock()
	requests := make([]Request, len(f.journal.entries))
	for i, entry := range f.journal.entries {
		requests[i] = *entry
	}
	return requests
}

// ResetJournal empties the journal. Seq goes on.
func (f *Fake) ResetJournal() {
	f.journal.mu.Lock()
	defer f.journal.mu.Unlock()
	f.journal.entries = nil
}
