package client_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/secret"
)

// retried is the table of docs/client.md: a read, and a write that was not
// applied, of unknown outcome, or applied. What is not in it is never retried.
var retried = []struct {
	name                               string
	code                               codes.Code
	retryInfo                          bool
	read, notApplied, unknown, applied bool
}{
	{"UNAVAILABLE", codes.Unavailable, false, true, true, true, false},
	{"UNAVAILABLE with RetryInfo", codes.Unavailable, true, true, true, true, false},
	{"RESOURCE_EXHAUSTED with RetryInfo", codes.ResourceExhausted, true, true, true, true, false},
	{"INTERNAL", codes.Internal, false, false, false, true, false},
	{"UNKNOWN", codes.Unknown, false, false, false, true, false},
	{"DEADLINE_EXCEEDED of the broker", codes.DeadlineExceeded, false, false, false, true, false},
	{"CANCELLED of the broker", codes.Canceled, false, false, false, true, false},
}

func TestRetryTableIsInTheDocs(t *testing.T) {
	t.Parallel()
	word := map[bool]string{true: "yes", false: "no"}
	var table strings.Builder
	for _, row := range retried {
		table.WriteString("| " + strings.Join([]string{row.name, word[row.read], word[row.notApplied], word[row.unknown], word[row.applied]}, " | ") + " |\n")
	}
	docs, err := os.ReadFile("../docs/client.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(docs), "| --- | --- | --- | --- | --- |\n")
	if rows, _, _ := strings.Cut(rest, "\n\n"); !found || rows+"\n" != table.String() {
		t.Errorf("docs/client.md has another table, want\n%s", table.String())
	}
}

// TestRetries answers each code with each commit state, once, and looks whether
// the call comes again.
func TestRetries(t *testing.T) {
	t.Parallel()
	type answer struct {
		code   codes.Code
		info   bool
		state  secret.CommitState
		advice bool
	}
	var now atomic.Pointer[answer] // nil: all is well
	b := start(t, func(ctx context.Context, req proto.Message) (proto.Message, error) {
		a := now.Swap(nil)
		if a == nil {
			return answerFull(ctx, req)
		}
		var details []protoadapt.MessageV1
		if a.info {
			details = append(details, brokerInfo("OF_A_TEST", a.state))
		}
		if a.advice {
			details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(time.Millisecond)})
		}
		return nil, refusal(t, a.code, "for a person", details...)
	})
	c := newClient(t, b.addr, b.files)
	client.NoRetryBudget(c)
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		for _, advice := range []bool{false, true} {
			want := retried[0]
			want.read, want.notApplied, want.unknown, want.applied = false, false, false, false
			for _, row := range retried {
				// Advice makes a difference to RESOURCE_EXHAUSTED alone.
				if row.code == code && (advice || !row.retryInfo) {
					want = row
				}
			}
			for _, op := range operations {
				check := func(a answer, want bool) {
					t.Helper()
					now.Store(&a)
					before := len(b.seen())
					err := op.call(t.Context(), c, "")
					calls := b.seen()[before:]
					if got := len(calls) == 2; got != want || (err == nil) != want {
						t.Errorf("%s: %s (info %t, %s, advice %t): got %d calls, %v, want it retried: %t",
							op.name, a.code, a.info, a.state, a.advice, len(calls), err, want)
						return
					}
					if want && op.write && !proto.Equal(calls[0].req, calls[1].req) {
						t.Errorf("%s: the second attempt is another request", op.name)
					}
				}
				if !op.write {
					check(answer{code, true, "", advice}, want.read)
					continue
				}
				check(answer{code, true, secret.NotApplied, advice}, want.notApplied)
				check(answer{code, true, secret.Unknown, advice}, want.unknown)
				check(answer{code, true, secret.Applied, advice}, want.applied)
				// Without ErrorInfo it is unknown, but these may be this side's own.
				ours := code == codes.DeadlineExceeded || code == codes.Canceled
				check(answer{code, false, "", advice}, want.unknown && !ours)
			}
		}
	}
}

// A refusal by a broker that did not look at the request id says nothing of the
// attempt before it.
func TestUnknownStaysUnknown(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		second codes.Code
		want   secret.CommitState
	}{
		{codes.PermissionDenied, secret.Unknown},
		{codes.Aborted, secret.NotApplied},
	} {
		var again atomic.Bool
		b := start(t, func(context.Context, proto.Message) (proto.Message, error) {
			if !again.Swap(true) {
				return nil, status.Error(codes.Unavailable, "the connection broke")
			}
			return nil, refusal(t, test.second, "no", brokerInfo("OF_A_TEST", secret.NotApplied))
		})
		_, err := newClient(t, b.addr, b.files).Put(t.Context(), dbKey, secret.NewValue(dbURI), client.PutOptions{})
		if e, ok := errors.AsType[*client.Error](err); !ok || e.Code != test.second || e.CommitState != test.want {
			t.Errorf("got %#v, want %s, %s", err, test.second, test.want)
		}
	}
}

// The error of the last attempt says more than that time ran out.
func TestRetriesEndBeforeTheDeadline(t *testing.T) {
	t.Parallel()
	b := start(t, func(context.Context, proto.Message) (proto.Message, error) {
		return nil, refusal(t, codes.Unavailable, "VAULT_THROTTLED: no", brokerInfo("VAULT_THROTTLED", secret.NotApplied),
			&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Minute)})
	})
	c := newClient(t, b.addr, b.files)
	_, err := c.Get(t.Context(), dbKey, client.GetOptions{})
	if e, ok := errors.AsType[*client.Error](err); !ok || e.Reason != secret.VaultThrottled || len(b.seen()) != 1 {
		t.Errorf("got %v after %d calls, want the refusal after one", err, len(b.seen()))
	}
}

func TestRetryWaitsAsAdvised(t *testing.T) {
	t.Parallel()
	const advice = 300 * time.Millisecond
	times := make(chan time.Time, 2)
	b := start(t, func(ctx context.Context, req proto.Message) (proto.Message, error) {
		if times <- time.Now(); len(times) == 1 {
			return nil, refusal(t, codes.Unavailable, "no", &errdetails.RetryInfo{RetryDelay: durationpb.New(advice)})
		}
		return answerFull(ctx, req)
	})
	if _, err := newClient(t, b.addr, b.files).Get(t.Context(), dbKey, client.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	if first, second := <-times, <-times; second.Sub(first) < advice {
		t.Errorf("the second attempt came after %v, want %v at least", second.Sub(first), advice)
	}
}

// All calls of a client together add little to a broker in trouble.
func TestRetryBudget(t *testing.T) {
	t.Parallel()
	b := start(t, func(context.Context, proto.Message) (proto.Message, error) {
		return nil, status.Error(codes.Unavailable, "in trouble")
	})
	c := newClient(t, b.addr, b.files)
	const callers, lasting = 200, 2 * time.Second
	ctx, cancel := context.WithTimeout(t.Context(), lasting)
	defer cancel()
	failed := make(chan error, callers)
	for range callers {
		go func() {
			_, err := c.Get(ctx, dbKey, client.GetOptions{})
			failed <- err
		}()
	}
	late := 0
	for range callers {
		switch err := <-failed; {
		case errors.Is(err, client.ErrUnavailable):
		case errors.Is(err, context.DeadlineExceeded):
			late++ // its retry was under way then
		default:
			t.Errorf("got %v, want ErrUnavailable", err)
		}
	}
	if most := 5; late > most {
		t.Errorf("got %d calls cut off by their deadline, want at most the retries of the last half second, %d", late, most)
	}
	// A burst of one second's, and then so many a second.
	most := 10 + 10*int(lasting/time.Second)
	if got := len(b.seen()) - callers; got == 0 || got > most {
		t.Errorf("got %d retries, want some and at most %d", got, most)
	}
}

func TestCancelEndsThePause(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	b := start(t, func(context.Context, proto.Message) (proto.Message, error) {
		return nil, refusal(t, codes.Unavailable, "no", brokerInfo("NOT_ACTIVE", secret.NotApplied), &errdetails.RetryInfo{RetryDelay: durationpb.New(time.Minute)})
	})
	c := newClient(t, b.addr, b.files, grpc.WithUnaryInterceptor(
		func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			defer cancel() // once the answer is there
			return invoke(ctx, method, req, reply, cc, opts...)
		}))
	_, err := c.Put(ctx, dbKey, secret.NewValue(dbURI), client.PutOptions{})
	if e, ok := errors.AsType[*client.Error](err); !ok || !errors.Is(err, context.Canceled) || e.CommitState != secret.NotApplied {
		t.Errorf("got %#v, want context.Canceled and what the broker said of the write", err)
	}
}
