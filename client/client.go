package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	_ "google.golang.org/grpc/health" // without it gRPC checks no health
	"google.golang.org/grpc/keepalive"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

// What a call without a deadline gets: as much as the broker gives it.
const (
	readTimeout  = 30 * time.Second
	writeTimeout = 2 * time.Minute
)

// serviceConfig spreads the calls over the addresses at which the broker serves.
var serviceConfig = fmt.Sprintf(`{"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": %q}}`,
	secretsv1.SecretsBrokerService_ServiceDesc.ServiceName)

// Config is how a Client proves who it is and knows the broker. The files are
// read again when they change: within two seconds the Client goes over to a
// connection with the new ones, without failing a call. Files that can't be used
// leave the old ones in force.
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
	target  string
	options []grpc.DialOption
	files   *files
	retries *rate.Limiter // of all calls together
	feed    *feed

	connections
}

// New makes a Client of the broker at target, a host:port or another name that
// gRPC resolves (https://grpc.github.io/grpc/core/md_doc_naming.html). Of a name
// with several addresses, such as dns:///brokers.example:7443, it uses those at
// which the broker says that it serves. It reads the files of cfg and does not
// connect yet: the first call does. The error is one line that names the field
// and the file at fault.
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
	files, err := openFiles(cfg)
	if err != nil {
		return nil, fmt.Errorf("secrets broker: %w", err)
	}
	c := &Client{target: target, files: files, retries: rate.NewLimiter(retriesPerSecond, retriesPerSecond)}
	c.options = append([]grpc.DialOption{
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDisableServiceConfig(), // and no look-up of one in the DNS
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		// The broker allows a ping every 10 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
		// Much jitter: all clients of a broker lose it at one moment.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 250 * time.Millisecond, Multiplier: 1.6, Jitter: 0.5, MaxDelay: 10 * time.Second},
			MinConnectTimeout: 10 * time.Second,
		}),
	}, slices.Clone(opts)...)
	// Last, so that no option of the caller's takes its place.
	c.options = append(c.options, grpc.WithTransportCredentials(files.credentials()))
	if err := c.start(c); err != nil {
		return nil, fmt.Errorf("secrets broker: target %q: %w", target, err)
	}
	c.feed = newFeed(c.ctx, c)
	return c, nil
}

// Close ends the connections. Calls under way and later ones end with an *Error
// of codes.Canceled, and so do the refreshes of Sources, which keep their values.
// Call it once.
func (c *Client) Close() error {
	err := c.stop()
	c.feed.wait()
	return err
}

// call makes one call, and makes it again as docs/client.md says, within the
// default deadline of its sort when ctx has none. A write is what has a request
// id. All errors are *Error.
func call[Req, Resp any](
	ctx context.Context,
	c *Client,
	rpc func(secretsv1.SecretsBrokerServiceClient, context.Context, *Req, ...grpc.CallOption) (*Resp, error),
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
	unknown := false
	for attempt := 0; ; attempt++ {
		conn := c.acquire()
		resp, err := rpc(conn.rpc, ctx, req)
		conn.calls.Done()
		if err == nil {
			return resp, nil
		}
		e := newError(err, requestID)
		if unknown {
			e.followUnknown()
		}
		unknown = e.CommitState == secret.Unknown
		if !e.retryable() || !c.pause(ctx, attempt, e.RetryAfter) {
			return nil, e
		}
		if ctx.Err() != nil {
			ended := newError(contextStatus(ctx), requestID)
			ended.CommitState = e.CommitState
			return nil, ended
		}
	}
}
