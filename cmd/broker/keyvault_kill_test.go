package main

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

// mortal is a secret in a vault, and a broker before it that is going to die.
type mortal struct {
	*cloud
	ctx context.Context
	id  string
	p   *process
	api secretsv1.SecretsBrokerServiceClient
}

func (m *mortal) key() string { return "instance-" + m.id + "-dburi" }

func (m *mortal) ref() *secretsv1.SecretRef { return ref(m.id, uriKind) }

// uri is the n-th value of a mortal's secret.
func uri(n int) string { return fmt.Sprintf("postgres://app:value-%d@db/orders", n) }

// begin makes the two versions of the secret, and deletes it where the state says.
func (m *mortal) begin(state string) {
	m.t.Helper()
	must2(m.api.PutSecret(m.ctx, &secretsv1.PutSecretRequest{Ref: m.ref(), Value: uri(1)}))(m.t)
	must2(m.api.PutSecret(m.ctx, &secretsv1.PutSecretRequest{Ref: m.ref(), Value: uri(2)}))(m.t)
	switch state {
	case "active":
	case "deleted":
		must2(m.api.DeleteSecret(m.ctx, &secretsv1.DeleteSecretRequest{Ref: m.ref()}))(m.t)
	case "deleted by a person":
		m.PersonDelete(m.key())
	default:
		m.t.Fatalf("no state %q", state)
	}
}

func (m *mortal) run() {
	m.t.Helper()
	m.p = m.start()
	m.api = m.p.as("console-api")
}

// got is the value that the broker gives, or the reason why it gives none.
func (m *mortal) got() string {
	out, err := m.api.GetSecret(m.ctx, &secretsv1.GetSecretRequest{Ref: m.ref(), MaxStaleness: durationpb.New(0)})
	if err != nil {
		reason, _ := told(err)
		return reason
	}
	return out.GetValue()
}

// exposed is the value that somebody who reads the vault directly gets; empty when
// it gives none.
func (m *mortal) exposed() string {
	// The state first: what becomes live in between is only seen the later.
	state := m.State(m.key())
	versions := m.Versions(m.key())
	if state != keyvaultfake.Live || len(versions) == 0 || !versions[len(versions)-1].Enabled {
		return ""
	}
	return versions[len(versions)-1].Value
}

// killAt kills the broker at its n-th request that changes the secret: before it is
// handled, or once it was handled and before the answer. From then on the broker
// reaches the vault no more. died is closed when it is dead; watch is called at each
// request.
func (m *mortal) killAt(n int, after bool, watch func()) (died <-chan struct{}) {
	var (
		mu      sync.Mutex
		count   int
		dead    bool
		reached = make(chan struct{})
		handled = make(chan struct{})
		killed  = make(chan struct{})
		p       = m.p
	)
	m.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		watch()
		mu.Lock()
		defer mu.Unlock()
		if dead {
			return keyvaultfake.Fault{Cut: true}
		}
		if !changes(r.Op) || r.Name != m.key() {
			return keyvaultfake.Fault{}
		}
		if count++; count != n {
			return keyvaultfake.Fault{}
		}
		dead = true
		close(reached)
		if after {
			return keyvaultfake.Fault{HoldAfter: handled, CutAfter: true}
		}
		return keyvaultfake.Fault{Cut: true}
	})
	go func() {
		select {
		case <-reached:
		case <-p.exited:
			return // the test has ended without
		}
		if after {
			handled <- struct{}{} // taken when it was handled
		}
		p.kill()
		close(killed)
	}()
	return killed
}

// mortalCalls are the writes, each with the same request id when it is made again.
var mortalCalls = map[string]func(m *mortal, id string) error{
	"put": func(m *mortal, id string) error {
		_, err := m.api.PutSecret(m.ctx, &secretsv1.PutSecretRequest{Ref: m.ref(), Value: uri(3), RequestId: id})
		return err
	},
	"rotate": func(m *mortal, id string) error {
		_, err := m.api.RotateSecret(m.ctx, &secretsv1.RotateSecretRequest{Ref: m.ref(), NewValue: uri(3), AllowMissing: true, RequestId: id})
		return err
	},
	"delete": func(m *mortal, id string) error {
		_, err := m.api.DeleteSecret(m.ctx, &secretsv1.DeleteSecretRequest{Ref: m.ref(), RequestId: id})
		return err
	},
	"recover": func(m *mortal, id string) error {
		_, err := m.api.RecoverSecret(m.ctx, &secretsv1.RecoverSecretRequest{Ref: m.ref(), RequestId: id})
		return err
	},
}

// walk is a write that is cut off at each of its requests that change the vault.
type walk struct {
	call, state string
	// fresh reports that the broker that does it has not seen the secret before.
	fresh       bool
	transitions keyvaultfake.Transitions
}

func (w walk) String() string {
	s := w.call + " of what is " + w.state
	if w.fresh {
		s += " by a fresh broker"
	}
	return s
}

// overwrites reports whether the write is to make a version.
func (w walk) overwrites() bool { return w.call == "put" || w.call == "rotate" }

// final is what the broker gives when the write has come to its end.
func (w walk) final() string {
	switch w.call {
	case "delete":
		return "SECRET_NOT_FOUND"
	case "recover":
		return uri(2)
	}
	return uri(3)
}

// first is a vault with a broker.
func (w walk) first(t *testing.T, dir string) *mortal {
	t.Helper()
	m := &mortal{cloud: secretCloud(t, dir, keyvaultfake.Config{Transitions: &w.transitions}), id: "demo"}
	m.run()
	return m
}

// begin is another secret in the vault of the one before, with the broker that is left.
func (w walk) begin(before *mortal) *mortal {
	before.t.Helper()
	before.OnRequest(nil)
	m := &mortal{cloud: before.cloud, ctx: callContext(before.t), id: before.id + "-x", p: before.p, api: before.api}
	m.begin(w.state)
	if w.fresh {
		m.p.kill()
		m.run()
	}
	return m
}

// check fails if the vault, or the broker unless it is dead, gives the value that
// the broker had deleted.
func (w walk) check(m *mortal, alive bool) {
	m.t.Helper()
	if !w.overwrites() || w.state != "deleted" {
		return
	}
	if v := m.exposed(); v != "" && v != uri(3) {
		m.t.Error("the vault gives the value that the broker had deleted")
	}
	if !alive {
		return
	}
	for _, v := range m.Versions(m.key())[:2] {
		out, err := m.api.GetSecret(m.ctx, &secretsv1.GetSecretRequest{Ref: m.ref(), Version: v.ID, MaxStaleness: durationpb.New(0)})
		if reason, _ := told(err); reason != "SECRET_NOT_FOUND" && reason != "VERSION_EXPIRED" {
			m.t.Errorf("the broker gives a version that was deleted: %v, %v", out.GetMetadata(), err)
		}
	}
}

// steps counts the requests that change the vault when nobody kills the broker.
func (w walk) steps(before *mortal) (int, *mortal) {
	t, m := before.t, w.begin(before)
	t.Helper()
	m.ResetJournal()
	if err := mortalCalls[w.call](m, uuid.NewString()); err != nil {
		t.Fatal(err)
	}
	steps := 0
	for _, r := range m.Journal() {
		if changes(r.Op) && r.Name == m.key() {
			steps++
		}
	}
	least := 2
	if w.state == "active" && w.overwrites() {
		least = 1
	}
	if steps < least {
		t.Errorf("got %d requests that change the vault, want at least %d:%s", steps, least, lines(m.Journal()))
	}
	if g := m.got(); g != w.final() {
		t.Errorf("got %q, want %q", g, w.final())
	}
	return steps, m
}

// killed kills the broker at a step, and has another process end the write. Of a
// vault with transitions nobody knows which step is the last one.
func (w walk) killed(before *mortal, step, last int, after bool) *mortal {
	t, m := before.t, w.begin(before)
	t.Logf("%s, step %d, after it: %v", m.id, step, after)
	died := m.killAt(step, after, func() { w.check(m, false) })
	id := uuid.NewString()
	err := mortalCalls[w.call](m, id)
	if err == nil && w.transitions != (keyvaultfake.Transitions{}) {
		return m // fewer steps this time
	}
	select {
	case <-died:
	case <-m.ctx.Done():
		t.Fatalf("it never came to step %d: %v:%s", step, err, lines(m.Journal()))
	}
	m.OnRequest(func(*keyvaultfake.Request) keyvaultfake.Fault {
		w.check(m, false)
		return keyvaultfake.Fault{}
	})
	m.run()
	// What counts is what the vault holds. Only a value that a person had deleted
	// may be live without being wanted.
	held := m.exposed()
	if held == "" {
		held = "SECRET_NOT_FOUND"
	}
	if g := m.got(); g != held {
		t.Errorf("after the kill: got %q, want %q:%s", g, held, lines(m.Journal()))
	}
	switch {
	case step > 1 || after:
	case w.state == "active" && held != uri(2), w.state != "active" && held != "SECRET_NOT_FOUND":
		t.Errorf("killed before the first step: got %q", held)
	}
	if step == last && after && held != w.final() {
		t.Errorf("killed after the last step: got %q, want %q", held, w.final())
	}
	w.check(m, true)

	err = mortalCalls[w.call](m, id)
	if w.call == "recover" && w.state == "deleted by a person" && held == uri(2) && !(step == last && after) {
		// Without a mark the vault's own recover was all, and nobody knows whose it was.
		if reason, commit := told(err); reason != "SECRET_NOT_DELETED" || commit != "NOT_APPLIED" {
			t.Errorf("the same request again: got %v, want SECRET_NOT_DELETED", err)
		}
	} else if err != nil {
		t.Fatalf("the same request again: %v:%s", err, lines(m.Journal()))
	}
	if g := m.got(); g != w.final() {
		t.Errorf("after the same request again: got %q, want %q", g, w.final())
	}
	versions, want := len(m.Versions(m.key())), 2
	if w.overwrites() {
		want = 3
	}
	if versions != want {
		t.Errorf("got %d versions, want %d:%s", versions, want, lines(m.Journal()))
	}
	if w.overwrites() {
		described := must2(m.api.DescribeSecret(m.ctx, &secretsv1.DescribeSecretRequest{Ref: m.ref()}))(t)
		if g := described.GetMetadata().GetGeneration(); g != 3 {
			t.Errorf("got generation %d, want 3", g)
		}
	}
	switch state := m.State(m.key()); {
	case w.call == "delete" && state != keyvaultfake.Deleted && state != keyvaultfake.Deleting,
		w.call != "delete" && state != keyvaultfake.Live:
		t.Errorf("got the name %s", state)
	}
	w.check(m, true)
	return m
}

// TestKeyVaultKilledBetweenAnyTwoRequests kills the broker at each of its requests
// that change the vault. What the next process makes of it follows from what the
// vault holds alone, and the same request again ends it.
func TestKeyVaultKilledBetweenAnyTwoRequests(t *testing.T) {
	t.Parallel()
	dir := devFolder(t)
	for _, w := range []walk{
		{call: "put", state: "active"},
		{call: "rotate", state: "active"},
		{call: "delete", state: "active"},
		{call: "recover", state: "deleted"},
		{call: "recover", state: "deleted by a person"},
		{call: "put", state: "deleted"},
		{call: "put", state: "deleted", fresh: true},
		{call: "put", state: "deleted by a person"},
		{call: "put", state: "deleted by a person", fresh: true},
		{call: "rotate", state: "deleted"},
		{call: "rotate", state: "deleted", fresh: true},
		{call: "rotate", state: "deleted by a person"},
	} {
		t.Run(w.String(), func(t *testing.T) {
			t.Parallel()
			last, m := w.steps(w.first(t, dir))
			for step := 1; step <= last; step++ {
				for _, after := range []bool{false, true} {
					m = w.killed(m, step, last, after)
				}
			}
		})
	}
}

// TestKeyVaultKilledInTransition does so in a vault that takes its time. All walks go
// at once, since they do little but wait.
func TestKeyVaultKilledInTransition(t *testing.T) {
	t.Parallel()
	dir := devFolder(t)
	const short = 300 * time.Millisecond
	var walks sync.WaitGroup
	for _, w := range []walk{
		{call: "delete", state: "active"}, {call: "recover", state: "deleted"},
		{call: "put", state: "deleted"}, {call: "put", state: "deleted", fresh: true},
	} {
		w.transitions = keyvaultfake.Transitions{Delete: short, Recover: short, RecoverConflict: short}
		for _, after := range []bool{false, true} {
			walks.Go(func() {
				t.Run(fmt.Sprintf("%s/after %v", w, after), func(t *testing.T) {
					m := w.first(t, dir)
					for step := 1; step <= 5; step++ {
						m = w.killed(m, step, 0, after)
					}
				})
			})
		}
	}
	walks.Wait()
}

// TestKeyVaultCommitsLateAfterAKill: a rotation is sent, the broker dies, another
// process makes it again, and only then the vault commits the first one.
func TestKeyVaultCommitsLateAfterAKill(t *testing.T) {
	t.Parallel()
	dir := devFolder(t)
	for name, again := range map[string]bool{"the same request again": true, "another request": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const late = time.Minute
			m := &mortal{cloud: secretCloud(t, dir, keyvaultfake.Config{}), ctx: callContext(t)}
			m.run()
			r := ref("demo", tokenKind)
			rotate := func(id string) (*secretsv1.RotateSecretResponse, error) {
				return m.api.RotateSecret(m.ctx, &secretsv1.RotateSecretRequest{Ref: r, RequestId: id, AllowMissing: true})
			}
			must2(rotate(uuid.NewString()))(t)
			var (
				mu    sync.Mutex
				sent  bool
				taken = make(chan struct{})
			)
			m.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
				mu.Lock()
				defer mu.Unlock()
				switch {
				case sent: // the broker looks what became of it, so that the vault has it
					select {
					case <-taken:
					default:
						close(taken)
					}
					return keyvaultfake.Fault{Cut: true}
				case r.Op == keyvaultfake.OpSet:
					sent = true
					return keyvaultfake.Fault{LateCommit: late}
				}
				return keyvaultfake.Fault{}
			})
			p := m.p
			go func() {
				select {
				case <-taken:
					p.kill()
				case <-p.exited:
				}
			}()
			id := uuid.NewString()
			if _, err := rotate(id); err == nil {
				t.Fatal("got success from a dead broker")
			}
			<-p.exited
			m.OnRequest(nil)
			m.run()
			if !again {
				id = uuid.NewString()
			}
			second := must2(rotate(id))(t)
			if n := len(m.Versions("instance-demo")); n != 2 {
				t.Fatalf("got %d versions before the late one, want 2", n)
			}
			m.Advance(late)
			versions := m.Versions("instance-demo")
			if len(versions) != 3 || versions[2].Value == second.GetValue() {
				t.Fatalf("got %d versions, want a late one as the third", len(versions))
			}
			lateOne := versions[2].ID
			// Every read until it is put down, and some after it, gives the token that
			// was acknowledged.
			for reads := 0; reads < 20; {
				out := must2(m.api.GetSecret(m.ctx, &secretsv1.GetSecretRequest{Ref: r, MaxStaleness: durationpb.New(0)}))(t)
				if out.GetValue() != second.GetValue() {
					t.Fatal("got another token than the one that was acknowledged")
				}
				for _, v := range m.Versions("instance-demo") {
					if v.ID == lateOne && !v.Enabled {
						reads++
					}
				}
			}
			described := must2(m.api.DescribeSecret(m.ctx, &secretsv1.DescribeSecretRequest{Ref: r}))(t)
			if g := described.GetMetadata().GetGeneration(); g <= second.GetMetadata().GetGeneration() || len(described.GetVersions()) != 4 {
				t.Errorf("got generation %d and %d versions, want a greater one than %d, and 4", g, len(described.GetVersions()), second.GetMetadata().GetGeneration())
			}
			for _, v := range described.GetVersions() {
				if disabled := v.GetState() == secretsv1.SecretState_SECRET_STATE_DISABLED; disabled != (v.GetVersion() == lateOne) {
					t.Errorf("got %v, want the late version alone DISABLED", v)
				}
			}
			// A third process, which knows nothing of it, and the request once more.
			m.p.kill()
			m.run()
			if out := must2(m.api.GetSecret(m.ctx, &secretsv1.GetSecretRequest{Ref: r, MaxStaleness: durationpb.New(0)}))(t); out.GetValue() != second.GetValue() {
				t.Error("by a third process: got another token")
			}
			if out, err := rotate(id); err == nil && out.GetValue() != second.GetValue() {
				t.Error("the request once more: got another token")
			}
		})
	}
}
