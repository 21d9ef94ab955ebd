package server_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

// TestBadInput has one case per rule of the contract. No error repeats what was
// sent, whichever field a secret strayed into.
func TestBadInput(t *testing.T) {
	notRacing(t)
	t.Parallel()
	const canary = "q7Zt-canary.x9"
	const oidcKind = secretsv1.SecretKind_SECRET_KIND_OIDC_CLIENT_SECRET
	x := startSystem(t).in(t, "demo", "active")
	put := func(change func(*secretsv1.PutSecretRequest)) func() error {
		return func() error {
			in := &secretsv1.PutSecretRequest{Ref: ref("demo", oidcKind), Value: "abc"}
			change(in)
			_, err := x.c.PutSecret(x.ctx, in)
			return err
		}
	}
	get := func(change func(*secretsv1.GetSecretRequest)) func() error {
		return func() error {
			in := &secretsv1.GetSecretRequest{Ref: x.ref}
			change(in)
			_, err := x.c.GetSecret(x.ctx, in)
			return err
		}
	}
	rotate := func(change func(*secretsv1.RotateSecretRequest)) func() error {
		return func() error {
			in := &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: uri(7)}
			change(in)
			_, err := x.c.RotateSecret(x.ctx, in)
			return err
		}
	}
	list := func(in *secretsv1.ListSecretsRequest) func() error {
		return func() error {
			_, err := x.c.ListSecrets(x.ctx, in)
			return err
		}
	}
	id := func(s string) func() error {
		return put(func(in *secretsv1.PutSecretRequest) { in.Ref.InstanceId = s })
	}
	value := func(kind secretsv1.SecretKind, s string) func() error {
		return put(func(in *secretsv1.PutSecretRequest) { in.Ref.Kind, in.Value = kind, s })
	}
	for name, test := range map[string]struct {
		call   func() error
		reason secret.Reason
		field  string
		read   bool
	}{
		"no ref":                     {put(func(in *secretsv1.PutSecretRequest) { in.Ref = nil }), secret.InvalidRequest, "ref", false},
		"no instance id":             {id(""), secret.InvalidInstanceID, "ref.instance_id", false},
		"instance id in upper case":  {id("Demo"), secret.InvalidInstanceID, "ref.instance_id", false},
		"instance id with a canary":  {id(canary), secret.InvalidInstanceID, "ref.instance_id", false},
		"instance id too long":       {id(strings.Repeat("a", 101)), secret.InvalidInstanceID, "ref.instance_id", false},
		"instance id ends in hyphen": {id("a-"), secret.InvalidInstanceID, "ref.instance_id", false},
		"reserved ending -dburi":     {id("abc-dburi"), secret.InvalidInstanceID, "ref.instance_id", false},
		"reserved ending -oidc":      {id("abc-oidc-secret"), secret.InvalidInstanceID, "ref.instance_id", false},
		"no kind":                    {put(func(in *secretsv1.PutSecretRequest) { in.Ref.Kind = 0 }), secret.InvalidKind, "ref.kind", false},
		"unknown kind":               {put(func(in *secretsv1.PutSecretRequest) { in.Ref.Kind = 9 }), secret.InvalidKind, "ref.kind", false},
		"must_not_exist false":       {put(func(in *secretsv1.PutSecretRequest) { in.Precondition = &secretsv1.PutSecretRequest_MustNotExist{} }), secret.InvalidRequest, "must_not_exist", false},
		"must_match_version empty": {put(func(in *secretsv1.PutSecretRequest) {
			in.Precondition = &secretsv1.PutSecretRequest_MustMatchVersion{}
		}), secret.InvalidRequest, "must_match_version", false},
		"request id":               {put(func(in *secretsv1.PutSecretRequest) { in.RequestId = canary }), secret.InvalidRequest, "request_id", false},
		"request id in upper case": {put(func(in *secretsv1.PutSecretRequest) { in.RequestId = "6F2C1D1E-8F1B-4F3A-9D55-0C9A3E1B7A42" }), secret.InvalidRequest, "request_id", false},
		"no value":                 {value(oidcKind, ""), secret.InvalidValue, "value", false},
		"value too long":           {value(uriKind, "postgres://h/"+strings.Repeat("x", 25_000)), secret.InvalidValue, "value", false},
		"token not b64token":       {value(tokenKind, canary+" "), secret.InvalidValue, "value", false},
		"token too long":           {value(tokenKind, strings.Repeat("a", 4097)), secret.InvalidValue, "value", false},
		"token with a bad form":    {value(tokenKind, "exto_rt_"+canary), secret.InvalidValue, "value", false},
		"URI of another scheme":    {value(uriKind, "mysql://"+canary+"@h/db"), secret.InvalidValue, "value", false},
		"URI without host":         {value(uriKind, "postgres://u:"+canary+"@/db"), secret.InvalidValue, "value", false},
		"client secret with break": {value(oidcKind, canary+"\n"), secret.InvalidValue, "value", false},
		"client secret too long":   {value(oidcKind, strings.Repeat("é", 4097)), secret.InvalidValue, "value", false},
		"token given to rotate":    {rotate(func(in *secretsv1.RotateSecretRequest) { in.Ref, in.NewValue = ref("demo", tokenKind), canary }), secret.InvalidValue, "new_value", false},
		"nothing to rotate to":     {rotate(func(in *secretsv1.RotateSecretRequest) { in.NewValue = "" }), secret.InvalidValue, "new_value", false},
		"bad value to rotate to":   {rotate(func(in *secretsv1.RotateSecretRequest) { in.NewValue = canary }), secret.InvalidValue, "new_value", false},
		"negative grace":           {rotate(func(in *secretsv1.RotateSecretRequest) { in.GracePeriod = durationpb.New(-1) }), secret.InvalidRequest, "grace_period", false},
		"grace over a day":         {rotate(func(in *secretsv1.RotateSecretRequest) { in.GracePeriod = durationpb.New(24*time.Hour + 1) }), secret.InvalidRequest, "grace_period", false},
		"malformed grace":          {rotate(func(in *secretsv1.RotateSecretRequest) { in.GracePeriod = &durationpb.Duration{Seconds: 1, Nanos: -1} }), secret.InvalidRequest, "grace_period", false},
		"delete with a bad id": {func() error {
			_, err := x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref, RequestId: canary})
			return err
		}, secret.InvalidRequest, "request_id", false},
		"recover with a bad id": {func() error {
			_, err := x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref, RequestId: canary})
			return err
		}, secret.InvalidRequest, "request_id", false},
		"negative staleness":           {get(func(in *secretsv1.GetSecretRequest) { in.MaxStaleness = durationpb.New(-1) }), secret.InvalidRequest, "max_staleness", true},
		"negative generation":          {get(func(in *secretsv1.GetSecretRequest) { in.MinGeneration = -1 }), secret.InvalidRequest, "min_generation", true},
		"version and generation":       {get(func(in *secretsv1.GetSecretRequest) { in.Version, in.MinGeneration = canary, 1 }), secret.InvalidRequest, "min_generation", true},
		"list of a bad instance":       {list(&secretsv1.ListSecretsRequest{InstanceId: canary}), secret.InvalidInstanceID, "instance_id", true},
		"negative page":                {list(&secretsv1.ListSecretsRequest{PageSize: -1}), secret.InvalidRequest, "page_size", true},
		"page too large":               {list(&secretsv1.ListSecretsRequest{PageSize: 1001}), secret.InvalidRequest, "page_size", true},
		"forged page token":            {list(&secretsv1.ListSecretsRequest{PageToken: canary}), secret.InvalidRequest, "page_token", true},
		"forged page token, decodable": {list(&secretsv1.ListSecretsRequest{PageToken: "eyJrIjoiaHR0cHM6Ly9ldmlsIn0"}), secret.InvalidRequest, "page_token", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := failed(t, test.call())
			commit := secret.NotApplied
			if test.read {
				commit = ""
			}
			if f.code != codes.InvalidArgument || f.reason != test.reason || f.field != test.field || f.commit != commit {
				t.Errorf("got %v %s of field %q with commit state %q, want %s of %q with %q", f.code, f.reason, f.field, f.commit, test.reason, test.field, commit)
			}
			text := fmt.Sprint(f.status.Proto(), f.status.Details())
			for i := 0; i+4 <= len(canary); i++ {
				if strings.Contains(text, canary[i:i+4]) {
					t.Errorf("the error repeats %q of what was sent: %s", canary[i:i+4], text)
					break
				}
			}
		})
	}
	t.Cleanup(func() {
		if strings.Contains(x.log.String(), canary) {
			t.Error("the log holds what was refused")
		}
	})
}

func TestPages(t *testing.T) {
	notRacing(t)
	t.Parallel()
	s := newSystem(t)
	s.policy += "  - identity: spiffe://console.exto/support\n    allow: [list]\n    instances: [i-003, i-007]\n"
	s.startEmbedded()
	c, ctx := s.as(consoleAPI), callContext(t)
	const secrets = 130
	for n := range secrets {
		if _, err := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref(fmt.Sprintf("i-%03d", n), uriKind), Value: uri(n)}); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 10 {
		if _, err := c.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: ref(fmt.Sprintf("i-%03d", n), uriKind)}); err != nil {
			t.Fatal(err)
		}
	}
	all := func(c secretsv1.SecretsBrokerServiceClient, in *secretsv1.ListSecretsRequest, between func(page int)) (keys []string) {
		t.Helper()
		for page := 0; ; page++ {
			out, err := c.ListSecrets(ctx, in)
			if err != nil {
				t.Fatal(err)
			}
			if max := int(in.GetPageSize()); max > 0 && len(out.GetSecrets()) > max {
				t.Fatalf("got a page of %d, want %d at most", len(out.GetSecrets()), max)
			}
			for _, m := range out.GetSecrets() {
				keys = append(keys, m.GetKey()+" "+m.GetState().String())
			}
			if in.PageToken = out.GetNextPageToken(); in.PageToken == "" {
				return keys
			}
			between(page)
		}
	}
	for _, size := range []int32{0, 3, 7, 1000} {
		seen := map[string]bool{}
		keys := all(c, &secretsv1.ListSecretsRequest{PageSize: size, ShowDeleted: true}, func(page int) {
			// Others write meanwhile.
			if _, err := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref(fmt.Sprintf("new-%d-%d", size, page), tokenKind), Value: "abc"}); err != nil {
				t.Fatal(err)
			}
		})
		gone := false
		for _, k := range keys {
			if seen[k] {
				t.Errorf("page size %d: %s is there twice", size, k)
			}
			seen[k] = true
			if isGone := strings.HasSuffix(k, "DELETED"); gone && !isGone {
				t.Errorf("page size %d: a live one after the deleted", size)
			} else {
				gone = isGone
			}
		}
		for n := range secrets {
			state := "ACTIVE"
			if n < 10 {
				state = "DELETED"
			}
			if k := fmt.Sprintf("instance-i-%03d-dburi SECRET_STATE_%s", n, state); !seen[k] {
				t.Errorf("page size %d: %s is missing", size, k)
			}
		}
	}
	if got := all(s.as("support"), &secretsv1.ListSecretsRequest{PageSize: 1, ShowDeleted: true}, func(int) {}); len(got) != 2 {
		t.Errorf("got %v, want what the policy lets support see", got)
	}
	if got := all(c, &secretsv1.ListSecretsRequest{InstanceId: "i-003", PageSize: 1, ShowDeleted: true}, func(int) {}); len(got) != 1 {
		t.Errorf("got %v, want the one of the instance", got)
	}

	// A token is for the list that it came from, for an hour, with any broker.
	out, err := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{PageSize: 5})
	if err != nil {
		t.Fatal(err)
	}
	token := out.GetNextPageToken()
	_, err = c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{PageToken: token, ShowDeleted: true})
	wantReason(t, err, secret.InvalidRequest, "")
	s.restart()
	c = s.as(consoleAPI)
	s.clock.advance(time.Hour)
	if _, err = c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{PageToken: token}); err != nil {
		t.Errorf("after an hour, at another broker: %v", err)
	}
	s.clock.advance(time.Second)
	_, err = c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{PageToken: token})
	wantReason(t, err, secret.InvalidRequest, "")
}
