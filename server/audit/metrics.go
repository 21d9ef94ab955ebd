package audit

import (
	"math"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	intents, outcomes, calls, counts, systems prometheus.Counter
	batches, failures, fsyncs                 prometheus.Counter
}

func newMetrics(l *Log) *metrics {
	with := promauto.With(l.cfg.Metrics)
	counter := func(name, help string) prometheus.Counter {
		return with.NewCounter(prometheus.CounterOpts{Name: "secrets_broker_audit_" + name, Help: help})
	}
	gauge := func(name, help string, value func() float64) {
		with.NewGaugeFunc(prometheus.GaugeOpts{Name: "secrets_broker_audit_" + name, Help: help}, value)
	}
	records := with.NewCounterVec(prometheus.CounterOpts{Name: "secrets_broker_audit_records_total", Help: "Lines written to the audit log."}, []string{"type"})
	of := func(t Type) prometheus.Counter { return records.WithLabelValues(string(t)) }
	gauge("open_intents", "Mutations in the audit log without an outcome yet.", func() float64 {
		l.mu.Lock()
		defer l.mu.Unlock()
		return float64(len(l.open))
	})
	gauge("available", "1 while the audit log can be written, else 0.", func() float64 {
		if l.Check() != nil {
			return 0
		}
		return 1
	})
	if l.onFile() {
		gauge("file_bytes", "Size of the present file of the audit log.", func() float64 { return float64(l.fileSize.Load()) })
		gauge("free_bytes", "Bytes left on the file system of the audit log.", func() float64 {
			bytes, err := l.free()
			if err != nil {
				return math.NaN()
			}
			return float64(bytes)
		})
	}
	return &metrics{
		of(TypeIntent), of(TypeOutcome), of(TypeCall), of(TypeCount), of(TypeSystem),
		counter("batches_total", "Writes to the audit log; each is of all records that were waiting."),
		counter("failures_total", "Writes and fsyncs of the audit log that failed."),
		counter("fsyncs_total", "Fsyncs of the audit log; each is of all intents that were waiting."),
	}
}

func (m *metrics) record(t Type) {
	switch t {
	case TypeIntent:
		m.intents.Inc()
	case TypeOutcome:
		m.outcomes.Inc()
	case TypeCount:
		m.counts.Inc()
	case TypeSystem:
		m.systems.Inc()
	default:
		m.calls.Inc()
	}
}
