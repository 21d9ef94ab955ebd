package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
	"github.com/exto/secrets-broker/server/audit"
)

// records are the lines of the present audit log, without what the broker itself did.
func (s *system) records() (records []audit.Record) {
	s.t.Helper()
	content, err := os.ReadFile(s.auditFile)
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range bytes.Lines(content) {
		var r audit.Record
		if err := json.Unmarshal(line, &r); err != nil {
			s.t.Fatalf("%q: %v", line, err)
		}
		if r.Type != audit.TypeSystem {
			records = append(records, r)
		}
	}
	return records
}

// since are the records beyond the first n, once there are at least want of them: what
// is counted comes with the next second.
func (s *system) since(n, want int) []audit.Record {
	s.t.Helper()
	var all []audit.Record
	eventually(s.t, fmt.Sprintf("there are %d records more", want), func() bool {
		all = s.records()
		return len(all) >= n+want
	})
	return all[n:]
}

// brief is what a record says that can be foreseen.
func brief(r audit.Record) string {
	parts := []string{string(r.Type), r.Action, r.Decision}
	for _, part := range []string{r.Key, strings.Join(r.Keys, "+"), r.Instance, r.Code, r.Reason, r.Commit, r.Settled} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	if r.Generation > 0 {
		parts = append(parts, fmt.Sprintf("generation %d", r.Generation))
	}
	if r.Replayed {
		parts = append(parts, "replayed")
	}
	return strings.Join(parts, " ")
}

// TestRecords: each RPC has its record, allowed, refused and failed.
func TestRecords(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	ctx := callContext(t)
	const service = "/exto.secrets.v1.SecretsBrokerService/"
	demo := ref("demo", tokenKind)
	id := uuid.NewString()
	tests := map[string][]struct {
		who  string
		in   proto.Message
		want []string
	}{
		"PutSecret": {
			{consoleAPI, &secretsv1.PutSecretRequest{Ref: demo, Value: "tok", RequestId: id}, []string{"intent put allowed instance-demo", "outcome put allowed instance-demo OK APPLIED generation 1"}},
			{consoleAPI, &secretsv1.PutSecretRequest{Ref: demo, Value: "tok", RequestId: id}, []string{"call put allowed instance-demo OK generation 1 replayed"}},
			{consoleAPI, &secretsv1.PutSecretRequest{Ref: demo, Value: "tok"}, []string{"call put allowed instance-demo OK generation 1"}},
			{consoleAPI, &secretsv1.PutSecretRequest{Ref: demo, Value: "tok", Precondition: &secretsv1.PutSecretRequest_MustNotExist{MustNotExist: true}}, []string{"call put allowed instance-demo ALREADY_EXISTS SECRET_EXISTS NOT_APPLIED"}},
			{consoleAPI, &secretsv1.PutSecretRequest{Ref: demo, Value: "not a token"}, []string{"call put allowed INVALID_ARGUMENT INVALID_VALUE NOT_APPLIED"}},
			{operator, &secretsv1.PutSecretRequest{Ref: demo, Value: "tok"}, []string{"call put refused PERMISSION_DENIED CALLER_NOT_ALLOWED NOT_APPLIED"}},
			{"nobody", &secretsv1.PutSecretRequest{Ref: demo, Value: "tok"}, []string{"call put refused UNAUTHENTICATED CALLER_UNKNOWN NOT_APPLIED"}},
		},
		"GetSecret": {
			{worker, &secretsv1.GetSecretRequest{Ref: demo}, []string{"call get allowed instance-demo OK generation 1"}},
			{worker, &secretsv1.GetSecretRequest{Ref: ref("absent", tokenKind)}, []string{"call get allowed instance-absent NOT_FOUND SECRET_NOT_FOUND"}},
			{instanceDemo, &secretsv1.GetSecretRequest{Ref: ref("other", tokenKind)}, []string{"call get refused instance-other PERMISSION_DENIED CALLER_NOT_ALLOWED"}},
		},
		"VerifyToken": {
			{consoleAPI, &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: "tok"}, []string{"count verify allowed OK"}},
			{consoleAPI, &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: "wrong"}, []string{"call verify allowed instance-demo OK NO_MATCH"}},
			{worker, &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: "tok"}, []string{"call verify refused PERMISSION_DENIED CALLER_NOT_ALLOWED"}},
		},
		"DescribeSecret": {
			{operator, &secretsv1.DescribeSecretRequest{Ref: demo}, []string{"call describe allowed instance-demo OK generation 1"}},
			{instanceDemo, &secretsv1.DescribeSecretRequest{Ref: demo}, []string{"call describe refused PERMISSION_DENIED CALLER_NOT_ALLOWED"}},
		},
		"ListSecrets": {
			{operator, &secretsv1.ListSecretsRequest{}, []string{"call list allowed OK"}},
			{operator, &secretsv1.ListSecretsRequest{InstanceId: "demo"}, []string{"call list allowed demo OK"}},
			{operator, &secretsv1.ListSecretsRequest{PageSize: -1}, []string{"call list allowed INVALID_ARGUMENT INVALID_REQUEST"}},
			{instanceDemo, &secretsv1.ListSecretsRequest{}, []string{"call list refused PERMISSION_DENIED CALLER_NOT_ALLOWED"}},
		},
		"WatchSecrets": {
			{instanceDemo, &secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{demo, ref("demo", uriKind)}}, []string{"call watch allowed instance-demo+instance-demo-dburi OK", "call watch allowed instance-demo+instance-demo-dburi CANCELLED CANCELLED"}},
			{instanceDemo, &secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{ref("other", tokenKind)}}, []string{"call watch refused instance-other PERMISSION_DENIED CALLER_NOT_ALLOWED"}},
		},
		"RotateSecret": {
			{worker, &secretsv1.RotateSecretRequest{Ref: demo}, []string{"intent rotate allowed instance-demo", "outcome rotate allowed instance-demo OK APPLIED generation 2"}},
			{worker, &secretsv1.RotateSecretRequest{Ref: ref("absent", tokenKind)}, []string{"call rotate allowed instance-absent NOT_FOUND SECRET_NOT_FOUND NOT_APPLIED"}},
			{instanceDemo, &secretsv1.RotateSecretRequest{Ref: demo}, []string{"call rotate refused PERMISSION_DENIED CALLER_NOT_ALLOWED NOT_APPLIED"}},
		},
		"DeleteSecret": {
			{worker, &secretsv1.DeleteSecretRequest{Ref: demo}, []string{"intent delete allowed instance-demo", "outcome delete allowed instance-demo OK APPLIED generation 2"}},
			{worker, &secretsv1.DeleteSecretRequest{Ref: demo}, []string{"call delete allowed instance-demo NOT_FOUND SECRET_NOT_FOUND NOT_APPLIED"}},
			{instanceDemo, &secretsv1.DeleteSecretRequest{Ref: demo}, []string{"call delete refused PERMISSION_DENIED CALLER_NOT_ALLOWED NOT_APPLIED"}},
		},
		"RecoverSecret": {
			{worker, &secretsv1.RecoverSecretRequest{Ref: demo}, []string{"intent recover allowed instance-demo", "outcome recover allowed instance-demo OK APPLIED generation 2"}},
			{worker, &secretsv1.RecoverSecretRequest{Ref: demo}, []string{"call recover allowed instance-demo FAILED_PRECONDITION SECRET_NOT_DELETED NOT_APPLIED"}},
			{operator, &secretsv1.RecoverSecretRequest{Ref: demo}, []string{"call recover refused PERMISSION_DENIED CALLER_NOT_ALLOWED NOT_APPLIED"}},
		},
	}
	order := []string{"PutSecret", "GetSecret", "VerifyToken", "DescribeSecret", "ListSecrets", "WatchSecrets", "RotateSecret", "DeleteSecret", "RecoverSecret"}
	methods := secretsv1.File_exto_secrets_v1_secrets_proto.Services().ByName("SecretsBrokerService").Methods()
	for i := range methods.Len() {
		if name := string(methods.Get(i).Name()); !slices.Contains(order, name) || len(tests[name]) < 2 {
			t.Errorf("%s is not tried here", name)
		}
	}
	for _, method := range order {
		for _, tt := range tests[method] {
			pair := s.certificate("spiffe://console.exto/" + tt.who)
			conn := s.dial(s.clientTLS(pair))
			before := len(s.records())
			err := invoke(ctx, conn, service+method, method == "WatchSecrets", tt.in)
			got := s.since(before, len(tt.want))
			var briefs []string
			for _, r := range got {
				briefs = append(briefs, brief(r))
				if r.Caller != "spiffe://console.exto/"+tt.who || r.Serial != fmt.Sprintf("%x", pair.Cert.SerialNumber) {
					t.Errorf("%s as %s: got a record of %s %s, want of serial %x", method, tt.who, r.Caller, r.Serial, pair.Cert.SerialNumber)
				}
				if r.Type != audit.TypeCount && (uuid.Validate(r.ID) != nil || !strings.HasPrefix(r.Peer, "127.0.0.1:")) {
					t.Errorf("%s as %s: got id %q and peer %q", method, tt.who, r.ID, r.Peer)
				}
			}
			if !slices.Equal(briefs, tt.want) {
				t.Errorf("%s as %s: got the records %q (%v), want %q", method, tt.who, briefs, err, tt.want)
			}
			if err != nil && len(got) == 1 {
				if f := failed(t, err); f.auditID != got[0].ID {
					t.Errorf("%s as %s: got audit id %s, want the record's %s", method, tt.who, f.auditID, got[0].ID)
				}
			}
			_ = conn.Close()
		}
	}
}

// sink is standard output for an audit log, which may fail or hang.
type sink struct {
	mu    sync.Mutex
	lines bytes.Buffer
	fail  error
	hang  chan struct{}
	// hanging is how many writes began to hang.
	hanging atomic.Int64
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lines.String()
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	hang := s.hang
	s.mu.Unlock()
	if hang != nil {
		s.hanging.Add(1)
		<-hang
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return 0, s.fail
	}
	return s.lines.Write(p)
}

func (s *sink) set(fail error, hang chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail, s.hang = fail, hang
}

// eachRPC is one call of each RPC that would be answered.
func eachRPC(ctx context.Context, c secretsv1.SecretsBrokerServiceClient) map[string]func() error {
	demo := ref("demo", tokenKind)
	call := func(f func() error) func() error { return f }
	return map[string]func() error{
		"put": call(func() error {
			_, err := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: demo, Value: "tok2"})
			return err
		}),
		"get":    call(func() error { _, err := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: demo}); return err }),
		"rotate": call(func() error { _, err := c.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: demo}); return err }),
		"verify": call(func() error {
			_, err := c.VerifyToken(ctx, &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: "tok"})
			return err
		}),
		"wrong": call(func() error {
			_, err := c.VerifyToken(ctx, &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: "no"})
			return err
		}),
		"describe": call(func() error { _, err := c.DescribeSecret(ctx, &secretsv1.DescribeSecretRequest{Ref: demo}); return err }),
		"list":     call(func() error { _, err := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{}); return err }),
		"watch": call(func() error {
			w, err := c.WatchSecrets(ctx, &secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{demo}})
			if err == nil {
				_, err = w.Recv()
			}
			return err
		}),
		"delete": call(func() error { _, err := c.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: demo}); return err }),
	}
}

// TestNothingWithoutARecord: while the audit log cannot be written no call is answered
// and nothing is changed, and then all is well at once.
func TestNothingWithoutARecord(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	out := &sink{}
	s.auditTo = out
	s.startEmbedded()
	ctx := callContext(t)
	c := s.as(consoleAPI)
	if _, err := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", tokenKind), Value: "tok"}); err != nil {
		t.Fatal(err)
	}
	out.set(errors.New("no space left on device"), nil)
	for name, call := range eachRPC(ctx, c) {
		if name == "verify" { // counted: nobody knows before another one has tried
			_, _ = c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{})
		}
		err := call()
		commit := secret.CommitState("")
		if slices.Contains([]string{"put", "rotate", "delete"}, name) {
			commit = secret.NotApplied
		}
		if f := failed(t, err); f.reason != secret.AuditUnavailable || f.commit != commit {
			t.Errorf("%s: got %v, want AUDIT_UNAVAILABLE with %q", name, err, commit)
		}
	}
	_, err := s.as("nobody").GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind)})
	wantReason(t, err, secret.AuditUnavailable, "")
	out.set(nil, nil)
	got, err := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind), MaxStaleness: durationOf(0)})
	if err != nil || got.GetValue() != "tok" || got.GetMetadata().GetGeneration() != 1 {
		t.Errorf("got %v, %v, want what was there before", got.GetMetadata(), err)
	}
	if _, err := c.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: ref("demo", tokenKind)}); err != nil {
		t.Error(err)
	}
}

// startOnSink is a broker that has a token of demo, and whose records go to a sink.
func startOnSink(t *testing.T) (*sink, secretsv1.SecretsBrokerServiceClient) {
	t.Helper()
	s := newSystem(t)
	out := &sink{}
	s.auditTo = out
	s.startEmbedded()
	c := s.as(consoleAPI)
	if _, err := c.PutSecret(callContext(t), &secretsv1.PutSecretRequest{Ref: ref("demo", tokenKind), Value: "tok"}); err != nil {
		t.Fatal(err)
	}
	return out, c
}

// TestHangingAuditLog holds up no call beyond its deadline.
func TestHangingAuditLog(t *testing.T) {
	t.Parallel()
	out, c := startOnSink(t)
	hang := make(chan struct{})
	out.set(nil, hang)
	var calls sync.WaitGroup
	for name := range eachRPC(t.Context(), c) {
		calls.Go(func() {
			if name == "verify" {
				return // counted: it waits for nothing
			}
			ctx, cancel := context.WithTimeout(callContext(t), 300*time.Millisecond)
			defer cancel()
			if err := eachRPC(ctx, c)[name](); err == nil {
				t.Errorf("%s: got an answer that nobody recorded", name)
			}
		})
	}
	calls.Wait()
	out.set(nil, nil)
	close(hang)
	got, err := c.GetSecret(callContext(t), &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind), MaxStaleness: durationOf(0)})
	if err != nil || got.GetMetadata().GetGeneration() != 1 {
		t.Errorf("got %v, %v, want what was there before", got.GetMetadata(), err)
	}
}

// TestWatchEndsWhileTheLogHangs: who is not known any more does not go on because that
// cannot be recorded.
func TestWatchEndsWhileTheLogHangs(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	out := &sink{}
	s.auditTo, s.trust = out, quiet
	s.startEmbedded()
	w := watch(t, s.as(operator), ref("demo", uriKind))
	w.want("MISSING")
	hang := make(chan struct{})
	out.set(nil, hang)
	withoutOperator, _, _ := strings.Cut(policy, "  - identity: spiffe://console.exto/operator")
	s.write("policy.yaml", []byte(withoutOperator))
	s.look()
	if e, err := w.Recv(); err == nil || w.Context().Err() != nil && errors.Is(w.Context().Err(), context.DeadlineExceeded) {
		t.Errorf("got %v, %v, want the end of the watch", e, err)
	}
	out.set(nil, nil)
	close(hang)
}

// TestDeadlineWhileItIsRecorded: a call that ends while it is recorded has its record,
// with what was to be answered or with its end.
func TestDeadlineWhileItIsRecorded(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"get", "put"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, c := startOnSink(t)
			// One record is being written, so that the next one waits.
			hang := make(chan struct{})
			out.set(nil, hang)
			first := make(chan error, 1)
			go func() {
				_, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
				first <- err
			}()
			eventually(t, "the sink hangs", func() bool { return out.hanging.Load() > 0 })
			ctx, cancel := context.WithTimeout(callContext(t), 200*time.Millisecond)
			defer cancel()
			if err := eachRPC(ctx, c)[name](); err == nil {
				t.Fatal("got an answer that nobody recorded")
			}
			close(hang)
			if err := <-first; err != nil {
				t.Error(err)
			}
			eventually(t, "it is recorded", func() bool {
				ids := map[string]bool{} // of the calls
				for line := range strings.Lines(out.String()) {
					var r audit.Record
					if json.Unmarshal([]byte(line), &r) == nil && r.Action == name {
						ids[r.ID] = true
					}
				}
				return len(ids) == map[string]int{"get": 1, "put": 2}[name]
			})
		})
	}
}

// TestRefusalsOfOneCallerFillNoDisk: beyond so many a second they are counted together.
func TestRefusalsOfOneCallerFillNoDisk(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.config = func(c *server.Config) { c.Now = s.clock.Now } // stands still
	s.startEmbedded()
	c := s.as("nobody")
	const calls = 250
	for range calls {
		_, err := c.GetSecret(callContext(t), &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind)})
		wantReason(t, err, secret.CallerUnknown, "")
	}
	lines, counted := 0, int64(0)
	eventually(t, "all are recorded", func() bool {
		lines, counted = 0, 0
		for _, r := range s.records() {
			switch {
			case r.Reason != string(secret.CallerUnknown):
			case r.Type == audit.TypeCount:
				counted += r.Count
			default:
				lines++
			}
		}
		return int64(lines)+counted >= calls
	})
	if lines != 100 || counted != calls-100 {
		t.Errorf("got %d lines and %d counted, want 100 and the others", lines, counted)
	}
	log := s.log.String()
	if finished, failed := strings.Count(log, `msg="finished call"`), strings.Count(log, `msg="call failed"`); finished != 100 || failed != 100 {
		t.Errorf("got %d and %d lines of them in the log, want 100 too", finished, failed)
	}
}

// TestOpenIntentIsSettledAtStart: what a process intended before it was killed, the next
// one settles by looking at the vault.
func TestOpenIntentIsSettledAtStart(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	ctx := callContext(t)
	id := uuid.NewString()
	if _, err := s.as(worker).PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", tokenKind), Value: "tok", RequestId: id}); err != nil {
		t.Fatal(err)
	}
	s.stop()
	// The journal of a process that had these two open when it was killed.
	s.auditAgain = s.write("open.log", nil)
	log, err := audit.Open(audit.Config{Path: s.auditAgain, Logger: s.logger()})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []audit.Record{
		{ID: "first", Action: "put", Key: "instance-demo", OperationID: id, RequestID: id},
		{ID: "second", Action: "put", Key: "instance-demo-dburi", OperationID: uuid.NewString()},
		{ID: "of a newer release", Action: "compact", Key: "instance-demo", OperationID: id},
	} {
		if err := log.Intend(ctx, &r); err != nil {
			t.Fatal(err)
		}
	}
	if err := log.Close(ctx); err != nil {
		t.Fatal(err)
	}
	s.restart()
	settled := map[string]string{}
	eventually(t, "both are settled", func() bool {
		for _, r := range s.records() {
			if r.Type == audit.TypeOutcome {
				settled[r.ID] = r.Settled + " " + r.Commit
			}
		}
		return len(settled) == 2
	})
	if len(settled) > 2 {
		t.Errorf("got %q, want what is not known left alone", settled)
	}
	if settled["first"] != "applied APPLIED" || settled["second"] != "not applied NOT_APPLIED" {
		t.Errorf("got %q, want the first applied and the second not", settled)
	}
}

// TestTransportRefusalsAreRecorded: who gets no further than the handshake is in the
// audit log, and a flood of them is so as a number.
func TestTransportRefusalsAreRecorded(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	const flood = 60
	for range flood {
		conn := s.dial(s.clientTLS())
		_, err := secretsv1.NewSecretsBrokerServiceClient(conn).ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
		if err == nil {
			t.Fatal("a call without a certificate was answered")
		}
		_ = conn.Close()
	}
	total, single := int64(0), 0
	eventually(t, "all are recorded", func() bool {
		total, single = 0, 0
		for _, r := range s.records() {
			switch {
			case r.Type == audit.TypeCount:
				total += r.Count
			case r.Decision == "refused" && strings.Contains(r.Detail, "no_certificate") && r.Code == "UNAVAILABLE":
				total++
				single++
			}
		}
		return total >= flood
	})
	if total < flood || single == flood {
		t.Errorf("got %d refusals recorded, %d of them one by one, want %d and fewer", total, single, flood)
	}
}
