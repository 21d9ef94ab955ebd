package client_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

// shelf is a fake of what the broker holds, with watches.
type shelf struct {
	mu      sync.Mutex
	secrets map[string]*secretsv1.SecretMetadata // by instance id
	down    error                                // what everything is answered with
	changed chan struct{}                        // closed at each change
	reads   []*secretsv1.GetSecretRequest
	watches int // open now
	opened  int
}

// startShelf runs a broker with a token for each instance id, all at version v1.
func startShelf(t *testing.T, ids ...string) (*shelf, *broker) {
	t.Helper()
	s := &shelf{secrets: map[string]*secretsv1.SecretMetadata{}, changed: make(chan struct{})}
	for _, id := range ids {
		s.set(id, 1)
	}
	b := start(t, s.answer)
	b.watch = s.watch
	return s, b
}

func (s *shelf) change(do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	do()
	close(s.changed)
	s.changed = make(chan struct{})
}

// set writes a version; generation 0 takes the secret away.
func (s *shelf) set(id string, generation int64) {
	s.change(func() {
		if generation == 0 {
			delete(s.secrets, id)
			return
		}
		s.secrets[id] = &secretsv1.SecretMetadata{
			Ref: &secretsv1.SecretRef{InstanceId: id, Kind: secretsv1.SecretKind_SECRET_KIND_REGISTRATION_TOKEN},
			Key: "instance-" + id, Version: fmt.Sprintf("v%d", generation), Generation: generation, State: secretsv1.SecretState_SECRET_STATE_ACTIVE,
		}
	})
}

// fail answers everything with code from now on, and ends the watches; codes.OK
// ends that.
func (s *shelf) fail(code codes.Code) {
	s.change(func() { s.down = status.Error(code, "an outage") })
}

func (s *shelf) answer(_ context.Context, m proto.Message) (proto.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	req := m.(*secretsv1.GetSecretRequest)
	s.reads = append(s.reads, req)
	held := s.secrets[req.GetRef().GetInstanceId()]
	switch {
	case s.down != nil:
		return nil, s.down
	case held == nil:
		return nil, refusalOf(codes.NotFound, "SECRET_NOT_FOUND")
	}
	resp := &secretsv1.GetSecretResponse{Metadata: held, Freshness: &secretsv1.Freshness{AsOf: timestamppb.Now()}}
	if resp.NotModified = req.GetKnownVersion() == held.GetVersion(); !resp.NotModified {
		resp.Value = "value of " + held.GetVersion()
	}
	return resp, nil
}

func (s *shelf) watch(req *secretsv1.WatchSecretsRequest, stream grpc.ServerStreamingServer[secretsv1.WatchSecretsResponse]) error {
	s.change(func() { s.watches++; s.opened++ })
	defer s.change(func() { s.watches-- })
	told := make([]string, len(req.GetRefs()))
	for {
		s.mu.Lock()
		down, changed := s.down, s.changed
		var news []*secretsv1.WatchSecretsResponse
		for i, ref := range req.GetRefs() {
			m := s.secrets[ref.GetInstanceId()]
			typ, now := secretsv1.ChangeType_CHANGE_TYPE_CURRENT, m.GetVersion()
			if m == nil {
				typ, now = secretsv1.ChangeType_CHANGE_TYPE_MISSING, "missing"
				m = &secretsv1.SecretMetadata{Ref: ref, Key: "instance-" + ref.GetInstanceId()}
			}
			if told[i] != now {
				told[i] = now
				news = append(news, &secretsv1.WatchSecretsResponse{Type: typ, Metadata: m})
			}
		}
		s.mu.Unlock()
		if down != nil {
			return down
		}
		for _, one := range news {
			if err := stream.Send(one); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (s *shelf) count() (reads, watches int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.reads), s.watches
}

func refusalOf(code codes.Code, reason secret.Reason) error {
	st, err := status.New(code, string(reason)+": no").WithDetails(brokerInfo(reason, ""))
	if err != nil {
		panic(err)
	}
	return st.Err()
}
