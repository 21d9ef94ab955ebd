package server

import (
	"context"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// callMetrics counts calls, by the names and labels of the middleware's own metrics,
// which dashboards know. Those look five series up by their labels in every call, as a
// profile of Gets from memory shows; here a method's are looked up once.
type callMetrics map[procedure]*methodMetrics

type procedure struct{ service, method string }

// methodMetrics are the series of one method.
type methodMetrics struct {
	started, received, sent prometheus.Counter
	handled                 [codes.Unauthenticated + 1]prometheus.Counter // by code; that is the last
	seconds                 prometheus.Observer
}

// register makes the series of all methods of services, which are there from then on.
// Calls of others are not counted.
func (c callMetrics) register(metrics prometheus.Registerer, services map[string]grpc.ServiceInfo) {
	with := promauto.With(metrics)
	labels := []string{"grpc_type", "grpc_service", "grpc_method"}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return with.NewCounterVec(prometheus.CounterOpts{Name: "grpc_server_" + name, Help: help}, labels)
	}
	started := counter("started_total", "Calls that were begun.", labels...)
	received := counter("msg_received_total", "Messages that were received.", labels...)
	sent := counter("msg_sent_total", "Messages that were sent.", labels...)
	handled := counter("handled_total", "Calls that were answered, by the code of the answer.", append(labels, "grpc_code")...)
	seconds := with.NewHistogramVec(prometheus.HistogramOpts{
		Name: "grpc_server_handling_seconds", Help: "Time from a call's request to its answer; of a stream, to its end.",
	}, labels)
	for service, info := range services {
		for _, method := range info.Methods {
			of := []string{string(typeOf(method)), service, method.Name}
			m := &methodMetrics{
				started: started.WithLabelValues(of...), received: received.WithLabelValues(of...), sent: sent.WithLabelValues(of...),
				seconds: seconds.WithLabelValues(of...),
			}
			for code := range m.handled {
				m.handled[code] = handled.WithLabelValues(append(of, codes.Code(code).String())...)
			}
			c[procedure{service, method.Name}] = m
		}
	}
}

func typeOf(m grpc.MethodInfo) interceptors.GRPCType {
	switch {
	case m.IsClientStream && m.IsServerStream:
		return interceptors.BidiStream
	case m.IsClientStream:
		return interceptors.ClientStream
	case m.IsServerStream:
		return interceptors.ServerStream
	}
	return interceptors.Unary
}

// ServerReporter counts a call's begin, and gives what counts the rest.
func (c callMetrics) ServerReporter(ctx context.Context, call interceptors.CallMeta) (interceptors.Reporter, context.Context) {
	m, ok := c[procedure{call.Service, call.Method}]
	if !ok {
		return interceptors.NoopReporter{}, ctx
	}
	m.started.Inc()
	return m, ctx
}

// PostMsgReceive counts a message that came, unless err.
func (m *methodMetrics) PostMsgReceive(_ any, err error, _ time.Duration) {
	if err == nil {
		m.received.Inc()
	}
}

// PostMsgSend counts a message that was sent, unless err.
func (m *methodMetrics) PostMsgSend(_ any, err error, _ time.Duration) {
	if err == nil {
		m.sent.Inc()
	}
}

// PostCall counts a call's end, by the code that gRPC makes of err.
func (m *methodMetrics) PostCall(err error, took time.Duration) {
	told, ok := status.FromError(err)
	if !ok {
		told = status.FromContextError(err)
	}
	code := told.Code()
	if int(code) >= len(m.handled) {
		code = codes.Unknown
	}
	m.handled[code].Inc()
	m.seconds.Observe(took.Seconds())
}
