package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// order is what a load process is to do: one line of JSON on its standard input.
type order struct {
	Address string
	Dir     string // of the certificates
	Request request
	Callers int
	Warm    time.Duration // before the window
	Window  time.Duration // 0: until standard input ends
	Process int           // of the server
	Metrics string        // where the server tells its metrics
}

// sample is what a load process says at its end: one line of JSON. Before it,
// when the window begins, comes an empty line.
type sample struct {
	Rate      float64 // calls a second
	P50, P99  float64 // seconds
	CPU       float64 // of the server, seconds for a call
	Allocated float64 // by the server, bytes for a call
}

// runLoad is the load process: apart from the server, so that what it costs is
// not counted.
func runLoad(ctx context.Context, in io.Reader, out io.Writer) error {
	lines := bufio.NewReader(in)
	line, err := lines.ReadBytes('\n')
	if err != nil {
		return err
	}
	var o order
	if err := json.Unmarshal(line, &o); err != nil {
		return err
	}
	// Whoever gave the order ends the load by closing standard input, or by its own
	// end: in time where there is no window, else too early.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	released := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, lines)
		close(released)
		if o.Window > 0 {
			cancel()
		}
	}()

	result, err := o.execute(ctx, released, func() error {
		_, err := fmt.Fprintln(out)
		return err
	})
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(result)
}

// execute warms the server up, calls begun, and measures. Without a window it goes
// on until released, and the sample has its rate alone.
func (o order) execute(ctx context.Context, released <-chan struct{}, begun func() error) (s sample, err error) {
	l, err := dial(ctx, o.Address, o.Dir, o.Request, o.Callers)
	if err != nil {
		return s, err
	}
	defer l.close()
	var told float64 // bytes that telling the metrics allocates
	if o.Window > 0 {
		if told, err = o.scrapeCost(ctx); err != nil {
			return s, err
		}
	}
	l.start(ctx)
	// After a failure there is nothing to wait for, and stop says what it was.
	if wait(l.failed, time.After(o.Warm)) {
		if err = begun(); err == nil && o.Window == 0 {
			calls, at := l.answered(), time.Now()
			wait(l.failed, released)
			s.Rate = float64(l.answered()-calls) / time.Since(at).Seconds()
		} else if err == nil {
			s, err = o.measure(l, told)
		}
	}
	if err = errors.Join(l.stop(), err); err != nil {
		return sample{}, err
	}
	if o.Window > 0 {
		all := l.latencies()
		s.P50, s.P99 = all.quantile(0.50).Seconds(), all.quantile(0.99).Seconds()
	}
	return s, nil
}

// wait reports whether the event came before the end of ctx.
func wait[T any](ctx context.Context, event <-chan T) bool {
	select {
	case <-event:
		return true
	case <-ctx.Done():
		return false
	}
}

// mark is what has been used up to a moment.
type mark struct {
	at    time.Time
	calls int64
	cpu   time.Duration
}

func markOf(process int, l *load) (mark, error) {
	used, err := cpuTime(process)
	return mark{time.Now(), l.answered(), used}, err
}

// measure is all of a sample but the latencies. What the server allocated it tells
// itself, which takes it a while: the answers up to then are counted for that
// alone, and the CPU time of it is outside of the window.
func (o order) measure(l *load, told float64) (s sample, err error) {
	ctx := l.failed
	allocatedBefore, err := o.allocated(ctx)
	if err != nil {
		return s, err
	}
	answersBefore := l.answered()
	before, err := markOf(o.Process, l)
	if err != nil {
		return s, err
	}
	l.measuring.Store(true)
	wait(ctx, time.After(o.Window))
	l.measuring.Store(false)
	after, err := markOf(o.Process, l)
	if err != nil {
		return s, err
	}
	allocatedAfter, err := o.allocated(ctx)
	if err != nil {
		return s, err
	}
	calls := float64(after.calls - before.calls)
	if calls < 1 {
		return s, errors.New("no call ended in the measured window")
	}
	s.Rate = calls / after.at.Sub(before.at).Seconds()
	s.CPU = (after.cpu - before.cpu).Seconds() / calls
	s.Allocated = max(0, allocatedAfter-allocatedBefore-told) / float64(l.answered()-answersBefore)
	return s, nil
}

// scrapeCost is what the server allocates to tell its metrics, while nobody calls.
// The first times cost more.
func (o order) scrapeCost(ctx context.Context) (float64, error) {
	var told [4]float64
	for i := range told {
		var err error
		if told[i], err = o.allocated(ctx); err != nil {
			return 0, err
		}
	}
	return told[3] - told[2], nil
}

// metricsClient asks no proxy that the environment names.
var metricsClient = &http.Client{Transport: &http.Transport{DisableCompression: true}}

// allocated is how many bytes the server has allocated so far.
func (o order) allocated(ctx context.Context) (float64, error) {
	const metric = "go_memstats_alloc_bytes_total "
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+o.Metrics+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := metricsClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("the server's metrics: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, fmt.Errorf("the server's metrics: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, metric); ok {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, errors.New("the server's metrics: no " + metric)
}
