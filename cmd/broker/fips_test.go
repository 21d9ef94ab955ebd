package main

import (
	"strings"
	"syscall"
	"testing"

	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

// TestFIPS: the broker works with Go's FIPS 140-3 module, and says so.
func TestFIPS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	devIn(t, dir).kill()
	start := func(mode string) *process {
		p := launch(t, dir, append(environ(settings(dir)), "GODEBUG=fips140="+mode), binary, "serve")
		p.listen()
		if said, want := strings.Contains(p.err.String(), "fips140=true"), mode != "off"; said != want {
			t.Errorf("fips140=%s: got log %s, want fips140=true there: %v", mode, p.err, want)
		}
		return p
	}
	ctx, r := callContext(t), ref("demo", tokenKind)
	var token string
	for _, mode := range []string{"on", "off", "on"} {
		p := start(mode)
		api := p.as("console-api")
		if token != "" { // of the process before
			if got := must2(api.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: r, MaxStaleness: durationpb.New(0)}))(t).GetValue(); got != token {
				t.Errorf("fips140=%s: got another value than the one rotated to", mode)
			}
		}
		must2(api.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: r, Value: "put-" + mode}))(t)
		if got := must2(api.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: r}))(t).GetValue(); got != "put-"+mode {
			t.Errorf("fips140=%s: got another value than the one put", mode)
		}
		token = must2(api.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: r}))(t).GetValue()
		verified := must2(api.VerifyToken(ctx, &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: token}))(t)
		if verified.GetResult() != secretsv1.VerifyResult_VERIFY_RESULT_MATCH_CURRENT {
			t.Errorf("fips140=%s: got %v, want MATCH_CURRENT", mode, verified.GetResult())
		}
		p.end(syscall.SIGTERM)
	}
}

// TestDebugThatPrintsValues: what makes the libraries print what they send and
// receive ends the start.
func TestDebugThatPrintsValues(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, debug := range []string{"http2debug=1", "fips140=on,http2debug=2"} {
		code, _, stderr := runBroker(t, dir, []string{"GODEBUG=" + debug}, "dev")
		if code != 1 || !strings.HasPrefix(stderr, "broker: GODEBUG has http2debug") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("GODEBUG=%s: got exit code %d and %q, want 1 and one line", debug, code, stderr)
		}
	}
}

// TestFIPSOnly: nothing but the module, which the embedded store's library does not allow.
func TestFIPSOnly(t *testing.T) {
	t.Parallel()
	c := secretCloud(t, devFolder(t), keyvaultfake.Config{})
	p := c.start("GODEBUG", "fips140=only")
	if !strings.Contains(p.err.String(), "fips140=true") {
		t.Errorf("got log %s, want fips140=true there", p.err)
	}
	api, ctx := p.as("console-api"), callContext(t)
	must2(api.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("demo", tokenKind), Value: "first"}))(t)
	token := must2(api.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: ref("demo", tokenKind)}))(t).GetValue()
	verified := must2(api.VerifyToken(ctx, &secretsv1.VerifyTokenRequest{InstanceId: "demo", Token: token}))(t)
	if verified.GetResult() != secretsv1.VerifyResult_VERIFY_RESULT_MATCH_CURRENT {
		t.Errorf("got %v, want MATCH_CURRENT", verified.GetResult())
	}
}
