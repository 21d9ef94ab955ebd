package client_test

import (
	"context"
	"reflect"
	"regexp"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/exto/secrets-broker/client"
	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

const (
	dbURI     = "postgres://app:hunter2@db-7:5432/orders"
	requestID = "6f1c2f0e-0c53-4b57-9a2b-0d9d3b6a7f11"
)

var (
	dbKey  = mustKey("instance-acme-dburi")
	dbRef  = &secretsv1.SecretRef{InstanceId: "acme", Kind: secretsv1.SecretKind_SECRET_KIND_DATABASE_URI}
	uuidV4 = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
)

func mustKey(s string) secret.Key {
	key, err := secret.ParseKey(s)
	if err != nil {
		panic(err)
	}
	return key
}

// operation is one method of the client, called with all that its options have
// and its result reduced to whether it failed.
type operation struct {
	name  string
	write bool
	call  func(ctx context.Context, c *client.Client, requestID string) error
}

var operations = []operation{
	{"put", true, func(ctx context.Context, c *client.Client, id string) error {
		_, err := c.Put(ctx, dbKey, secret.NewValue(dbURI), client.PutOptions{RequestID: id})
		return err
	}},
	{"get", false, func(ctx context.Context, c *client.Client, _ string) error {
		_, err := c.Get(ctx, dbKey, client.GetOptions{})
		return err
	}},
	{"rotate", true, func(ctx context.Context, c *client.Client, id string) error {
		_, err := c.Rotate(ctx, dbKey, client.RotateOptions{NewValue: secret.NewValue(dbURI), RequestID: id})
		return err
	}},
	{"delete", true, func(ctx context.Context, c *client.Client, id string) error {
		_, err := c.Delete(ctx, dbKey, client.DeleteOptions{RequestID: id})
		return err
	}},
	{"recover", true, func(ctx context.Context, c *client.Client, id string) error {
		_, err := c.Recover(ctx, dbKey, client.RecoverOptions{RequestID: id})
		return err
	}},
	{"describe", false, func(ctx context.Context, c *client.Client, _ string) error {
		_, err := c.Describe(ctx, dbKey)
		return err
	}},
	{"verify", false, func(ctx context.Context, c *client.Client, _ string) error {
		_, err := c.Verify(ctx, dbKey.InstanceID(), secret.NewValue("token"))
		return err
	}},
	{"list", false, func(ctx context.Context, c *client.Client, _ string) error {
		for _, err := range c.List(ctx, client.ListOptions{}) {
			if err != nil {
				return err
			}
		}
		return nil
	}},
}

// The metadata that the broker answers with, and what callers get of it.
var (
	fullProto = &secretsv1.SecretMetadata{
		Ref:        dbRef,
		Key:        "instance-acme-dburi",
		Version:    "v2",
		Generation: 2,
		State:      secretsv1.SecretState_SECRET_STATE_DELETED,
		CreateTime: timestamppb.New(day(1)),
		ExpireTime: timestamppb.New(day(2)),
		CreatedBy:  callerID,
		DeleteTime: timestamppb.New(day(3)),
		PurgeTime:  timestamppb.New(day(4)),
	}
	full = client.Metadata{
		Key:        dbKey,
		Version:    "v2",
		Generation: 2,
		State:      client.Deleted,
		CreateTime: day(1),
		ExpireTime: day(2),
		CreatedBy:  callerID,
		DeleteTime: day(3),
		PurgeTime:  day(4),
	}
	sparseProto = &secretsv1.SecretMetadata{Key: "instance-acme", State: secretsv1.SecretState_SECRET_STATE_DISABLED}
	sparse      = client.Metadata{Key: mustKey("instance-acme"), State: client.Disabled}
)

func day(d int) time.Time { return time.Date(2026, time.May, d, 12, 0, 0, 500, time.UTC) }

// fullAnswers hold a response with every field set for each RPC.
var fullAnswers = map[protoreflect.FullName]proto.Message{
	"exto.secrets.v1.PutSecretRequest": &secretsv1.PutSecretResponse{Metadata: fullProto, Unchanged: true},
	"exto.secrets.v1.GetSecretRequest": &secretsv1.GetSecretResponse{
		Metadata:    fullProto,
		Value:       dbURI,
		NotModified: true,
		Freshness:   &secretsv1.Freshness{AsOf: timestamppb.New(day(5)), Source: secretsv1.FreshnessSource_FRESHNESS_SOURCE_CACHE},
	},
	"exto.secrets.v1.RotateSecretRequest":  &secretsv1.RotateSecretResponse{Metadata: fullProto, Previous: sparseProto, Value: dbURI},
	"exto.secrets.v1.DeleteSecretRequest":  &secretsv1.DeleteSecretResponse{Metadata: fullProto},
	"exto.secrets.v1.RecoverSecretRequest": &secretsv1.RecoverSecretResponse{Metadata: fullProto},
	"exto.secrets.v1.DescribeSecretRequest": &secretsv1.DescribeSecretResponse{
		Metadata:      fullProto,
		RedactedValue: "postgres://app:***@db-7:5432/orders",
		Versions:      []*secretsv1.SecretMetadata{fullProto, sparseProto},
	},
	"exto.secrets.v1.VerifyTokenRequest": &secretsv1.VerifyTokenResponse{
		Result: secretsv1.VerifyResult_VERIFY_RESULT_MATCH_PREVIOUS, Generation: 2, ExpireTime: timestamppb.New(day(2)),
	},
	"exto.secrets.v1.ListSecretsRequest": &secretsv1.ListSecretsResponse{Secrets: []*secretsv1.SecretMetadata{fullProto}},
}

func answerFull(_ context.Context, req proto.Message) (proto.Message, error) {
	return fullAnswers[req.ProtoReflect().Descriptor().FullName()], nil
}

// checkComplete fails when a message leaves out a field that its type has, so
// that a field added to the contract is not forgotten here.
func checkComplete(t *testing.T, m proto.Message) {
	t.Helper()
	r := m.ProtoReflect()
	fields := r.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if of := f.ContainingOneof(); of != nil && r.WhichOneof(of) != nil {
			continue
		}
		if !r.Has(f) {
			t.Errorf("the test's %s has no %s", r.Descriptor().Name(), f.Name())
		}
	}
}

func TestEveryFieldBothWays(t *testing.T) {
	t.Parallel()
	checkComplete(t, fullProto)
	acme := dbKey.InstanceID()
	value := secret.NewValue(dbURI)

	tests := []struct {
		name string
		call func(context.Context, *client.Client) (any, error)
		req  proto.Message
		want any
	}{
		{
			name: "put, must not exist",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Put(ctx, dbKey, value, client.PutOptions{MustNotExist: true, RequestID: requestID})
			},
			req: &secretsv1.PutSecretRequest{
				Ref: dbRef, Value: dbURI, RequestId: requestID,
				Precondition: &secretsv1.PutSecretRequest_MustNotExist{MustNotExist: true},
			},
			want: client.PutResult{Metadata: full, Unchanged: true},
		},
		{
			name: "put, must match version",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Put(ctx, dbKey, value, client.PutOptions{MustMatchVersion: "v1", RequestID: requestID})
			},
			req: &secretsv1.PutSecretRequest{
				Ref: dbRef, Value: dbURI, RequestId: requestID,
				Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: "v1"},
			},
			want: client.PutResult{Metadata: full, Unchanged: true},
		},
		{
			name: "get",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Get(ctx, dbKey, client.GetOptions{
					Version: "v1", MaxStaleness: new(1500 * time.Millisecond), MinGeneration: 3, KnownVersion: "v0",
				})
			},
			req: &secretsv1.GetSecretRequest{
				Ref: dbRef, Version: "v1", MaxStaleness: durationpb.New(1500 * time.Millisecond), MinGeneration: 3, KnownVersion: "v0",
			},
			want: client.GetResult{Metadata: full, Value: value, NotModified: true, AsOf: day(5), Source: client.Cache},
		},
		{
			name: "rotate",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Rotate(ctx, dbKey, client.RotateOptions{
					NewValue: value, GracePeriod: time.Hour, MustMatchVersion: "v1", AllowMissing: true, RequestID: requestID,
				})
			},
			req: &secretsv1.RotateSecretRequest{
				Ref: dbRef, NewValue: dbURI, GracePeriod: durationpb.New(time.Hour), MustMatchVersion: "v1", AllowMissing: true, RequestId: requestID,
			},
			want: client.RotateResult{Metadata: full, Previous: &sparse, Value: value},
		},
		{
			name: "delete",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Delete(ctx, dbKey, client.DeleteOptions{MustMatchVersion: "v1", AllowMissing: true, RequestID: requestID})
			},
			req:  &secretsv1.DeleteSecretRequest{Ref: dbRef, MustMatchVersion: "v1", AllowMissing: true, RequestId: requestID},
			want: &full,
		},
		{
			name: "recover",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Recover(ctx, dbKey, client.RecoverOptions{RequestID: requestID})
			},
			req:  &secretsv1.RecoverSecretRequest{Ref: dbRef, RequestId: requestID},
			want: full,
		},
		{
			name: "describe",
			call: func(ctx context.Context, c *client.Client) (any, error) { return c.Describe(ctx, dbKey) },
			req:  &secretsv1.DescribeSecretRequest{Ref: dbRef},
			want: client.DescribeResult{
				Metadata: full, RedactedValue: "postgres://app:***@db-7:5432/orders", Versions: []client.Metadata{full, sparse},
			},
		},
		{
			name: "verify",
			call: func(ctx context.Context, c *client.Client) (any, error) {
				return c.Verify(ctx, acme, secret.NewValue("token"))
			},
			req:  &secretsv1.VerifyTokenRequest{InstanceId: "acme", Token: "token"},
			want: client.VerifyResult{Match: client.MatchPrevious, Generation: 2, ExpireTime: day(2)},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			checkComplete(t, test.req)
			checkComplete(t, fullAnswers[test.req.ProtoReflect().Descriptor().FullName()])
			b := start(t, answerFull)
			got, err := test.call(t.Context(), b.client(t))
			if err != nil {
				t.Fatal(err)
			}
			if req := b.only(t).req; !proto.Equal(req, test.req) {
				t.Error("the broker got another request than wanted") // not shown: it holds a value
			}
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("got  %+v\nwant %+v", got, test.want)
			}
		})
	}

	t.Run("list", func(t *testing.T) {
		t.Parallel()
		// Pages may be short or empty, and hold kinds that came later.
		pages := map[string]*secretsv1.ListSecretsResponse{
			"":   {Secrets: []*secretsv1.SecretMetadata{fullProto, {Key: "instance-acme-later_kind"}}, NextPageToken: "p2"},
			"p2": {NextPageToken: "p3"},
			"p3": {Secrets: []*secretsv1.SecretMetadata{sparseProto}},
		}
		b := start(t, func(_ context.Context, req proto.Message) (proto.Message, error) {
			return pages[req.(*secretsv1.ListSecretsRequest).GetPageToken()], nil
		})
		c := b.client(t)
		list := c.List(t.Context(), client.ListOptions{InstanceID: acme, PageSize: 7, ShowDeleted: true})
		if calls := b.seen(); len(calls) != 0 {
			t.Errorf("got %d calls before the list was read, want none", len(calls))
		}
		want := []client.Metadata{full, sparse}
		for range 2 { // each range begins anew
			var got []client.Metadata
			for m, err := range list {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, m)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
		}
		for i, call := range b.seen() {
			want := &secretsv1.ListSecretsRequest{
				InstanceId: "acme", PageSize: 7, PageToken: []string{"", "p2", "p3"}[i%3], ShowDeleted: true,
			}
			if !proto.Equal(call.req, want) {
				t.Errorf("call %d: got %v, want %v", i, call.req, want)
			}
		}
	})
}

// What is not set must not arrive as set: the broker tells them apart.
func TestZeroOptions(t *testing.T) {
	t.Parallel()
	b := start(t, func(ctx context.Context, req proto.Message) (proto.Message, error) {
		answer, _ := answerFull(ctx, req)
		return answer.ProtoReflect().New().Interface(), nil // empty
	})
	c := b.client(t)
	ctx := t.Context()

	put, err := c.Put(ctx, dbKey, secret.NewValue(dbURI), client.PutOptions{})
	if put != (client.PutResult{}) || err != nil {
		t.Errorf("put: got %+v, %v, want zero", put, err)
	}
	got, err := c.Get(ctx, dbKey, client.GetOptions{})
	if !got.Value.IsEmpty() || !got.AsOf.IsZero() || got.Source != "" || err != nil {
		t.Errorf("get: got %+v, %v, want zero", got, err)
	}
	if _, err := c.Get(ctx, dbKey, client.GetOptions{MaxStaleness: new(time.Duration)}); err != nil {
		t.Error(err)
	}
	rotated, err := c.Rotate(ctx, dbKey, client.RotateOptions{})
	if rotated.Previous != nil || !rotated.Value.IsEmpty() || err != nil {
		t.Errorf("rotate: got %+v, %v, want zero", rotated, err)
	}
	deleted, err := c.Delete(ctx, dbKey, client.DeleteOptions{})
	if deleted != nil || err != nil {
		t.Errorf("delete: got %+v, %v, want nil", deleted, err)
	}
	for m, err := range c.List(ctx, client.ListOptions{}) {
		t.Errorf("list: got %+v, %v, want nothing", m, err)
	}

	want := []proto.Message{
		&secretsv1.PutSecretRequest{Ref: dbRef, Value: dbURI},
		&secretsv1.GetSecretRequest{Ref: dbRef},
		&secretsv1.GetSecretRequest{Ref: dbRef, MaxStaleness: &durationpb.Duration{}},
		&secretsv1.RotateSecretRequest{Ref: dbRef},
		&secretsv1.DeleteSecretRequest{Ref: dbRef},
		&secretsv1.ListSecretsRequest{},
	}
	for i, call := range b.seen() {
		// Request ids are TestRequestIDs' matter.
		if id := call.req.ProtoReflect().Descriptor().Fields().ByName("request_id"); id != nil {
			call.req.ProtoReflect().Clear(id)
		}
		if !proto.Equal(call.req, want[i]) {
			t.Errorf("call %d: the broker got another request than a zero %T", i, want[i])
		}
	}
}

func TestEveryKindStateAndSource(t *testing.T) {
	t.Parallel()
	// min_generation says which number to answer with.
	b := start(t, func(_ context.Context, req proto.Message) (proto.Message, error) {
		number := req.(*secretsv1.GetSecretRequest).GetMinGeneration()
		return &secretsv1.GetSecretResponse{
			Metadata:  &secretsv1.SecretMetadata{State: secretsv1.SecretState(number)},
			Freshness: &secretsv1.Freshness{Source: secretsv1.FreshnessSource(number)},
		}, nil
	})
	c := b.client(t)

	for _, kind := range secret.Kinds() {
		key, err := secret.NewKey(dbKey.InstanceID(), kind)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Get(t.Context(), key, client.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		calls := b.seen()
		got := calls[len(calls)-1].req.(*secretsv1.GetSecretRequest).GetRef().GetKind().String()
		if want := "SECRET_KIND_" + kind.String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}

	states := map[secretsv1.SecretState]client.State{0: "", 1: client.Active, 2: client.Disabled, 3: client.Deleted, 99: "99"}
	for number := range secretsv1.SecretState_name {
		if _, ok := states[secretsv1.SecretState(number)]; !ok {
			t.Errorf("no State for %d", number)
		}
	}
	sources := map[secretsv1.FreshnessSource]client.FreshnessSource{0: "", 1: client.Live, 2: client.Cache, 3: client.StaleOnError, 99: "99"}
	for number := range secretsv1.FreshnessSource_name {
		if _, ok := sources[secretsv1.FreshnessSource(number)]; !ok {
			t.Errorf("no FreshnessSource for %d", number)
		}
	}
	for number, want := range states {
		got, err := c.Get(t.Context(), dbKey, client.GetOptions{MinGeneration: int64(number)})
		if got.State != want || err != nil {
			t.Errorf("state %d: got %q, %v, want %q", number, got.State, err, want)
		}
	}
	for number, want := range sources {
		got, err := c.Get(t.Context(), dbKey, client.GetOptions{MinGeneration: int64(number)})
		if got.Source != want || err != nil {
			t.Errorf("source %d: got %q, %v, want %q", number, got.Source, err, want)
		}
	}
}
