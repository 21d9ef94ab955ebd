package server_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/secret"
)

// TestSecretsFromBeforeTheBroker: what the Console or a person wrote, with tags of
// their own, is served and counted on from.
func TestSecretsFromBeforeTheBroker(t *testing.T) {
	t.Parallel()
	s := startKeyVault(t)
	x := &subject{system: s, t: t, ctx: callContext(t), c: s.as(consoleAPI), ref: ref("old", uriKind), key: key(t, "old", secret.DatabaseURI)}
	for n := range 3 {
		s.fake.PersonSet(x.key.String(), uri(n), map[string]string{"team": "console"})
		s.clock.advance(time.Second)
	}
	out, err := x.get("")
	if err != nil || out.GetValue() != uri(2) || out.GetMetadata().GetGeneration() != 0 || out.GetMetadata().GetCreatedBy() != "" {
		t.Fatalf("got %v, %v, want the value at generation 0", out.GetMetadata(), err)
	}
	d, err := x.c.DescribeSecret(x.ctx, &secretsv1.DescribeSecretRequest{Ref: x.ref})
	if err != nil || len(d.GetVersions()) != 3 || d.GetRedactedValue() != "postgres://app:***@db/orders" {
		t.Errorf("Describe: got %v, %v", d, err)
	}
	r, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: uri(3), GracePeriod: durationOf(time.Minute)})
	if err != nil || r.GetMetadata().GetGeneration() != 1 || r.GetPrevious().GetVersion() != out.GetMetadata().GetVersion() {
		t.Fatalf("Rotate: got %v, %v, want generation 1 in the place of the old version", r, err)
	}
	x.wantValue(out.GetMetadata().GetVersion(), uri(2)) // in grace
	if got := x.versions()[3].Tags["team"]; got != "console" {
		t.Errorf("got tag team %q, want it carried over", got)
	}
	s.clock.advance(time.Second)
	x.setOutside(uri(4))
	x.delete()
	x.wantGet("", secret.SecretNotFound)
	rec, err := x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref})
	if err != nil || rec.GetMetadata().GetGeneration() != 0 {
		t.Fatalf("Recover: got %v, %v, want generation 0 back", rec, err)
	}
	x.wantValue("", uri(4))
	if m := x.put(5).GetMetadata(); m.GetGeneration() != 2 {
		t.Errorf("got generation %d, want 2", m.GetGeneration())
	}
}

// TestRequestsToTheVault counts them.
func TestRequestsToTheVault(t *testing.T) {
	t.Parallel()
	s := startKeyVault(t)
	for _, test := range []struct {
		state, operation string
		want             int
	}{
		{"active", "get", 1},
		{"outside", "get", 1},
		{"absent", "put", 2},
		{"active", "put", 2},
		{"absent", "rotate or create", 2},
		{"active", "rotate", 2},
		{"active", "put same", 1},
		{"active", "delete", 3},
		{"absent", "get", 2},
	} {
		x := s.in(t, strings.ReplaceAll(test.operation+"-"+test.state, " ", "-"), test.state)
		s.fake.ResetJournal()
		if o := operations[test.operation](x); o.err != nil && test.state != "absent" {
			t.Errorf("%s, %s: %v", test.state, test.operation, o.err)
		}
		got := []string{}
		for _, r := range s.fake.Journal() {
			if r.ClientRequestID == "" {
				t.Errorf("%s, %s: a request %s bears no x-ms-client-request-id", test.state, test.operation, r.Op)
			}
			got = append(got, string(r.Op))
		}
		if len(got) > test.want {
			t.Errorf("%s, %s: got requests %v, want at most %d", test.state, test.operation, got, test.want)
		}
	}
}

// TestListWhileOthersAreWritten: 1,200 secrets that were there throughout are each
// listed once, whatever happens to the rest.
func TestListWhileOthersAreWritten(t *testing.T) {
	t.Parallel()
	s := startKeyVault(t)
	want := map[string]bool{}
	for n := range 1200 {
		name := fmt.Sprintf("instance-%04d-dburi", 2*n)
		s.fake.PersonSet(name, uri(n), nil)
		want[name] = true
	}
	s.fake.PersonSet("not-ours", "x", nil)
	// Between each two pages names come and go before and after the place.
	change := func(n int) {
		for _, at := range []int{1, 2*n*100 + 1, 2*n*100 + 3, 2399} {
			name := fmt.Sprintf("instance-%04d-dburi", at+n%2*2400)
			if s.fake.State(name) == keyvaultfake.Absent {
				s.fake.PersonSet(name, "x", nil)
			} else if s.fake.State(name) == keyvaultfake.Live {
				s.fake.PersonDelete(name)
			}
		}
	}
	ctx, c := callContext(t), s.as(operator)
	seen := map[string]bool{}
	token := ""
	for n := 0; ; n++ {
		out, err := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{PageToken: token, PageSize: 100, ShowDeleted: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range out.GetSecrets() {
			if seen[m.GetKey()] && want[m.GetKey()] {
				t.Errorf("%s is listed twice", m.GetKey())
			}
			seen[m.GetKey()] = true
		}
		change(n)
		s.clock.advance(time.Second)
		if token = out.GetNextPageToken(); token == "" {
			break
		}
	}
	for name := range want {
		if !seen[name] {
			t.Errorf("%s is missing", name)
		}
	}
	if seen["not-ours"] {
		t.Error("a name that is no key is listed")
	}
	if hosts := s.fake.Refused(); len(hosts) > 0 {
		t.Errorf("something was sent to %v", hosts)
	}
}

// TestReadOnlyVault: in a regional failover a vault takes no writes.
func TestReadOnlyVault(t *testing.T) {
	t.Parallel()
	s := startKeyVault(t)
	subjects := map[string]*subject{}
	for name := range writeCalls {
		subjects[name] = s.in(t, name, stateFor(name))
	}
	s.fake.SetReadOnly(true)
	for name, write := range writeCalls {
		x := subjects[name]
		wantReason(t, write(x, x.ctx, uuid.NewString()), secret.VaultUnavailable, secret.NotApplied)
		if name != "recover" {
			x.wantValue("", uri(2))
		}
	}
	s.fake.SetReadOnly(false)
	for name, write := range writeCalls {
		x := subjects[name]
		if err := write(x, x.ctx, uuid.NewString()); err != nil {
			t.Errorf("%s afterwards: %v", name, err)
		}
	}
}

// TestOutageUnderWrites: while the vault comes and goes, every write ends with the
// truth or with UNKNOWN, and whoever retries with the same request id gets it done
// once.
func TestOutageUnderWrites(t *testing.T) {
	t.Parallel()
	s := startKeyVault(t)
	const writers, writes = 6, 8
	var wg sync.WaitGroup
	var mu sync.Mutex
	turn := 0
	// Every fifth request that changes something meets one fault or another.
	s.fake.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Op != keyvaultfake.OpSet || r.Challenge {
			return keyvaultfake.Fault{}
		}
		mu.Lock()
		defer mu.Unlock()
		turn++
		if turn%5 != 0 {
			return keyvaultfake.Fault{}
		}
		return []keyvaultfake.Fault{{Cut: true}, {CutAfter: true}, {Status: 503}, {LateCommit: 3 * time.Second}, {Status: 500}}[turn/5%5]
	})
	for n := range writers {
		wg.Go(func() {
			x := s.token(t, fmt.Sprint("writer-", n))
			last := ""
			for range writes {
				id := uuid.NewString()
				for {
					out, err := x.rotateToken(id)
					if err == nil {
						last = out.GetValue()
						break
					}
					if f := failed(t, err); f.commit == secret.Applied || f.reason == secret.Defect {
						t.Errorf("got %v", err)
						return
					}
				}
				got, err := x.get("")
				if err != nil || got.GetValue() != last {
					t.Errorf("got %v, %v, want the token of the last rotate", got.GetMetadata(), err)
					return
				}
			}
		})
	}
	wg.Wait()
	s.fake.OnRequest(nil)
	s.clock.advance(time.Minute)
	for n := range writers {
		x := s.token(t, fmt.Sprint("writer-", n))
		d, err := x.c.DescribeSecret(x.ctx, &secretsv1.DescribeSecretRequest{Ref: x.ref})
		if err != nil {
			t.Fatal(err)
		}
		if got := d.GetMetadata().GetGeneration(); got < writes {
			t.Errorf("got generation %d, want at least %d", got, writes)
		}
	}
}
