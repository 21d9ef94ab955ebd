package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// What a call without a deadline gets: as much as the broker gives it.
const (
	readTimeout  = 30 * time.Second
	writeTimeout = 2 * time.Minute
)

// Config is how a Client proves who it is and knows the broker.
type Config struct {
	// CertFile holds the caller's certificate, then its intermediates, in PEM.
	// Its one URI SAN is the caller's SPIFFE ID. Required.
	CertFile string
	// KeyFile holds the private key of the certificate, in PEM. Required.
	KeyFile string
	// CAFile holds the certificates, in PEM, of which one must have issued the
	// broker's. No others are trusted, the system's neither. Required.
	CAFile string
	// ServerName is the DNS name or IP address that the broker's certificate must
	// bear. Empty: the host of the target.
	ServerName string
}

// Client talks to the broker. It is made by New. All methods are safe for
// concurrent use.
type Client struct {
	conn *grpc.ClientConn
	rpc  secretsv1.SecretsBrokerServiceClient
}

// New makes a Client of the broker at target, a host:port or another name that
// gRPC resolves (https://grpc.github.io/grpc/core/md_doc_naming.html). It reads
// the files of cfg and does not connect yet: the first call does. The error is
// one line that names the field and the file at fault.
//
// The options are for what the Client leaves open, such as interceptors and
// stats handlers; those see values, and must neither log nor trace messages.
// Transport credentials among them have no effect: it is always mutual TLS 1.3.
//
// Close ends the Client.
func New(target string, cfg Config, opts ...grpc.DialOption) (*Client, error) {
	if target == "" {
		return nil, errors.New("secrets broker: a target is required, such as broker.example:7443")
	}
	tlsConfig, err := cfg.tls()
	if err != nil {
		return nil, fmt.Errorf("secrets broker: %w", err)
	}
	// Last, so that no option of the caller's takes its place.
	opts = append(slices.Clone(opts), grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig)))
	conn, err := grpc.NewClient(target, opts...)
	if err != nil {
		return nil, fmt.Errorf("secrets broker: target %q: %w", target, err)
	}
	return &Client{conn, secretsv1.NewSecretsBrokerServiceClient(conn)}, nil
}

// Close ends the connections. Calls under way and later ones end with an *Error
// of codes.Canceled. Call it once.
func (c *Client) Close() error { return c.conn.Close() }

func (cfg Config) tls() (*tls.Config, error) {
	certPEM, err := readFile("CertFile", cfg.CertFile)
	if err != nil {
		return nil, err
	}
	keyPEM, err := readFile("KeyFile", cfg.KeyFile)
	if err != nil {
		return nil, err
	}
	caPEM, err := readFile("CAFile", cfg.CAFile)
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("CertFile %s with KeyFile %s: %w", cfg.CertFile, cfg.KeyFile, err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(caPEM) {
		return nil, fmt.Errorf("CAFile %s: no certificate in PEM form", cfg.CAFile)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    roots,
		ServerName: cfg.ServerName,
		// Not Certificates: crypto/tls would send none of those when the broker
		// asks for another CA's, and the broker could not say who was refused.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
	}, nil
}

func readFile(field, path string) ([]byte, error) {
	if path == "" {
		return nil, fmt.Errorf("%s is required: the path of a PEM file", field)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return data, nil
}

// call makes one call, within the default deadline of its sort when ctx has
// none. A write is what has a request id. All errors are *Error.
func call[Req, Resp any](
	ctx context.Context,
	rpc func(context.Context, *Req, ...grpc.CallOption) (*Resp, error),
	req *Req,
	requestID string,
) (*Resp, error) {
	if _, ok := ctx.Deadline(); !ok {
		timeout := readTimeout
		if requestID != "" {
			timeout = writeTimeout
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	resp, err := rpc(ctx, req)
	if err != nil {
		return nil, newError(err, requestID)
	}
	return resp, nil
}
