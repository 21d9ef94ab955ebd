package server_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	channelzpb "google.golang.org/grpc/channelz/grpc_channelz_v1"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/pki"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server"
)

const instanceDemo = "instance/demo"

// callerKinds are the kinds of callers by what their certificate says, and
// whether the policy knows them.
var callerKinds = []struct {
	name  string
	uris  []string
	known bool
}{
	{"no SPIFFE ID", nil, false},
	{"two URI SANs", []string{"spiffe://console.exto/console-api", "spiffe://console.exto/worker"}, false},
	{"a SPIFFE ID and another URI", []string{"spiffe://console.exto/console-api", "https://console.exto/"}, false},
	{"over 512 bytes", []string{"spiffe://console.exto/" + strings.Repeat("x", 512)}, false},
	{"another trust domain", []string{"spiffe://console.example/console-api"}, false},
	{"named by no rule", []string{"spiffe://console.exto/nobody"}, false},
	{"no accepted instance id", []string{"spiffe://console.exto/instance/abc-dburi"}, false},
	{consoleAPI, []string{"spiffe://console.exto/console-api"}, true},
	{worker, []string{"spiffe://console.exto/worker"}, true},
	{operator, []string{"spiffe://console.exto/operator"}, true},
	{instanceDemo, []string{"spiffe://console.exto/instance/demo"}, true},
}

// everybody has a certificate of the CA, and perhaps no name.
func everybody() (names []string) {
	for _, k := range callerKinds {
		names = append(names, k.name)
	}
	return names
}

// decision is who may call an RPC, and with what it is tried.
type decision struct {
	// anyInstance may call it for each instance, own for the one they are.
	anyInstance []string
	own         []string
	// request is well-formed; nil for the empty message, in which no instance is
	// named.
	request func(instance string) proto.Message
}

func withRef(m func(*secretsv1.SecretRef) proto.Message) func(string) proto.Message {
	return func(instance string) proto.Message { return m(ref(instance, tokenKind)) }
}

// decisions has every RPC that the server answers; one that is missing here
// fails TestWhoMayCallWhat.
func decisions() map[string]decision {
	const service = "/exto.secrets.v1.SecretsBrokerService/"
	table := map[string]decision{
		service + "PutSecret": {anyInstance: []string{consoleAPI, worker}, request: withRef(func(r *secretsv1.SecretRef) proto.Message {
			return &secretsv1.PutSecretRequest{Ref: r, Value: "tok"}
		})},
		service + "GetSecret": {anyInstance: []string{consoleAPI, worker}, own: []string{instanceDemo}, request: withRef(func(r *secretsv1.SecretRef) proto.Message {
			return &secretsv1.GetSecretRequest{Ref: r}
		})},
		service + "RotateSecret": {anyInstance: []string{consoleAPI, worker}, request: withRef(func(r *secretsv1.SecretRef) proto.Message {
			return &secretsv1.RotateSecretRequest{Ref: r, AllowMissing: true}
		})},
		service + "DeleteSecret": {anyInstance: []string{consoleAPI, worker}, request: withRef(func(r *secretsv1.SecretRef) proto.Message {
			return &secretsv1.DeleteSecretRequest{Ref: r}
		})},
		service + "RecoverSecret": {anyInstance: []string{consoleAPI, worker}, request: withRef(func(r *secretsv1.SecretRef) proto.Message {
			return &secretsv1.RecoverSecretRequest{Ref: r}
		})},
		service + "DescribeSecret": {anyInstance: []string{consoleAPI, worker, operator}, request: withRef(func(r *secretsv1.SecretRef) proto.Message {
			return &secretsv1.DescribeSecretRequest{Ref: r}
		})},
		service + "ListSecrets": {anyInstance: []string{consoleAPI, worker, operator}, request: func(instance string) proto.Message {
			return &secretsv1.ListSecretsRequest{InstanceId: instance}
		}},
		service + "VerifyToken": {anyInstance: []string{consoleAPI}, request: func(instance string) proto.Message {
			return &secretsv1.VerifyTokenRequest{InstanceId: instance, Token: "tok"}
		}},
		service + "WatchSecrets": {anyInstance: []string{consoleAPI, worker, operator}, own: []string{instanceDemo}, request: withRef(func(r *secretsv1.SecretRef) proto.Message {
			return &secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{r}}
		})},
	}
	for _, m := range []string{"Check", "List", "Watch"} {
		table["/grpc.health.v1.Health/"+m] = decision{anyInstance: everybody()}
	}
	debug := decision{anyInstance: []string{operator}}
	for _, version := range []string{"v1", "v1alpha"} {
		table["/grpc.reflection."+version+".ServerReflection/ServerReflectionInfo"] = debug
	}
	for _, m := range []string{"GetTopChannels", "GetServers", "GetServer", "GetServerSockets", "GetChannel", "GetSubchannel", "GetSocket"} {
		table["/grpc.channelz.v1.Channelz/"+m] = debug
	}
	return table
}

// TestWhoMayCallWhat tries every RPC with every kind of caller.
func TestWhoMayCallWhat(t *testing.T) {
	notRacing(t)
	t.Parallel()
	s := startSystem(t)
	table, streams := decisions(), map[string]bool{}
	for service, info := range s.face.Services() {
		for _, m := range info.Methods {
			method := "/" + service + "/" + m.Name
			if _, ok := table[method]; !ok {
				t.Errorf("%s has no decision here", method)
			}
			streams[method] = m.IsClientStream || m.IsServerStream
		}
	}
	own := secretsv1.File_exto_secrets_v1_secrets_proto.Services().ByName("SecretsBrokerService").Methods()
	for i := range own.Len() {
		if method := fmt.Sprintf("/%s/%s", own.Get(i).Parent().FullName(), own.Get(i).Name()); table[method].request == nil {
			t.Errorf("%s has no decision here", method)
		}
	}
	for method := range table {
		if _, ok := streams[method]; !ok {
			t.Errorf("%s is not served", method)
		}
	}

	for _, kind := range callerKinds {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			conn := s.dial(s.clientTLS(s.certificate(kind.uris...)))
			for method, d := range table {
				for _, instance := range []string{"demo", "other"} {
					var in proto.Message = &emptypb.Empty{}
					if d.request != nil {
						in = d.request(instance)
					}
					want := secret.Reason("")
					switch {
					case slices.Contains(d.anyInstance, kind.name), slices.Contains(d.own, kind.name) && instance == "demo":
					case kind.known:
						want = secret.CallerNotAllowed
					default:
						want = secret.CallerUnknown
					}
					wantJudged(t, method+" for "+instance, invoke(callContext(t), conn, method, streams[method], in), want)
				}
			}
		})
	}
}

// wantJudged checks that the gate refused a call for this reason, or with none
// that it let the call through, however that ended.
func wantJudged(t *testing.T, what string, err error, want secret.Reason) {
	t.Helper()
	got, code := secret.Reason(""), codes.OK
	if err != nil {
		f := failed(t, err)
		got, code = f.reason, f.code
	}
	wantCode := map[secret.Reason]codes.Code{secret.CallerUnknown: codes.Unauthenticated, secret.CallerNotAllowed: codes.PermissionDenied}
	refused := code == codes.Unauthenticated || code == codes.PermissionDenied
	switch {
	case want == "" && (refused || code == codes.Unavailable || code == codes.Unimplemented || code == codes.DeadlineExceeded):
		t.Errorf("%s: got %v, want it let through", what, err)
	case want != "" && (got != want || code != wantCode[want]):
		t.Errorf("%s: got %v, want %s", what, err, want)
	}
}

// invoke makes a call, and of a stream sees the first answer.
func invoke(ctx context.Context, conn *grpc.ClientConn, method string, stream bool, in proto.Message) error {
	if !stream {
		return conn.Invoke(ctx, method, in, &emptypb.Empty{})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return err
	}
	if err := errors.Join(s.SendMsg(in), s.CloseSend()); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := s.RecvMsg(&emptypb.Empty{}); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

func TestHandshakeRefuses(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	other := newSystem(t)
	template := x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, URIs: []*url.URL{{Scheme: "spiffe", Host: "console.exto", Path: "/" + consoleAPI}}}
	expired, err := s.ca.Issue(template, time.Now().Add(-2*time.Hour), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	early, err := s.ca.Issue(template, time.Now().Add(2*time.Hour), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	forServers := template
	forServers.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	good := s.certificate("spiffe://console.exto/" + consoleAPI)
	tests := []struct {
		name string
		cfg  *tls.Config
	}{
		{"no certificate", s.clientTLS()},
		{"another CA's", s.clientTLS(other.certificate("spiffe://console.exto/" + consoleAPI))},
		{"expired", s.clientTLS(expired)},
		{"not valid yet", s.clientTLS(early)},
		{"of a server", s.clientTLS(s.issue("caller", forServers, time.Hour))},
		{"TLS 1.2", func() *tls.Config { c := s.clientTLS(good); c.MaxVersion = tls.VersionTLS12; return c }()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			conn := s.dial(tt.cfg)
			for _, call := range []func() error{
				func() error {
					_, err := healthpb.NewHealthClient(conn).Check(callContext(t), &healthpb.HealthCheckRequest{})
					return err
				},
				func() error {
					_, err := secretsv1.NewSecretsBrokerServiceClient(conn).ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
					return err
				},
			} {
				if f := failed(t, call()); f.code != codes.Unavailable || f.reason != "" {
					t.Errorf("got %v, want UNAVAILABLE from the handshake", f.status)
				}
			}
		})
	}
	t.Run("TLS 1.3 with a certificate is fine", func(t *testing.T) {
		t.Parallel()
		if _, err := secretsv1.NewSecretsBrokerServiceClient(s.dial(s.clientTLS(good))).ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{}); err != nil {
			t.Error(err)
		}
	})
}

func TestCertificateExpiresOnAnOpenConnection(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	wall := &clock{now: time.Now()}
	s.config = func(c *server.Config) { c.Now = wall.Now }
	s.startEmbedded()
	pair := s.certificate("spiffe://console.exto/" + operator)
	conn := s.dial(s.clientTLS(pair))
	list := func() error {
		_, err := secretsv1.NewSecretsBrokerServiceClient(conn).ListSecrets(callContext(t), &secretsv1.ListSecretsRequest{})
		return err
	}
	wall.advance(pair.Cert.NotAfter.Sub(wall.Now()))
	if err := list(); err != nil {
		t.Fatalf("at the end of the certificate's life: %v", err)
	}
	wall.advance(time.Second)
	wantReason(t, list(), secret.CallerUnknown, "")
	stream := invoke(callContext(t), conn, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", true, &reflectionpb.ServerReflectionRequest{})
	wantReason(t, stream, secret.CallerUnknown, "")
	// By its health a client balances; that it is unknown it is to hear from its calls.
	if _, err := healthpb.NewHealthClient(conn).Check(callContext(t), &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("health: %v", err)
	}
}

// TestOrderOfJudgement: caller, permission, form of the request, secret.
func TestOrderOfJudgement(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	ctx := callContext(t)
	if _, err := s.as(consoleAPI).PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("exists", tokenKind), Value: "tok"}); err != nil {
		t.Fatal(err)
	}
	bad := &secretsv1.SecretRef{InstanceId: "Not-An-Id", Kind: 99}
	_, err := s.as("nobody").GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: bad})
	wantReason(t, err, secret.CallerUnknown, "")
	_, err = s.as("nobody").DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: bad})
	wantReason(t, err, secret.CallerUnknown, secret.NotApplied)
	_, err = s.as(operator).GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: bad})
	wantReason(t, err, secret.CallerNotAllowed, "")
	_, err = s.as(operator).PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: bad})
	wantReason(t, err, secret.CallerNotAllowed, secret.NotApplied)
	_, err = s.as(instanceDemo).DescribeSecret(ctx, &secretsv1.DescribeSecretRequest{Ref: ref("demo", tokenKind)})
	wantReason(t, err, secret.CallerNotAllowed, "")

	demo := s.as(instanceDemo)
	_, err = demo.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: bad})
	wantReason(t, err, secret.InvalidInstanceID, "")
	_, err = demo.GetSecret(ctx, &secretsv1.GetSecretRequest{})
	wantReason(t, err, secret.InvalidRequest, "")
	_, err = demo.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("other", 0)})
	wantReason(t, err, secret.InvalidKind, "")
	_, err = demo.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("other", tokenKind), MinGeneration: -1})
	wantReason(t, err, secret.InvalidRequest, "")

	// What exists is told to nobody who may not know.
	before := len(s.vault.Calls())
	var told []string
	for _, id := range []string{"exists", "absent"} {
		_, err := demo.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref(id, tokenKind)})
		wantReason(t, err, secret.CallerNotAllowed, "")
		f := failed(t, err)
		told = append(told, fmt.Sprint(f.code, f.status.Message(), len(f.status.Details())))
	}
	if told[0] != told[1] {
		t.Errorf("got %q for a secret that exists and %q for one that does not, want the same", told[0], told[1])
	}
	if calls := s.vault.Calls()[before:]; len(calls) > 0 {
		t.Errorf("refused calls asked the vault: %v", calls)
	}
	for _, name := range []string{consoleAPI, worker, "spiffe:"} {
		if contains(told[0], name) {
			t.Errorf("the message %q says who would have been allowed", told[0])
		}
	}
	if _, err := demo.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind)}); failed(t, err).reason != secret.SecretNotFound {
		t.Errorf("its own: got %v, want SECRET_NOT_FOUND", err)
	}
}

// TestRulesAddUp: a single rule has to allow permission, kind and instance
// together.
func TestRulesAddUp(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.policy = `
trust_domain: console.exto
rules:
  - identity: spiffe://console.exto/caller
    allow: [get]
    kinds: [DATABASE_URI]
    instances: [one]
  - identity: spiffe://console.exto/caller
    allow: [describe]
    kinds: [OIDC_CLIENT_SECRET]
    instances: [two]
  - identity: spiffe://console.exto/caller
    allow: [get]
    kinds: [REGISTRATION_TOKEN]
    instances: [two, three]
  - identity: spiffe://console.exto/somebody-else
    allow: [get, describe, put]
`
	s.startEmbedded()
	c, ctx := s.as("caller"), callContext(t)
	allowed := []string{"get one DATABASE_URI", "describe two OIDC_CLIENT_SECRET", "get two REGISTRATION_TOKEN", "get three REGISTRATION_TOKEN"}
	for _, instance := range []string{"one", "two", "three", "four"} {
		for _, kind := range secret.Kinds() {
			r := ref(instance, secretsv1.SecretKind(kind))
			_, get := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: r})
			_, describe := c.DescribeSecret(ctx, &secretsv1.DescribeSecretRequest{Ref: r})
			_, put := c.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: r, Value: "tok"})
			for permission, err := range map[string]error{"get": get, "describe": describe, "put": put} {
				what, want := fmt.Sprintf("%s %s %v", permission, instance, kind), secret.CallerNotAllowed
				if slices.Contains(allowed, what) {
					want = secret.SecretNotFound
				}
				if f := failed(t, err); f.reason != want {
					t.Errorf("%s: got %v, want %s", what, err, want)
				}
			}
		}
	}
}

// TestTemplateReachesItsOwnInstance: a rule with {instance_id} that does not say
// instances.
func TestTemplateReachesItsOwnInstance(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.policy = `
trust_domain: console.exto
rules:
  - identity: spiffe://console.exto/instance/{instance_id}
    allow: [get, list]
  - identity: spiffe://console.exto/console-api
    allow: [put]
`
	s.startEmbedded()
	c, ctx := s.as(instanceDemo), callContext(t)
	for _, id := range []string{"demo", "other"} {
		if _, err := s.as(consoleAPI).PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref(id, tokenKind), Value: "tok"}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("demo", tokenKind)}); err != nil {
		t.Errorf("its own: %v", err)
	}
	_, err := c.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref("other", tokenKind)})
	wantReason(t, err, secret.CallerNotAllowed, "")
	if got, err := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{}); err != nil || len(got.GetSecrets()) != 1 || got.GetSecrets()[0].GetKey() != "instance-demo" {
		t.Errorf("list: got %v, %v, want its own secret alone", got, err)
	}
	_, err = c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{InstanceId: "other"})
	wantReason(t, err, secret.CallerNotAllowed, "")
}

func TestListShowsWhatTheCallerMayList(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.policy = `
trust_domain: console.exto
rules:
  - identity: spiffe://console.exto/console-api
    allow: [put, delete]
  - identity: spiffe://console.exto/auditor
    allow: [list]
    kinds: [DATABASE_URI]
    instances: [one, two]
  - identity: spiffe://console.exto/auditor
    allow: [list]
    kinds: [OIDC_CLIENT_SECRET]
    instances: [three]
  - identity: spiffe://console.exto/auditor
    allow: [get]
`
	s.startEmbedded()
	ctx := callContext(t)
	for _, id := range []string{"one", "two", "three", "four"} {
		for kind, value := range map[secretsv1.SecretKind]string{tokenKind: "tok", uriKind: uri(1), secretsv1.SecretKind_SECRET_KIND_OIDC_CLIENT_SECRET: "oidc"} {
			if _, err := s.as(consoleAPI).PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref(id, kind), Value: value}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, kind := range secret.Kinds() {
		if _, err := s.as(consoleAPI).DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: ref("two", secretsv1.SecretKind(kind))}); err != nil {
			t.Fatal(err)
		}
	}
	c := s.as("auditor")
	list := func(in *secretsv1.ListSecretsRequest) (keys []string) {
		t.Helper()
		for {
			page, err := c.ListSecrets(ctx, in)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range page.GetSecrets() {
				keys = append(keys, m.GetKey())
			}
			if in.PageToken = page.GetNextPageToken(); in.PageToken == "" {
				slices.Sort(keys)
				return keys
			}
		}
	}
	for _, tt := range []struct {
		in   *secretsv1.ListSecretsRequest
		want []string
	}{
		{&secretsv1.ListSecretsRequest{}, []string{"instance-one-dburi", "instance-three-oidc-secret"}},
		{&secretsv1.ListSecretsRequest{PageSize: 1, ShowDeleted: true}, []string{"instance-one-dburi", "instance-three-oidc-secret", "instance-two-dburi"}},
		{&secretsv1.ListSecretsRequest{InstanceId: "one"}, []string{"instance-one-dburi"}},
		{&secretsv1.ListSecretsRequest{InstanceId: "two", ShowDeleted: true}, []string{"instance-two-dburi"}},
		{&secretsv1.ListSecretsRequest{InstanceId: "three", PageSize: 1}, []string{"instance-three-oidc-secret"}},
	} {
		what := fmt.Sprint(tt.in)
		if got := list(tt.in); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %v, want %v", what, got, tt.want)
		}
	}
	for _, id := range []string{"four", "absent"} {
		_, err := c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{InstanceId: id})
		wantReason(t, err, secret.CallerNotAllowed, "")
		// Whether it parses comes first.
		_, err = c.ListSecrets(ctx, &secretsv1.ListSecretsRequest{InstanceId: id, PageToken: "garbage"})
		wantReason(t, err, secret.InvalidRequest, "")
	}
}

// TestDebugServicesAnswer: to a caller with debug, reflection and channelz do
// their work, and refuse in gRPC's own words.
func TestDebugServicesAnswer(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	conn, ctx := s.dial(s.clientTLS(s.certificate("spiffe://console.exto/"+operator))), callContext(t)
	var services []string
	v1, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the stream takes one request after another
		if err := v1.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
			t.Fatal(err)
		}
		got, err := v1.Recv()
		if err != nil {
			t.Fatal(err)
		}
		services = nil
		for _, service := range got.GetListServicesResponse().GetService() {
			services = append(services, service.GetName())
		}
		if !slices.Contains(services, "exto.secrets.v1.SecretsBrokerService") {
			t.Errorf("reflection v1: got services %v", services)
		}
	}
	alpha, err := reflectionalphapb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1019 older grpcurls ask for v1alpha, so it is served and tested
	if err := alpha.Send(&reflectionalphapb.ServerReflectionRequest{MessageRequest: &reflectionalphapb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "exto.secrets.v1.SecretsBrokerService"}}); err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1019 older grpcurls ask for v1alpha, so it is served and tested
	if got, err := alpha.Recv(); err != nil || len(got.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Errorf("reflection v1alpha: got %v, %v, want the file of the service", got, err)
	}
	z := channelzpb.NewChannelzClient(conn)
	if got, err := z.GetServers(ctx, &channelzpb.GetServersRequest{}); err != nil || len(got.GetServer()) == 0 {
		t.Errorf("channelz: got %v, %v, want the server", got, err)
	}
	if _, err := z.GetServer(ctx, &channelzpb.GetServerRequest{ServerId: -1}); failed(t, err).code != codes.NotFound {
		t.Errorf("channelz, an unknown server: got %v, want NOT_FOUND", err)
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	s := startSystem(t)
	// Without a name a certificate is enough.
	for _, pair := range []pki.Pair{s.certificate(), s.certificate("spiffe://console.exto/nobody"), s.certificate("spiffe://console.exto/" + consoleAPI)} {
		h := healthpb.NewHealthClient(s.dial(s.clientTLS(pair)))
		for _, name := range []string{"", "exto.secrets.v1.SecretsBrokerService"} {
			if got, err := h.Check(callContext(t), &healthpb.HealthCheckRequest{Service: name}); err != nil || got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
				t.Errorf("Check %q: got %v, %v, want SERVING", name, got, err)
			}
		}
		if _, err := h.Check(callContext(t), &healthpb.HealthCheckRequest{Service: "unknown"}); failed(t, err).code != codes.NotFound {
			t.Errorf("Check of an unknown service: got %v, want NOT_FOUND", err)
		}
	}
}
