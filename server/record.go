package server

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/google/uuid"
	rpccode "google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/audit"
	"github.com/exto/secrets-broker/server/authz"
	"github.com/exto/secrets-broker/server/broker"
)

const (
	allowed = "allowed"
	refused = "refused"

	// lastWord is how long a record is waited for when its caller is gone, and firstWord
	// how long a stream's first answer waits for its own.
	lastWord  = time.Second
	firstWord = 10 * time.Second
	// noMatch is the reason in the record of a wrong token, whose code is OK.
	noMatch = "NO_MATCH"
)

// record is the line of a call, as far as the call is known.
func (c *call) record() (r audit.Record) {
	r = audit.Record{
		ID: c.auditID, Serial: c.serial, Peer: c.address, Action: string(c.action), Decision: allowed,
		Key: c.key.String(), Instance: c.instance.String(), RequestID: c.requestID,
		Version: c.version, Generation: c.generation, Replayed: c.replayed.Load(), Duration: time.Since(c.begun),
	}
	if c.caller.problem == nil {
		r.Caller = c.caller.id.String()
	}
	if keys := c.watched.Load(); keys != nil {
		for _, key := range *keys {
			r.Keys = append(r.Keys, key.String())
		}
	}
	return r
}

// conclusion says in a record how a call ended.
func conclusion(r *audit.Record, err error) {
	if err == nil {
		r.Code = "OK"
		return
	}
	told := (*broker.Error)(nil)
	if !errors.As(err, &told) {
		r.Code = codeName(status.Code(err)) // gRPC's own services
		return
	}
	r.Code, r.Reason, r.Commit = codeName(code[told.Reason]), string(told.Reason), string(told.Commit)
	switch told.Reason {
	case secret.CallerUnknown:
		r.Decision = refused
		if why := errors.Unwrap(told); why != nil {
			r.Detail = why.Error() // of our own words, and nothing of the certificate
		}
	case secret.CallerNotAllowed, secret.CallerQuotaExceeded:
		r.Decision = refused
	}
}

func codeName(c codes.Code) string { return rpccode.Code(c).String() }

// conclude records a call that was decided and has come to its end, refused ones and
// allowed ones alike, and gives what its caller is told: err, or that it cannot be
// recorded. A write that began has an intent and an outcome instead.
func (g *gate) conclude(ctx context.Context, c *call, err error) error {
	c.concluded = true
	if !c.intended.Load() && (c.action != "" || err != nil) {
		if unrecorded := g.write(ctx, c, err); unrecorded != nil {
			err = errUnrecorded(ctx, c, err, unrecorded)
			if ctx.Err() != nil { // it left the queue with its caller: now say what that one is told
				_ = g.write(ctx, c, err)
			}
		}
	}
	if err == nil {
		return nil
	}
	if told := (*broker.Error)(nil); errors.As(err, &told) || c.ours {
		return g.fail(ctx, err)
	}
	return err // gRPC's own services answer with gRPC's own errors
}

// errUnrecorded is told instead of err, which may be nil, when a call cannot be recorded.
func errUnrecorded(ctx context.Context, c *call, err, why error) error {
	e := &broker.Error{Reason: secret.AuditUnavailable, Message: "the broker cannot write its audit log, and answers nothing unrecorded; try again, and see its operator"}
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		e = &broker.Error{Reason: secret.DeadlineExceeded, Message: "the call's deadline passed before the broker had recorded it; give it more time"}
	case ctx.Err() != nil:
		e = &broker.Error{Reason: secret.Cancelled, Message: "the caller ended the call"}
	}
	e.Key = c.key
	if told := (*broker.Error)(nil); errors.As(err, &told) {
		e.Commit = told.Commit
	} else if c.replayed.Load() {
		e.Commit = secret.Applied
	}
	return e.Because(why)
}

func (g *gate) write(ctx context.Context, c *call, err error) error {
	if !audit.Recording {
		return nil
	}
	r := c.record()
	if c.ours && err != nil && !errors.As(err, new(*broker.Error)) {
		err = &broker.Error{Reason: secret.Defect}
	}
	conclusion(&r, err)
	switch {
	case !c.write:
		r.Commit = ""
	case r.Commit == "" && err != nil:
		r.Commit = string(secret.NotApplied)
	}
	c.untold = r.Decision == refused && !c.account.tells(g.now())
	switch {
	case r.Reason == string(secret.CallerQuotaExceeded), err == nil && c.match, c.untold:
		return g.audit.Count(&r)
	case err == nil && c.action == authz.Verify:
		r.Reason = noMatch
	}
	// A stream that is ended must not wait for a log that hangs as long as it would last.
	if ctx.Err() != nil || c.action == authz.Watch || c.action == authz.Debug || c.action == "" {
		patience := firstWord
		if c.concluded || ctx.Err() != nil {
			ctx, patience = context.WithoutCancel(ctx), lastWord
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, patience)
		defer cancel()
	}
	if err == nil && !c.write && c.writes.Load() == 0 {
		// Its connection holds the answer back until the record is written, and all else with
		// it: no write is to end without a word because the record of a read failed.
		mark, err := g.audit.Submit(ctx, &r, c.connection)
		c.owe(mark)
		return err
	}
	return g.audit.Write(ctx, &r)
}

// opened records a stream before its first answer leaves.
func (g *gate) opened(ctx context.Context, c *call) error {
	if err := g.write(ctx, c, nil); err != nil {
		return errUnrecorded(ctx, c, nil, err)
	}
	return nil
}

// onBehalf is a call in the words of package broker. What it writes goes into the
// journal.
func (g *gate) onBehalf(c *call) broker.Call {
	b := broker.Call{Caller: c.caller.id.String(), AuditID: c.auditID}
	if c.write {
		b.Journal = &journal{g.audit, c}
	}
	return b
}

// journal is the broker.Journal of one call.
type journal struct {
	log  *audit.Log
	call *call
}

func (j *journal) Intend(ctx context.Context, i broker.Intent) error {
	if j.call.action == "" { // the broker's own
		j.call.action, j.call.key = authz.Permission(i.Action), i.Key
	}
	r := j.call.record()
	r.Action, r.OperationID, r.Version, r.Deleted = string(i.Action), i.OperationID, i.Version, i.Deleted
	r.Key = i.Key.String()
	err := j.log.Intend(ctx, &r)
	if err == nil {
		j.call.intended.Store(true)
	}
	return err
}

func (j *journal) Ended(ctx context.Context, o broker.Outcome) error {
	r := j.call.record()
	r.Type, r.Version, r.Generation = audit.TypeOutcome, o.Version, o.Generation
	r.Commit = string(secret.Applied)
	conclusion(&r, o.Err)
	return j.log.Write(ctx, &r)
}

func (j *journal) Settled(ctx context.Context, applied bool) {
	settle(ctx, j.log, j.call.record(), applied)
}

func (j *journal) Replayed() { j.call.replayed.Store(true) }

// settle closes an intent of which is known at last what became of it.
func settle(ctx context.Context, log *audit.Log, r audit.Record, applied bool) {
	r.Type, r.Settled, r.Commit = audit.TypeOutcome, "not applied", string(secret.NotApplied)
	if applied {
		r.Settled, r.Commit = "applied", string(secret.Applied)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWord)
	defer cancel()
	_ = log.Write(ctx, &r) // which keeps it until it can be written
}

// Repairs makes the calls for a broker.Config, on whose behalf the broker repairs what
// came late: they have no caller, and their writes are in log like all others.
func Repairs(log *audit.Log) func() broker.Call {
	return func() broker.Call {
		c := &call{auditID: uuid.NewString(), write: true, connection: &connection{caller: identity{problem: errNoCertificate}}, begun: time.Now()}
		return broker.Call{AuditID: c.auditID, Journal: &journal{log, c}}
	}
}

// openIntents are the writes that an earlier process did not bring to their end.
type openIntents struct {
	log     *audit.Log
	broker  *broker.Broker
	records []audit.Record
	writes  []broker.Unfinished
}

// findOpen keeps what they may have left half done from being read.
func findOpen(log *audit.Log, b *broker.Broker, now time.Time) *openIntents {
	o := &openIntents{log: log, broker: b}
	for _, r := range log.Unclosed() {
		i := broker.Intent{Action: broker.Action(r.Action), OperationID: r.OperationID, Version: r.Version, Deleted: r.Deleted}
		var err error
		if i.Key, err = secret.ParseKey(r.Key); err != nil {
			continue // of a release that knows more
		}
		b.Hide(i, now)
		o.records, o.writes = append(o.records, r), append(o.writes, broker.Unfinished{Call: broker.Call{Caller: r.Caller, AuditID: r.ID}, Intent: i})
	}
	return o
}

// settle finds out what became of them, until ctx ends.
func (o *openIntents) settle(ctx context.Context) {
	o.broker.Settle(ctx, o.writes, func(n int, applied bool) {
		r := o.records[n]
		r.Version = ""
		settle(ctx, o.log, r, applied)
	})
}

// auditRefusals records what was refused before a handler saw it. It does not wait for
// the log: whoever reports holds up a connection.
func auditRefusals(log *audit.Log, under *sync.WaitGroup) func(transportRefusal) {
	return func(r transportRefusal) {
		line := audit.Record{Type: audit.TypeCall, ID: uuid.NewString(), Decision: refused, Count: int64(r.rest)}
		if r.rest > 0 {
			line.Type, line.Detail = audit.TypeCount, "further connections and calls that TLS or gRPC refused"
		} else {
			line.Caller, line.Serial, line.Peer, line.Code, line.Detail = r.caller, r.serial, r.peer.String(), codeName(r.code), "refused before a handler: "+r.why
			if r.offered {
				line.Caller, line.Detail = "", line.Detail+", of a certificate that nobody vouches for"
			}
		}
		under.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), lastWord)
			defer cancel()
			_ = log.Write(ctx, &line) // the log says so itself
		})
	}
}
