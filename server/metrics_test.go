package server_test

import (
	"maps"
	"strings"
	"testing"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

// callSeries is what is counted of calls of one method, by name, type and, of those
// that were handled, code.
func (s *system) callSeries(method string) map[string]float64 {
	s.t.Helper()
	families, err := s.metrics.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	all := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if name, ok := strings.CutPrefix(f.GetName(), "grpc_server_"); ok && labels["grpc_method"] == method {
				all[strings.TrimSpace(name+" "+labels["grpc_type"]+" "+labels["grpc_code"])] = m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return all
}

// wantCallSeries checks the series that are not 0.
func (s *system) wantCallSeries(method string, want map[string]float64) {
	s.t.Helper()
	got := s.callSeries(method)
	maps.DeleteFunc(got, func(_ string, n float64) bool { return n == 0 })
	if !maps.Equal(got, want) {
		s.t.Errorf("%s: got %v, want %v", method, got, want)
	}
}

func TestCallsAreCounted(t *testing.T) {
	t.Parallel()
	x := startSystem(t).in(t, "demo", "active")
	// What has not happened is there too, so that a rate knows the first call of a kind.
	if got := x.callSeries("GetSecret"); len(got) != 21 {
		t.Errorf("got series %v, want 4 and one for each of 17 codes", got)
	}
	x.wantCallSeries("GetSecret", map[string]float64{})
	get := func(c secretsv1.SecretsBrokerServiceClient, id string) error {
		_, err := c.GetSecret(x.ctx, &secretsv1.GetSecretRequest{Ref: ref(id, uriKind)})
		return err
	}
	for range 2 {
		if err := get(x.c, "demo"); err != nil {
			t.Fatal(err)
		}
	}
	wantReason(t, get(x.c, "other"), secret.SecretNotFound, "")
	wantReason(t, get(x.as("stranger"), "demo"), secret.CallerUnknown, "")
	x.wantCallSeries("GetSecret", map[string]float64{
		"started_total unary": 4, "msg_received_total unary": 4, "msg_sent_total unary": 2, "handling_seconds unary": 4,
		"handled_total unary OK": 2, "handled_total unary NotFound": 1, "handled_total unary Unauthenticated": 1,
	})
}

func TestStreamsAreCounted(t *testing.T) {
	t.Parallel()
	x := startSystem(t).in(t, "demo", "active")
	w := x.watch()
	w.next()
	open := map[string]float64{"started_total server_stream": 1, "msg_received_total server_stream": 1, "msg_sent_total server_stream": 1}
	eventually(t, "the first message is counted", func() bool { return x.callSeries("WatchSecrets")["msg_sent_total server_stream"] == 1 })
	x.wantCallSeries("WatchSecrets", open)
	w.end()
	eventually(t, "the end is counted", func() bool { return x.callSeries("WatchSecrets")["handled_total server_stream Canceled"] == 1 })
}
