package server_test

import (
	"strings"
	"testing"

	"github.com/google/uuid"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/server/vault/noop"
)

// TestNoop: without a store every write succeeds and is forgotten, every read
// finds nothing, and the log warns of each.
func TestNoop(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.startOn(noop.New(s.logger()))
	x := s.in(t, "demo", "absent")
	token := s.token(t, "demo")
	id := uuid.NewString() // of every request: nothing is remembered
	seen := map[string]bool{}

	// fresh checks the metadata of a write: generation 1, and a version of its own.
	fresh := func(m *secretsv1.SecretMetadata, err error, state secretsv1.SecretState) string {
		t.Helper()
		if err != nil || m.GetGeneration() != 1 || m.GetState() != state || m.GetVersion() == "" || seen[m.GetVersion()] || m.GetCreateTime() == nil {
			t.Errorf("got %v, %v, want generation 1, a version of its own and %v", m, err, state)
		}
		seen[m.GetVersion()] = true
		return ""
	}
	tests := map[string]func() string{
		"put": func() string {
			out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(1), RequestId: id})
			if out.GetUnchanged() || out.GetMetadata().GetCreatedBy() != "spiffe://console.exto/"+consoleAPI {
				t.Errorf("got %v, want it written by its caller", out)
			}
			return fresh(out.GetMetadata(), err, active)
		},
		"put, must_not_exist": func() string {
			out, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(1), Precondition: &secretsv1.PutSecretRequest_MustNotExist{MustNotExist: true}})
			return fresh(out.GetMetadata(), err, active)
		},
		"put, must_match_version": func() string {
			_, err := x.c.PutSecret(x.ctx, &secretsv1.PutSecretRequest{Ref: x.ref, Value: uri(1), Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: "v"}})
			return told(t, err)
		},
		"rotate a token": func() string {
			out, err := token.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: token.ref, RequestId: id})
			if !strings.HasPrefix(out.GetValue(), "exto_rt_") || out.GetPrevious() != nil || seen[out.GetValue()] {
				t.Error("want a new token and no previous")
			}
			seen[out.GetValue()] = true
			return fresh(out.GetMetadata(), err, active)
		},
		"rotate, allow_missing": func() string {
			out, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: uri(1), AllowMissing: true, RequestId: id})
			if out.GetValue() != "" || out.GetPrevious() != nil {
				t.Error("want neither value nor previous")
			}
			return fresh(out.GetMetadata(), err, active)
		},
		"rotate, must_match_version": func() string {
			_, err := x.c.RotateSecret(x.ctx, &secretsv1.RotateSecretRequest{Ref: x.ref, NewValue: uri(1), MustMatchVersion: "v"})
			return told(t, err)
		},
		"delete": func() string {
			out, err := x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref, RequestId: id})
			return fresh(out.GetMetadata(), err, deleted)
		},
		"delete, must_match_version": func() string {
			_, err := x.c.DeleteSecret(x.ctx, &secretsv1.DeleteSecretRequest{Ref: x.ref, MustMatchVersion: "v"})
			return told(t, err)
		},
		"recover": func() string {
			_, err := x.c.RecoverSecret(x.ctx, &secretsv1.RecoverSecretRequest{Ref: x.ref, RequestId: id})
			return told(t, err)
		},
		"get": func() string {
			_, err := x.get("")
			return told(t, err)
		},
		"get a version": func() string {
			_, err := x.get("v")
			return told(t, err)
		},
		"describe": func() string {
			_, err := x.c.DescribeSecret(x.ctx, &secretsv1.DescribeSecretRequest{Ref: x.ref})
			return told(t, err)
		},
		"list": func() string {
			out, err := x.c.ListSecrets(x.ctx, &secretsv1.ListSecretsRequest{ShowDeleted: true})
			if err != nil || len(out.GetSecrets()) != 0 || out.GetNextPageToken() != "" {
				t.Errorf("got %v, %v, want nothing", out, err)
			}
			return ""
		},
		"list of an instance": func() string {
			out, err := x.c.ListSecrets(x.ctx, &secretsv1.ListSecretsRequest{InstanceId: "demo", ShowDeleted: true})
			if err != nil || len(out.GetSecrets()) != 0 {
				t.Errorf("got %v, %v, want nothing", out, err)
			}
			return ""
		},
	}
	want := map[string]string{
		"put, must_match_version":    "VERSION_MISMATCH NOT_APPLIED",
		"rotate, must_match_version": "VERSION_MISMATCH NOT_APPLIED",
		"delete, must_match_version": "VERSION_MISMATCH NOT_APPLIED",
		"recover":                    "SECRET_NOT_FOUND NOT_APPLIED",
		"get":                        "SECRET_NOT_FOUND ",
		"get a version":              "SECRET_NOT_FOUND ",
		"describe":                   "SECRET_NOT_FOUND ",
	}
	for range 2 { // the second time is like the first
		for name, call := range tests {
			warned := strings.Count(s.log.String(), "the noop secret store keeps nothing")
			if got := call(); got != want[name] {
				t.Errorf("%s: got %q, want %q", name, got, want[name])
			}
			if strings.Count(s.log.String(), "the noop secret store keeps nothing") == warned {
				t.Errorf("%s: the log does not warn", name)
			}
		}
	}
	conn := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/" + consoleAPI)))
	for _, service := range []string{"", secretsv1.SecretsBrokerService_ServiceDesc.ServiceName} {
		out, err := healthpb.NewHealthClient(conn).Check(x.ctx, &healthpb.HealthCheckRequest{Service: service})
		if err != nil || out.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("health of %q: got %v, %v, want SERVING", service, out, err)
		}
	}
}

// told is the reason and the commit state of an error.
func told(t *testing.T, err error) string {
	t.Helper()
	f := failed(t, err)
	return string(f.reason) + " " + string(f.commit)
}
