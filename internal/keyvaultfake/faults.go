package keyvaultfake

import (
	"context"
	"slices"
	"time"
)

// Fault says what becomes of a request. Its zero value is: nothing special. What is
// set happens in the order of the fields; of Cut, LateCommit and Status, the first.
type Fault struct {
	Delay      time.Duration   // real time before it is handled; ends when the client goes away
	Hold       <-chan struct{} // it is not handled before this is closed, also when the client has gone away
	Cut        bool            // the connection is reset, and nothing is handled
	LateCommit time.Duration   // the connection is reset now; handled that much later by the fake's clock
	Status     int             // answered instead of handling it
	Inner      string          // with Status: the code of the error
	RetryAfter time.Duration   // with Status: the header
	Stale      bool            // Get, Versions: as it was before the newest version of the name was made
	HoldAfter  <-chan struct{} // it is handled, and the answer waits until this is closed
	CutAfter   bool            // it is handled, and the connection reset instead of an answer
}

// OnRequest sets the hook that chooses a fault for each request; nil: none. It is
// called once for each request, those to the token service too, before anything else,
// so before authentication and limits. It may block, and is called concurrently.
func (f *Fake) OnRequest(hook func(r *Request) Fault) {
	if hook == nil {
		f.hook.Store(nil)
		return
	}
	f.hook.Store(&hook)
}

// fault asks the hook.
func (f *Fake) fault(r Request) Fault {
	if hook := f.hook.Load(); hook != nil {
		return (*hook)(&r)
	}
	return Fault{}
}

// before waits as the fault says. False: the fake was closed meanwhile.
func (f *Fake) before(client context.Context, fault Fault) bool {
	if fault.Delay > 0 {
		delay := time.NewTimer(fault.Delay)
		defer delay.Stop()
		select {
		case <-delay.C:
		case <-client.Done():
		case <-f.done:
			return false
		}
	}
	if fault.Hold != nil {
		select {
		case <-fault.Hold:
		case <-f.done:
			return false
		}
	}
	return true
}

// after waits as the fault says before the answer goes out.
func (f *Fake) after(client context.Context, fault Fault) {
	if fault.HoldAfter != nil {
		select {
		case <-fault.HoldAfter:
		case <-client.Done():
		case <-f.done:
		}
	}
}

// lateCommit is a request whose client was cut off before it is handled.
type lateCommit struct {
	due   time.Time
	apply func(now time.Time)
}

// postpone has apply called under mu when it is due.
func (f *Fake) postpone(due time.Time, apply func(now time.Time)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, _ := slices.BinarySearchFunc(f.late, due, func(l lateCommit, due time.Time) int {
		if l.due.After(due) {
			return 1
		}
		return -1 // of two that are due together, the one that came first
	})
	f.late = slices.Insert(f.late, at, lateCommit{due, apply})
}

// Settle applies the late commits that are due. Every request, and every look at the
// state, does so first.
func (f *Fake) Settle() {
	f.enter()
	f.mu.Unlock()
}

// enter locks mu, applies what is due, and gives the time.
func (f *Fake) enter() time.Time {
	f.mu.Lock()
	now := f.Now()
	for len(f.late) > 0 && !f.late[0].due.After(now) {
		// As of when it was due: what came of it since is judged from then.
		f.late[0].apply(f.late[0].due)
		f.late = f.late[1:]
	}
	return now
}
