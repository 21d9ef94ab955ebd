package server_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/race"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
)

// startWithQuota is a system whose callers may make so many requests a second, of the
// test's own clock.
func startWithQuota(t *testing.T, perSecond float64) *system {
	t.Helper()
	s := newSystem(t)
	s.config = func(c *server.Config) { c.CallerRequestsPerSecond, c.Now = perSecond, s.clock.Now }
	s.startEmbedded()
	return s
}

func startWithBounds(t *testing.T, b server.Bounds) *system {
	t.Helper()
	s := newSystem(t)
	s.config = func(c *server.Config) { c.SetBounds(b) }
	s.startEmbedded()
	return s
}

func spiffe(path string) string { return "spiffe://console.exto/" + path }

// wantQuota checks that a call was refused for its caller's limit, and gives RetryInfo.
func wantQuota(t *testing.T, err error, commit secret.CommitState) time.Duration {
	t.Helper()
	wantReason(t, err, secret.CallerQuotaExceeded, commit)
	f := failed(t, err)
	if f.code != codes.ResourceExhausted {
		t.Errorf("got %v, want RESOURCE_EXHAUSTED", f.code)
	}
	for _, d := range f.status.Details() {
		if retry, ok := d.(*errdetails.RetryInfo); ok && retry.GetRetryDelay().AsDuration() > 0 {
			return retry.GetRetryDelay().AsDuration()
		}
	}
	t.Errorf("got %v, want RetryInfo", err)
	return 0
}

func list(t *testing.T, c secretsv1.SecretsBrokerServiceClient) error {
	t.Helper()
	_, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
	return err
}

func TestRequestsPerSecond(t *testing.T) {
	t.Parallel()
	s := startWithQuota(t, 4)
	conn := s.dial(s.clientTLS(s.certificate(spiffe(consoleAPI))))
	c := secretsv1.NewSecretsBrokerServiceClient(conn)
	for range 4 {
		if err := list(t, c); err != nil {
			t.Fatal(err)
		}
	}
	begun := time.Now()
	if wait := wantQuota(t, list(t, c), ""); wait != time.Second/4 {
		t.Errorf("got RetryInfo %v, want the time of one request, 250 ms", wait)
	}
	if took := time.Since(begun); took < server.QuotaPause {
		t.Errorf("got the refusal after %v, want it held back for %v", took, server.QuotaPause)
	}
	_, err := c.PutSecret(callContext(t), &secretsv1.PutSecretRequest{Ref: ref("demo", tokenKind), Value: "tok"})
	wantQuota(t, err, secret.NotApplied)
	// Before the request is looked at: this one is no good.
	_, err = c.GetSecret(callContext(t), &secretsv1.GetSecretRequest{})
	wantQuota(t, err, "")
	w, err := c.WatchSecrets(callContext(t), &secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{ref("demo", tokenKind)}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Recv()
	wantQuota(t, err, "")
	if _, err := healthpb.NewHealthClient(conn).Check(callContext(t), &healthpb.HealthCheckRequest{Service: serviceName}); err != nil {
		t.Errorf("a health check: %v", err)
	}
	if err := list(t, s.as(worker)); err != nil {
		t.Errorf("another identity: %v", err)
	}
	s.clock.advance(time.Second / 4)
	if err := list(t, c); err != nil {
		t.Errorf("a quarter of a second later: %v", err)
	}
	wantQuota(t, list(t, c), "")
	// A caller that may not make a call uses up its requests too; one that nobody knows
	// is told so.
	may := s.as("instance/demo")
	for range 4 {
		wantReason(t, list(t, may), secret.CallerNotAllowed, "")
	}
	wantQuota(t, list(t, may), "")
	for range 6 {
		wantReason(t, list(t, s.as("nobody")), secret.CallerUnknown, "")
	}
}

// TestQuotaOutlivesConnections: an identity has one limit, over all its connections and
// after them; and nothing is kept of it for good.
func TestQuotaOutlivesConnections(t *testing.T) {
	t.Parallel()
	s := startWithQuota(t, 2)
	caller := func() (secretsv1.SecretsBrokerServiceClient, *grpc.ClientConn) {
		conn := s.dial(s.clientTLS(s.certificate(spiffe(consoleAPI)))) // another certificate each time
		return secretsv1.NewSecretsBrokerServiceClient(conn), conn
	}
	gone := func(conns ...*grpc.ClientConn) {
		for _, conn := range conns {
			_ = conn.Close()
		}
		eventually(t, "no connection is open", func() bool { return s.face.Usage(spiffe(consoleAPI)).Connections == 0 })
	}
	first, firstConn := caller()
	for range 2 {
		if err := list(t, first); err != nil {
			t.Fatal(err)
		}
	}
	second, secondConn := caller()
	wantQuota(t, list(t, second), "")
	gone(firstConn, secondConn)
	third, thirdConn := caller()
	wantQuota(t, list(t, third), "")
	gone(thirdConn)
	s.clock.advance(time.Second)
	eventually(t, "nothing is known of the identity", func() bool { return s.face.Accounts() == 0 })
}

// TestQuotaAndTokens: a token that matches is verified whatever else its caller asks,
// since anybody can make it ask about wrong ones.
func TestQuotaAndTokens(t *testing.T) {
	t.Parallel()
	s := startWithQuota(t, 3)
	c := s.as(consoleAPI)
	if _, err := c.PutSecret(callContext(t), &secretsv1.PutSecretRequest{Ref: ref("demo", tokenKind), Value: "right"}); err != nil {
		t.Fatal(err)
	}
	verify := func(token string) (*secretsv1.VerifyTokenResponse, error) {
		return c.VerifyToken(callContext(t), &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: token})
	}
	for range 2 {
		if got, err := verify("wrong"); err != nil || got.GetResult() != secretsv1.VerifyResult_VERIFY_RESULT_NO_MATCH {
			t.Fatalf("got %v, %v, want NO_MATCH", got, err)
		}
	}
	for range 5 {
		_, err := verify("wrong")
		wantQuota(t, err, "")
		if got, err := verify("right"); err != nil || got.GetResult() != secretsv1.VerifyResult_VERIFY_RESULT_MATCH_CURRENT {
			t.Fatalf("got %v, %v, want MATCH_CURRENT", got, err)
		}
	}
	wantQuota(t, list(t, c), "")
}

// hangGets makes every Get wait in the vault until release.
func (s *system) hangGets() (release func()) {
	hold := make(chan struct{})
	s.vault.SetBefore(func(ctx context.Context, call string, _ secret.Key) error {
		if call == "Get" {
			<-hold
		}
		return nil
	})
	return sync.OnceFunc(func() { close(hold) })
}

// TestTenThousandGetsAtOnce of one caller, as after an outage.
// TestRefusalsTakeNoPlaces: a caller whose calls are refused by its quota, and held back,
// has tokens verified all the same.
func TestRefusalsTakeNoPlaces(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.config = func(c *server.Config) {
		c.SetBounds(server.Bounds{Calls: 4})
		c.CallerRequestsPerSecond, c.Now = 10, s.clock.Now
	}
	s.startEmbedded()
	c := s.as(consoleAPI)
	if _, err := c.PutSecret(callContext(t), &secretsv1.PutSecretRequest{Ref: ref("demo", tokenKind), Value: "tok"}); err != nil {
		t.Fatal(err)
	}
	for range 9 {
		if err := list(t, c); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(callContext(t))
	var refused sync.WaitGroup
	defer refused.Wait()
	defer cancel()
	for range 8 {
		refused.Go(func() {
			for ctx.Err() == nil {
				_, _ = c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind)})
			}
		})
	}
	for range 100 {
		if _, err := c.VerifyToken(callContext(t), &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: "tok"}); err != nil {
			t.Fatal(err)
		}
	}
	begun := time.Now()
	_, err := c.VerifyToken(callContext(t), &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: "another"})
	wantQuota(t, err, "")
	if took := time.Since(begun); took < server.QuotaPause {
		t.Errorf("got the refusal after %v, want it held back for %v", took, server.QuotaPause)
	}
}

// TestRefusalsArePaced: many at once are not all refused at once.
func TestRefusalsArePaced(t *testing.T) {
	t.Parallel()
	const calls = 200
	s := startWithQuota(t, 1)
	c := s.as(consoleAPI)
	if err := list(t, c); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	ended := make(chan error, calls)
	for range calls {
		go func() {
			_, err := c.ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
			ended <- err
		}()
	}
	for range calls {
		wantQuota(t, <-ended, "")
	}
	if took, least := time.Since(begun), time.Second*(calls-2)/server.QuotaRefusals; took < least {
		t.Errorf("got %d refusals after %v, want them within no less than %v", calls, took, least)
	}
}

func TestTenThousandGetsAtOnce(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	if _, err := s.as(consoleAPI).PutSecret(callContext(t), &secretsv1.PutSecretRequest{Ref: ref("demo", tokenKind), Value: "tok"}); err != nil {
		t.Fatal(err)
	}
	release := s.hangGets()
	defer release()
	const connections = 5
	each := 2000
	if race.Enabled {
		each = 300
	}
	ended := make(chan error, connections*each)
	for range connections {
		c := s.as(consoleAPI)
		for range each {
			go func() {
				_, err := c.GetSecret(callContext(t), &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind), MaxStaleness: durationOf(0)})
				ended <- err
			}()
		}
	}
	eventually(t, "10,000 Gets are under way", func() bool { return s.face.Usage(spiffe(consoleAPI)).Calls == int64(connections*each) })
	release()
	for range connections * each {
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
}

func TestConcurrentCalls(t *testing.T) {
	t.Parallel()
	s := startWithBounds(t, server.Bounds{Calls: 3, Streams: 2})
	release := s.hangGets()
	defer release()
	ended := make(chan error, 3)
	for range 3 {
		c := s.as(consoleAPI)
		go func() {
			_, err := c.GetSecret(callContext(t), &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind)})
			ended <- err
		}()
	}
	eventually(t, "three calls are under way", func() bool { return s.face.Usage(spiffe(consoleAPI)).Calls == 3 })
	c := s.as(consoleAPI)
	_, err := c.DeleteSecret(callContext(t), &secretsv1.DeleteSecretRequest{Ref: ref("demo", tokenKind)})
	wantQuota(t, err, secret.NotApplied)
	if err := list(t, s.as(worker)); err != nil {
		t.Errorf("another identity: %v", err)
	}
	watch := func(c secretsv1.SecretsBrokerServiceClient) (grpc.ServerStreamingClient[secretsv1.WatchSecretsResponse], error) {
		w, err := c.WatchSecrets(callContext(t), &secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{ref("other", uriKind)}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Recv()
		return w, err
	}
	release()
	for range 3 {
		wantReason(t, <-ended, secret.SecretNotFound, "")
	}
	for range 2 {
		if _, err := watch(s.as(consoleAPI)); err != nil {
			t.Fatal(err)
		}
	}
	_, err = watch(c)
	wantQuota(t, err, "")
	if _, err := watch(s.as(worker)); err != nil {
		t.Errorf("another identity: %v", err)
	}
	if err := list(t, c); err != nil {
		t.Errorf("a call beside as many streams as there may be: %v", err)
	}
}
