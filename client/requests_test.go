package client_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/exto/secrets-broker/client"
	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

func TestRequestIDs(t *testing.T) {
	t.Parallel()
	var refuse atomic.Bool
	b := start(t, func(ctx context.Context, req proto.Message) (proto.Message, error) {
		if refuse.Load() {
			return nil, status.Error(codes.Unavailable, "gone")
		}
		return answerFull(ctx, req)
	})
	c := b.client(t)
	made := map[string]bool{}
	for _, op := range operations {
		sent := func(given string) (string, error) {
			err := op.call(t.Context(), c, given)
			calls := b.seen()
			req, ok := calls[len(calls)-1].req.(interface{ GetRequestId() string })
			if ok != op.write {
				t.Fatalf("%s: got a request id field %t, want %t", op.name, ok, op.write)
			}
			if !ok {
				return "", err
			}
			return req.GetRequestId(), err
		}
		if !op.write {
			_, _ = sent("")
			continue
		}

		refuse.Store(false)
		id, err := sent("")
		if !uuidV4.MatchString(id) || made[id] || err != nil {
			t.Errorf("%s: got request id %q, %v, want a new UUID", op.name, id, err)
		}
		made[id] = true
		if id, err := sent(requestID); id != requestID || err != nil {
			t.Errorf("%s: got request id %q, %v, want the given one", op.name, id, err)
		}

		refuse.Store(true)
		id, err = sent("")
		e, ok := errors.AsType[*client.Error](err)
		if !ok || e.RequestID != id || !uuidV4.MatchString(id) {
			t.Errorf("%s: got error %#v, want request id %q in it", op.name, err, id)
		}
		_, err = sent(requestID)
		if e, ok := errors.AsType[*client.Error](err); !ok || e.RequestID != requestID {
			t.Errorf("%s: got error %#v, want the given request id in it", op.name, err)
		}
	}
}

func TestListEnds(t *testing.T) {
	t.Parallel()
	b := start(t, func(_ context.Context, req proto.Message) (proto.Message, error) {
		if req.(*secretsv1.ListSecretsRequest).GetPageToken() != "" {
			return nil, status.Error(codes.Unavailable, "gone")
		}
		return &secretsv1.ListSecretsResponse{Secrets: []*secretsv1.SecretMetadata{fullProto, sparseProto}, NextPageToken: "p2"}, nil
	})
	c := b.client(t)

	var errs []error
	for m, err := range c.List(t.Context(), client.ListOptions{}) {
		if err != nil && m != (client.Metadata{}) {
			t.Errorf("got %+v with an error, want zero", m)
		}
		errs = append(errs, err)
	}
	if len(errs) != 3 || errs[0] != nil || errs[1] != nil || !errors.Is(errs[2], client.ErrUnavailable) {
		t.Errorf("got errors %v, want two secrets and then ErrUnavailable", errs)
	}

	before := len(b.seen())
	for range c.List(t.Context(), client.ListOptions{}) {
		break
	}
	if got := len(b.seen()) - before; got != 1 {
		t.Errorf("a list left at once made %d calls, want 1", got)
	}
}

func TestRefusedBeforeSending(t *testing.T) {
	t.Parallel()
	b := start(t, answerFull)
	c := b.client(t)
	broken := secret.NewValue("postgres://hunter2\xff@db-7/orders")
	tests := []struct {
		name   string
		reason secret.Reason
		call   func() error
	}{
		{"both preconditions", secret.InvalidRequest, func() error {
			_, err := c.Put(t.Context(), dbKey, secret.NewValue(dbURI), client.PutOptions{MustNotExist: true, MustMatchVersion: "v1", RequestID: requestID})
			return err
		}},
		{"put no UTF-8", secret.InvalidValue, func() error {
			_, err := c.Put(t.Context(), dbKey, broken, client.PutOptions{RequestID: requestID})
			return err
		}},
		{"rotate no UTF-8", secret.InvalidValue, func() error {
			_, err := c.Rotate(t.Context(), dbKey, client.RotateOptions{NewValue: broken, RequestID: requestID})
			return err
		}},
	}
	for _, test := range tests {
		err := test.call()
		e, ok := errors.AsType[*client.Error](err)
		if !ok || e.Code != codes.InvalidArgument || e.Reason != test.reason || e.CommitState != secret.NotApplied || e.RequestID != requestID {
			t.Errorf("%s: got %#v, want %s, NOT_APPLIED, with the request id", test.name, err, test.reason)
		}
		if !errors.Is(err, client.ErrInvalid) || status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: got %v, want ErrInvalid and INVALID_ARGUMENT", test.name, err)
		}
		if !strings.HasPrefix(e.Message, string(test.reason)+": ") || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: got message %q, want the reason first and no value", test.name, e.Message)
		}
	}
	if calls := b.seen(); len(calls) != 0 {
		t.Errorf("got %d calls, want none", len(calls))
	}
}

func TestFormattingShowsNoValue(t *testing.T) {
	t.Parallel()
	c := start(t, answerFull).client(t)
	got, err := c.Get(t.Context(), dbKey, client.GetOptions{})
	if err != nil || got.Value.Reveal() != dbURI {
		t.Fatalf("got %v, want the value", err)
	}
	rotated, err := c.Rotate(t.Context(), dbKey, client.RotateOptions{NewValue: secret.NewValue(dbURI)})
	if err != nil || rotated.Value.Reveal() != dbURI {
		t.Fatalf("got %v, want the value", err)
	}
	// Of a Client of its own, which works while c is formatted.
	source, err := client.NewSource(t.Context(), start(t, answerFull).client(t), dbKey, client.SourceOptions{Interval: time.Hour})
	if err != nil || source.Value().Value.Reveal() != dbURI {
		t.Fatalf("got %v, want the value", err)
	}
	held := source.Value()
	for _, v := range []any{held, &held, got, &got, rotated, &rotated, []client.GetResult{got}, client.RotateOptions{NewValue: got.Value}, c} {
		var text strings.Builder
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&text, verb, v)
		}
		data, err := json.Marshal(v)
		if err != nil {
			t.Errorf("%T: %v", v, err)
		}
		text.Write(data)
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Info("got", "result", v)
		slog.New(slog.NewJSONHandler(&log, nil)).Info("got", "result", v)
		text.Write(log.Bytes())
		for _, form := range []string{"hunter2", fmt.Sprintf("%x", "hunter2")} {
			if strings.Contains(text.String(), form) {
				t.Errorf("a %T shows its value", v)
			}
		}
	}
}
