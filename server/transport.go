package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/exto/secrets-broker/server/authz"
)

// Why something was refused before a handler saw it: a label's values, and so all
// there are.
const (
	whyNoCertificate     = "no_certificate"
	whyUnknownCA         = "unknown_ca"
	whyExpired           = "expired"
	whyTLSVersion        = "tls_version"
	whyHandshakeTimeout  = "handshake_timeout"
	whyHandshake         = "handshake_other"
	whyPreface           = "preface"            // no HTTP/2 after the handshake
	whyHandshakes        = "handshakes"         // too many under way
	whyConnections       = "connections"        // too many of all
	whyCallerConnections = "caller_connections" // too many of one identity
	whyMemory            = "memory"             // too much of unfinished requests
	whyUnfinished        = "unfinished"         // a request that never came to its end
	whyFlood             = "flood"              // of frames that no call needs
	whyPings             = "pings"
	whyStreams           = "streams" // too many on one connection
	whyHeaders           = "headers"
	whyProtocol          = "protocol"
	whyDecode            = "decode"
	whyTooLarge          = "too_large"
	whyUnknownMethod     = "unknown_method"
)

var whys = []string{
	whyNoCertificate, whyUnknownCA, whyExpired, whyTLSVersion, whyHandshakeTimeout, whyHandshake, whyPreface, whyHandshakes, whyConnections, whyCallerConnections,
	whyMemory, whyUnfinished, whyFlood, whyPings, whyStreams, whyHeaders, whyProtocol, whyDecode, whyTooLarge, whyUnknownMethod,
}

// refusalsPerSecond is how many refusals are told one by one. A flood of them is
// anybody's to make, without a certificate too.
const refusalsPerSecond = 10

// transportRefusal is what gRPC or TLS refused before a handler saw it.
type transportRefusal struct {
	time           time.Time
	peer           net.Addr
	caller, serial string // of the client's certificate, where one is known
	// offered says that nobody vouches for caller and serial: the handshake failed,
	// and they are what the client showed.
	offered bool
	method  string // empty where it is unknown to the server or to the refusal
	why     string
	code    codes.Code // what the client sees
	// rest, if not 0, is how many refusals this one stands for, and all else is empty:
	// those beyond refusalsPerSecond.
	rest int
}

// refusals counts what is refused, and tells each to refused, at most so many a
// second and the rest as a number.
type refusals struct {
	total   *prometheus.CounterVec
	refused func(transportRefusal)
	now     func() time.Time

	mu     sync.Mutex
	second int64
	told   int // in that second
	rest   int
	timer  *time.Timer // nil unless rest is to be told
}

func newRefusals(metrics prometheus.Registerer, now func() time.Time, refused func(transportRefusal)) (*refusals, error) {
	r := &refusals{refused: refused, now: now, total: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "secrets_broker_refused_before_handler_total",
		Help: "Calls and connections that TLS or gRPC refused before a handler saw them.",
	}, []string{"why"})}
	for _, why := range whys {
		r.total.WithLabelValues(why)
	}
	return r, metrics.Register(r.total)
}

func (r *refusals) report(refusal transportRefusal) {
	r.total.WithLabelValues(refusal.why).Inc()
	refusal.time = r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if second := refusal.time.Unix(); second != r.second {
		r.flush()
		r.second, r.told = second, 0
	}
	if r.told++; r.told <= refusalsPerSecond {
		if refusal.code == codes.OK {
			refusal.code = codes.Unavailable
		}
		r.refused(refusal)
		return
	}
	r.rest++
	if r.timer == nil {
		r.timer = time.AfterFunc(time.Second, r.close)
	}
}

// flush tells the rest.
func (r *refusals) flush() {
	if r.timer != nil {
		r.timer.Stop()
		r.timer = nil
	}
	if r.rest > 0 {
		r.refused(transportRefusal{time: r.now(), rest: r.rest})
		r.rest = 0
	}
}

// close tells the rest now.
func (r *refusals) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flush()
}

// logRefusals tells refusals to the log.
func logRefusals(log *slog.Logger) func(transportRefusal) {
	return func(r transportRefusal) {
		if r.rest > 0 {
			log.Warn("refused before a handler", "further", r.rest)
			return
		}
		attrs := []slog.Attr{slog.String("why", r.why), slog.String("grpc.code", r.code.String()), slog.String("peer.address", r.peer.String())}
		for key, value := range map[string]string{"caller": r.caller, "serial": r.serial, "grpc.method": r.method} {
			if r.offered && key != "grpc.method" {
				key = "offered." + key
			}
			if value != "" {
				attrs = append(attrs, slog.String(key, value))
			}
		}
		log.LogAttrs(context.Background(), slog.LevelWarn, "refused before a handler", attrs...)
	}
}

// handshake reports one that failed.
func (r *refusals) handshake(peer net.Addr, err error) {
	refusal := transportRefusal{peer: peer, why: whyHandshake}
	var timeout net.Error
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.Is(err, io.EOF): // a load balancer's probe, which says nothing
		return
	case errors.As(err, &unknown):
		refusal.why = whyUnknownCA
		refusal.offer(unknown.Cert)
	case errors.As(err, &invalid):
		if invalid.Reason == x509.Expired {
			refusal.why = whyExpired
		}
		refusal.offer(invalid.Cert)
	case errors.As(err, &timeout) && timeout.Timeout():
		refusal.why = whyHandshakeTimeout
	// crypto/tls has no values for these.
	case strings.Contains(err.Error(), "didn't provide a certificate"):
		refusal.why = whyNoCertificate
	case strings.Contains(err.Error(), "unsupported versions"), errors.As(err, new(tls.RecordHeaderError)):
		refusal.why = whyTLSVersion
	}
	r.report(refusal)
}

// offer names what the client showed.
func (r *transportRefusal) offer(cert *x509.Certificate) {
	r.offered, r.serial = true, authz.Serial(cert.SerialNumber)
	if id, err := authz.CallerFromCertificate(cert); err == nil {
		r.caller = id.String()
	}
}

// refusalOn is one on a client's connection.
func refusalOn(c *connection, why string) transportRefusal {
	r := transportRefusal{peer: c.peer, why: why, serial: c.serial}
	if c.caller.problem == nil {
		r.caller = c.caller.id.String()
	}
	return r
}

// request reports a call of method whose request did not become one.
func (r *refusals) request(c *connection, method string, err error) {
	refusal := refusalOn(c, whyDecode)
	refusal.method, refusal.code = method, status.Code(err)
	switch refusal.code {
	case codes.Canceled, codes.DeadlineExceeded:
		return // the client's own doing
	case codes.ResourceExhausted:
		refusal.why = whyTooLarge
	}
	r.report(refusal)
}

// registrar registers services so that what gRPC does before an interceptor is seen
// too. A stats handler would see it, but gRPC then copies the headers of each call and
// makes an event of each of its steps, also of those that go well.
type registrar struct {
	*grpc.Server
	refusals *refusals
}

func (r registrar) RegisterService(desc *grpc.ServiceDesc, service any) {
	seen := *desc
	seen.Methods, seen.Streams = nil, nil
	for _, m := range desc.Methods {
		m.Handler = r.unary("/"+desc.ServiceName+"/"+m.MethodName, m.Handler)
		seen.Methods = append(seen.Methods, m)
	}
	for _, s := range desc.Streams {
		if !s.ClientStreams { // else its messages come when they come
			s.Handler = r.stream("/"+desc.ServiceName+"/"+s.StreamName, s.Handler)
		}
		seen.Streams = append(seen.Streams, s)
	}
	r.Server.RegisterService(&seen, service)
}

func (r registrar) unary(method string, handle grpc.MethodHandler) grpc.MethodHandler {
	return func(service any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		ctx, c := begin(ctx, method)
		return handle(service, ctx, func(m any) error { return r.receive(c.connection, method, m, decode) }, interceptor)
	}
}

func (r registrar) stream(method string, handle grpc.StreamHandler) grpc.StreamHandler {
	return func(service any, stream grpc.ServerStream) error {
		return handle(service, &receivedStream{stream, func(m any) error {
			return r.receive(connectionOf(stream.Context()), method, m, stream.RecvMsg)
		}})
	}
}

type receivedStream struct {
	grpc.ServerStream
	receive func(any) error
}

func (s *receivedStream) RecvMsg(m any) error { return s.receive(m) }

// receive decodes a request once it is there.
func (r registrar) receive(c *connection, method string, m any, decode func(any) error) error {
	began := c.traffic.begin()
	err := decode(m)
	c.traffic.done(began)
	if err != nil {
		r.refusals.request(c, method, err)
	}
	return err
}

// refuseUnknown answers calls of methods that there are not, before anything of theirs
// becomes a label or a line: their names are the client's to make up.
func refuseUnknown(r *refusals) grpc.StreamServerInterceptor {
	return func(service any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		if service != nil {
			return handler(service, stream)
		}
		c := connectionOf(stream.Context())
		refusal := refusalOn(c, whyUnknownMethod)
		refusal.code = codes.Unimplemented
		r.report(refusal)
		return status.Error(codes.Unimplemented, "unknown service or method")
	}
}
