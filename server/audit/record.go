// Package audit is the record of who did what: one JSON object a line, each
// holding the hash of the one before, in files that rotate or on a stream. In a
// file it is the journal of intents too. It knows no gRPC, and nothing of a value
// ever goes into it.
package audit

import "time"

// Type says what a line stands for.
type Type string

// All types.
const (
	// TypeIntent: a mutation begins. The line is durable before its effect.
	TypeIntent Type = "intent"
	// TypeOutcome closes the intent of the same ID, except with commit UNKNOWN
	// and nothing settled.
	TypeOutcome Type = "outcome"
	// TypeCall: a call that changes nothing, or was refused.
	TypeCall Type = "call"
	// TypeCount: so many equal calls of one second.
	TypeCount Type = "count"
	// TypeSystem: what the broker itself did.
	TypeSystem Type = "system"
)

// Record is one line. Zero fields are left out of it; a string of over 1,024
// bytes is cut, a key in Keys at 256, and Keys at 256 keys.
type Record struct {
	Type   Type   `json:"type"` // call when empty
	ID     string `json:"id"`   // the audit id of the call; an outcome has its intent's
	Caller string `json:"caller"`
	Serial string `json:"serial"` // of the caller's certificate, lower hex
	Peer   string `json:"peer"`   // the caller's address
	// Action is a permission's word (put, get, rotate, delete, recover, verify,
	// describe, list, watch, debug), or of a system line start, reload, begin,
	// torn or resumed.
	Action      string        `json:"action"`
	Key         string        `json:"key"`
	Keys        []string      `json:"keys"` // of a watch
	Instance    string        `json:"instance"`
	Decision    string        `json:"decision"` // allowed or refused
	Code        string        `json:"code"`     // gRPC's name of it
	Reason      string        `json:"reason"`
	Version     string        `json:"version"`
	Generation  int64         `json:"generation"`
	Commit      string        `json:"commit"`      // NOT_APPLIED, APPLIED or UNKNOWN
	Duration    time.Duration `json:"duration_ns"` // the unit is the line's
	RequestID   string        `json:"request_id"`
	OperationID string        `json:"operation_id"`
	Settled     string        `json:"settled"`  // applied or not applied: what became of an UNKNOWN outcome
	Replayed    bool          `json:"replayed"` // the answer to a request id that was known
	Deleted     bool          `json:"deleted"`  // of intents: the name was deleted when the write began
	Count       int64         `json:"count"`    // how many calls the line stands for
	System      *System       `json:"system"`
	Detail      string        `json:"detail"` // of system lines: one constant sentence
	Chain       string        `json:"chain"`  // of begin, set by the log: the chain's id
	Bytes       int64         `json:"bytes"`  // of torn, set by the log: length and SHA-256
	SHA256      string        `json:"sha256"`
}

// System is what was in force: the build, and of each file the SHA-256 in hex.
type System struct {
	Build       string `json:"build"`
	Policy      string `json:"policy"`
	Revoked     string `json:"revoked"`
	ClientCA    string `json:"client_ca"`
	Certificate string `json:"certificate"`
}

const (
	commitUnknown    = "UNKNOWN"
	commitNotApplied = "NOT_APPLIED"
	reasonAudit      = "AUDIT_UNAVAILABLE"

	actionBegin   = "begin"
	actionTorn    = "torn"
	actionResumed = "resumed"
)
