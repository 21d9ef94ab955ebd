package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/exto/secrets-broker/client"
	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const callerID = "spiffe://console.exto/worker"

// answerFunc is what a test makes of a request.
type answerFunc func(context.Context, proto.Message) (proto.Message, error)

// broker is a fake of the broker behind the real transport: it writes down what
// it is asked and answers what the test says.
type broker struct {
	secretsv1.UnimplementedSecretsBrokerServiceServer
	addr   string
	ca     ca
	files  client.Config // those that the broker accepts
	health *health.Server
	answer answerFunc
	watch  func(*secretsv1.WatchSecretsRequest, grpc.ServerStreamingServer[secretsv1.WatchSecretsResponse]) error

	mu    sync.Mutex
	calls []seen
}

// seen is one call as the broker got it.
type seen struct {
	req      proto.Message
	deadline time.Time
	tls      tls.ConnectionState
}

func (b *broker) PutSecret(ctx context.Context, req *secretsv1.PutSecretRequest) (*secretsv1.PutSecretResponse, error) {
	return serve[*secretsv1.PutSecretResponse](ctx, b, req)
}

func (b *broker) GetSecret(ctx context.Context, req *secretsv1.GetSecretRequest) (*secretsv1.GetSecretResponse, error) {
	return serve[*secretsv1.GetSecretResponse](ctx, b, req)
}

func (b *broker) RotateSecret(ctx context.Context, req *secretsv1.RotateSecretRequest) (*secretsv1.RotateSecretResponse, error) {
	return serve[*secretsv1.RotateSecretResponse](ctx, b, req)
}

func (b *broker) DeleteSecret(ctx context.Context, req *secretsv1.DeleteSecretRequest) (*secretsv1.DeleteSecretResponse, error) {
	return serve[*secretsv1.DeleteSecretResponse](ctx, b, req)
}

func (b *broker) RecoverSecret(ctx context.Context, req *secretsv1.RecoverSecretRequest) (*secretsv1.RecoverSecretResponse, error) {
	return serve[*secretsv1.RecoverSecretResponse](ctx, b, req)
}

func (b *broker) DescribeSecret(ctx context.Context, req *secretsv1.DescribeSecretRequest) (*secretsv1.DescribeSecretResponse, error) {
	return serve[*secretsv1.DescribeSecretResponse](ctx, b, req)
}

func (b *broker) ListSecrets(ctx context.Context, req *secretsv1.ListSecretsRequest) (*secretsv1.ListSecretsResponse, error) {
	return serve[*secretsv1.ListSecretsResponse](ctx, b, req)
}

func (b *broker) VerifyToken(ctx context.Context, req *secretsv1.VerifyTokenRequest) (*secretsv1.VerifyTokenResponse, error) {
	return serve[*secretsv1.VerifyTokenResponse](ctx, b, req)
}

func (b *broker) WatchSecrets(req *secretsv1.WatchSecretsRequest, stream grpc.ServerStreamingServer[secretsv1.WatchSecretsResponse]) error {
	b.note(stream.Context(), req)
	if b.watch == nil {
		return status.Error(codes.Unimplemented, "the test watches nothing")
	}
	return b.watch(req, stream)
}

func serve[Resp proto.Message](ctx context.Context, b *broker, req proto.Message) (Resp, error) {
	b.note(ctx, req)
	var none Resp
	answer, err := b.answer(ctx, req)
	if err != nil {
		return none, err
	}
	resp, ok := answer.(Resp)
	if !ok {
		return none, status.Errorf(codes.Internal, "the test answers a %T with a %T", req, answer)
	}
	return resp, nil
}

func (b *broker) note(ctx context.Context, req proto.Message) {
	call := seen{req: req}
	call.deadline, _ = ctx.Deadline()
	if p, ok := peer.FromContext(ctx); ok {
		call.tls = p.AuthInfo.(credentials.TLSInfo).State
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, call)
}

// seen returns all calls so far.
func (b *broker) seen() []seen {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]seen(nil), b.calls...)
}

// only returns the one call that there must have been.
func (b *broker) only(t *testing.T) seen {
	t.Helper()
	calls := b.seen()
	if len(calls) != 1 {
		t.Fatalf("got %d calls, want 1", len(calls))
	}
	return calls[0]
}

// start runs a fake broker until the test ends. answer may be nil when no call
// is to arrive.
func start(t *testing.T, answer answerFunc) *broker {
	t.Helper()
	return startTLS(t, tls.VersionTLS13, answer)
}

func startTLS(t *testing.T, maxVersion uint16, answer answerFunc) *broker {
	t.Helper()
	return newCA(t).start(t, maxVersion, answer)
}

// another is a second broker with the same CA that answers the same.
func (b *broker) another(t *testing.T) *broker {
	t.Helper()
	return b.ca.start(t, tls.VersionTLS13, b.answer)
}

func (ca ca) start(t *testing.T, maxVersion uint16, answer answerFunc) *broker {
	t.Helper()
	b := &broker{ca: ca, files: ca.issue(t), answer: answer, health: health.NewServer()}
	cert, err := tls.LoadX509KeyPair(b.files.CertFile, b.files.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = listener.Addr().String()
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		MaxVersion:   maxVersion,
		Certificates: []tls.Certificate{cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    roots,
	})))
	secretsv1.RegisterSecretsBrokerServiceServer(server, b)
	healthpb.RegisterHealthServer(server, b.health)
	b.serve(true)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		// A test that calls nothing may end before Serve begins.
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("serve: %v", err)
		}
	})
	return b
}

// serve says by the health service whether the broker answers calls.
func (b *broker) serve(serving bool) {
	state := healthpb.HealthCheckResponse_NOT_SERVING
	if serving {
		state = healthpb.HealthCheckResponse_SERVING
	}
	b.health.SetServingStatus(secretsv1.SecretsBrokerService_ServiceDesc.ServiceName, state)
}

// client connects to the broker as it should be done, but calls once.
func (b *broker) client(t *testing.T, opts ...grpc.DialOption) *client.Client {
	t.Helper()
	return b.clientOf(t, b.files, opts...)
}

func (b *broker) clientOf(t *testing.T, files client.Config, opts ...grpc.DialOption) *client.Client {
	t.Helper()
	c := newClient(t, b.addr, files, opts...)
	client.NoRetries(c)
	return c
}

func newClient(t *testing.T, target string, cfg client.Config, opts ...grpc.DialOption) *client.Client {
	t.Helper()
	c, err := client.New(target, cfg, opts...)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// ca issues certificates for one test.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t *testing.T) ca {
	t.Helper()
	key := newKey(t)
	cert := sign(t, &x509.Certificate{
		Subject:               pkix.Name{CommonName: "test CA"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}, key, nil, key)
	return ca{cert, key}
}

// issue makes a certificate for 127.0.0.1, broker.example and callerID, which
// both sides can use, and gives the files.
func (ca ca) issue(t *testing.T) client.Config {
	t.Helper()
	id, err := url.Parse(callerID)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	cert := sign(t, &x509.Certificate{
		Subject:     pkix.Name{CommonName: "test leaf"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		DNSNames:    []string{"broker.example"},
		URIs:        []*url.URL{id},
	}, key, ca.cert, ca.key)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	return client.Config{
		CertFile: writePEM(t, filepath.Join(dir, "cert.pem"), "CERTIFICATE", cert.Raw),
		KeyFile:  writePEM(t, filepath.Join(dir, "key.pem"), "PRIVATE KEY", keyDER),
		CAFile:   writePEM(t, filepath.Join(dir, "ca.pem"), "CERTIFICATE", ca.cert.Raw),
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// sign issues template for key; a nil parent makes it sign itself.
func sign(t *testing.T, template *x509.Certificate, key *ecdsa.PrivateKey, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = serial
	template.NotBefore = time.Now().Add(-time.Hour)
	template.NotAfter = time.Now().Add(time.Hour)
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func writePEM(t *testing.T, path, kind string, der []byte) string {
	t.Helper()
	write(t, path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	return path
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
