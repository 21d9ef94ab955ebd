package client_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/exto/secrets-broker/client"
	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

func instanceID(t *testing.T, s string) secret.InstanceID {
	t.Helper()
	id, err := secret.ParseInstanceID(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestVerifyAnswers(t *testing.T) {
	t.Parallel()
	answers := map[secretsv1.VerifyResult]client.Match{0: "", 1: client.MatchCurrent, 2: client.MatchPrevious, 3: client.NoMatch, 99: "99"}
	for number := range secretsv1.VerifyResult_name {
		if _, ok := answers[secretsv1.VerifyResult(number)]; !ok {
			t.Errorf("no Match for %d", number)
		}
	}
	for number, want := range answers {
		c := start(t, func(context.Context, proto.Message) (proto.Message, error) {
			return &secretsv1.VerifyTokenResponse{Result: number}, nil
		}).client(t)
		got, err := c.Verify(t.Context(), instanceID(t, "acme"), secret.NewValue("token"))
		if got.Match != want || got.OK() != (number == 1 || number == 2) || err != nil {
			t.Errorf("%d: got %+v, OK %t, %v, want %q", number, got, got.OK(), err, want)
		}
	}
	c := start(t, nil).client(t)
	for what, token := range map[string]string{"no UTF-8": "\xff", "more than a request takes": strings.Repeat("t", 65<<10)} {
		if got, err := c.Verify(t.Context(), instanceID(t, "acme"), secret.NewValue(token)); got.Match != client.NoMatch || err != nil {
			t.Errorf("%s: got %+v, %v, want NoMatch", what, got, err)
		}
	}
}

// verifications lets "good" in at each instance, and "old" until its end, and
// counts what it is asked.
func verifications(t *testing.T, ids ...string) (s *shelf, b *broker, asked *atomic.Int32, end *atomic.Pointer[time.Time]) {
	t.Helper()
	s, b = startShelf(t, ids...)
	asked, end = new(atomic.Int32), new(atomic.Pointer[time.Time])
	end.Store(new(time.Now().Add(time.Hour)))
	b.answer = func(ctx context.Context, m proto.Message) (proto.Message, error) {
		req, ok := m.(*secretsv1.VerifyTokenRequest)
		if !ok {
			return s.answer(ctx, m)
		}
		asked.Add(1)
		resp := &secretsv1.VerifyTokenResponse{Result: secretsv1.VerifyResult_VERIFY_RESULT_NO_MATCH}
		switch req.GetToken() {
		case "good":
			resp.Result = secretsv1.VerifyResult_VERIFY_RESULT_MATCH_CURRENT
		case "old":
			resp.Result, resp.ExpireTime = secretsv1.VerifyResult_VERIFY_RESULT_MATCH_PREVIOUS, timestamppb.New(*end.Load())
		}
		return resp, nil
	}
	return s, b, asked, end
}

func TestVerifierRemembers(t *testing.T) {
	t.Parallel()
	shelf, b, asked, end := verifications(t, "acme", "beta")
	v := client.NewVerifier(t.Context(), b.client(t), client.VerifierOptions{Instances: 1})
	verify := func(id, token string) client.VerifyResult {
		t.Helper()
		got, err := v.VerifyToken(t.Context(), instanceID(t, id), secret.NewValue(token))
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	// remembered reports whether the token is let in without a question.
	remembered := func(id, token string) bool {
		t.Helper()
		before := asked.Load()
		if !verify(id, token).OK() {
			t.Errorf("%s is no match", token)
		}
		return asked.Load() == before
	}
	if remembered("acme", "good") {
		t.Error("the first token was not asked about")
	}
	eventually(t, "remembered", func() bool { return remembered("acme", "good") })

	before := asked.Load()
	for range 2 {
		if verify("acme", "bad").OK() {
			t.Error("a bad token is let in")
		}
	}
	if got := asked.Load() - before; got != 2 {
		t.Errorf("a bad token was asked about %d times, want each time", got)
	}

	// A change ends it, and what matches after that is remembered again.
	before = asked.Load()
	shelf.set("acme", 2)
	eventually(t, "asked after the change", func() bool { verify("acme", "good"); return asked.Load() > before })
	eventually(t, "remembered again", func() bool { return remembered("acme", "good") })

	// A token in grace ends at its time.
	end.Store(new(time.Now().Add(200 * time.Millisecond)))
	verify("acme", "old")
	before = asked.Load()
	eventually(t, "asked after the grace", func() bool { verify("acme", "old"); return asked.Load() > before })

	if !remembered("acme", "good") {
		t.Error("a second token took the place of the first")
	}

	// Nothing is remembered without a watch.
	shelf.fail(codes.Unavailable)
	eventually(t, "asked in an outage", func() bool { return !remembered("acme", "good") })
	if remembered("acme", "good") {
		t.Error("a token is remembered in an outage")
	}
	shelf.fail(codes.OK)
	eventually(t, "remembered after it", func() bool { return remembered("acme", "good") })

	// Another instance takes the only place.
	eventually(t, "remembered of beta", func() bool { return remembered("beta", "good") })
	if remembered("acme", "good") {
		t.Error("two instances are remembered, want one")
	}
}

// A match that a change overtook is not remembered.
func TestVerifierForgetsWhatChangedMeanwhile(t *testing.T) {
	t.Parallel()
	shelf, b, asked, _ := verifications(t, "acme")
	answer := b.answer
	var hold atomic.Bool
	arrived, release := make(chan struct{}), make(chan struct{})
	b.answer = func(ctx context.Context, m proto.Message) (proto.Message, error) {
		if _, ok := m.(*secretsv1.VerifyTokenRequest); ok && hold.Swap(false) {
			arrived <- struct{}{}
			<-release
		}
		return answer(ctx, m)
	}
	c := b.client(t)
	v := client.NewVerifier(t.Context(), c, client.VerifierOptions{Instances: 1})
	verify := func(token string) {
		if _, err := v.VerifyToken(t.Context(), instanceID(t, "acme"), secret.NewValue(token)); err != nil {
			t.Error(err)
		}
	}
	source := newSource(t, t.Context(), c, "acme", byWatch) // told of what the Verifier is told of
	eventually(t, "remembered", func() bool {
		before := asked.Load()
		verify("good")
		return asked.Load() == before
	})
	hold.Store(true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		verify("old")
	}()
	<-arrived
	shelf.set("acme", 2)
	await(t, source, "the change", version("v2"))
	close(release)
	<-done
	before := asked.Load()
	if verify("old"); asked.Load() == before {
		t.Error("what matched before the change is remembered after it")
	}
}

func TestVerifierIsOffByDefault(t *testing.T) {
	t.Parallel()
	shelf, b, asked, _ := verifications(t, "acme")
	v := client.NewVerifier(t.Context(), b.client(t), client.VerifierOptions{})
	for range 3 {
		if got, err := v.VerifyToken(t.Context(), instanceID(t, "acme"), secret.NewValue("good")); !got.OK() || err != nil {
			t.Errorf("got %+v, %v, want a match", got, err)
		}
	}
	if _, watches := shelf.count(); asked.Load() != 3 || watches != 0 {
		t.Errorf("got %d questions and %d watches, want 3 and none", asked.Load(), watches)
	}
}

func TestInstance(t *testing.T) {
	t.Parallel()
	var withoutOIDC atomic.Bool
	values := map[string]string{"instance-acme": "token", "instance-acme-dburi": "uri", "instance-acme-oidc-secret": "oidc"}
	b := start(t, func(_ context.Context, m proto.Message) (proto.Message, error) {
		ref := m.(*secretsv1.GetSecretRequest).GetRef()
		key, err := secret.NewKey(instanceID(t, ref.GetInstanceId()), secret.Kind(ref.GetKind()))
		if err != nil || withoutOIDC.Load() && key.Kind() == secret.OIDCClientSecret {
			return nil, refusalOf(codes.NotFound, secret.SecretNotFound)
		}
		return &secretsv1.GetSecretResponse{Metadata: &secretsv1.SecretMetadata{Key: key.String(), Version: "v1"}, Value: values[key.String()]}, nil
	})
	c := b.client(t)
	instance, err := client.NewInstance(t.Context(), c, instanceID(t, "acme"), client.InstanceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range []*client.Source{instance.Token, instance.DatabaseURI, instance.OIDCClientSecret} {
		got = append(got, s.Value().Value.Reveal())
	}
	if want := []string{"token", "uri", "oidc"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}

	withoutOIDC.Store(true)
	if _, err := client.NewInstance(t.Context(), c, instanceID(t, "acme"), client.InstanceOptions{}); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("got %v without one of the three, want ErrNotFound", err)
	}
	instance, err = client.NewInstance(t.Context(), c, instanceID(t, "acme"), client.InstanceOptions{Optional: []secret.Kind{secret.OIDCClientSecret}})
	if err != nil || !instance.OIDCClientSecret.Value().Value.IsEmpty() {
		t.Errorf("got %v without an optional one, want it to be ready", err)
	}
}

func TestDeleteInstance(t *testing.T) {
	t.Parallel()
	var refuse atomic.Bool
	b := start(t, func(_ context.Context, m proto.Message) (proto.Message, error) {
		req := m.(*secretsv1.DeleteSecretRequest)
		if refuse.Load() && req.GetRef().GetKind() == secretsv1.SecretKind_SECRET_KIND_REGISTRATION_TOKEN {
			return nil, refusalOf(codes.PermissionDenied, secret.CallerNotAllowed)
		}
		return &secretsv1.DeleteSecretResponse{}, nil
	})
	c := b.client(t)
	if err := c.DeleteInstance(t.Context(), instanceID(t, "acme")); err != nil {
		t.Error(err)
	}
	refuse.Store(true)
	if err := c.DeleteInstance(t.Context(), instanceID(t, "acme")); !errors.Is(err, client.ErrNotAllowed) {
		t.Errorf("got %v, want ErrNotAllowed", err)
	}
	var kinds []int
	for _, call := range b.seen() {
		req := call.req.(*secretsv1.DeleteSecretRequest)
		if kinds = append(kinds, int(req.GetRef().GetKind())); !req.GetAllowMissing() || req.GetRef().GetInstanceId() != "acme" {
			t.Error("got a delete that an absent secret fails, or of another instance")
		}
	}
	if want := []int{1, 2, 3, 1, 2, 3}; !slices.Equal(kinds, want) {
		t.Errorf("got deletes of kinds %v, want %v", kinds, want)
	}
	if err := c.DeleteInstance(t.Context(), secret.InstanceID{}); err == nil {
		t.Error("got no error for no instance")
	}
}
