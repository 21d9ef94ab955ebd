package main

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"text/template"
	"time"

	"github.com/exto/secrets-broker/internal/devdir"
)

// report is all that a run measured.
type report struct {
	plan
	date    time.Time
	fsync   time.Duration
	calls   []callResult
	audit   map[call][]pair // with the audit log, beside without
	flood   floodResult
	durable durableResult
	sizes   []sizeResult
}

var (
	//go:embed performance.tmpl
	pageText string
	page     = template.Must(template.New("performance.md").Parse(pageText))
)

// of is the result of one kind of call.
func (r *report) of(c call, callers int) callResult {
	for _, result := range r.calls {
		if result.call == c && result.callers == callers {
			return result
		}
	}
	return callResult{}
}

// tables are the whole report, under the names by which the page has them.
func (r *report) tables() (names []string, tables map[string]*table) {
	tables = map[string]*table{
		"Calls": r.callTable(), "Figures": r.figureTable(), "Flood": r.floodTable(),
		"Durable": r.durableTable(), "Sizes": r.sizeTable(), "Gets": r.getTable(), "Bars": r.barTable(),
	}
	return []string{"Calls", "Figures", "Flood", "Durable", "Sizes", "Gets", "Bars"}, tables
}

func (r *report) text(w io.Writer) error {
	_, err := fmt.Fprintln(w, r.machine())
	names, tables := r.tables()
	for _, name := range names {
		_, failed := io.WriteString(w, tables[name].text())
		err = errors.Join(err, failed)
	}
	return err
}

// document writes the page and its chart.
func (r *report) document(dir string) error {
	_, tables := r.tables()
	var text bytes.Buffer
	err := page.Execute(&text, map[string]any{
		"Machine": r.machine(), "Rounds": r.rounds, "Window": r.window, "StoreWindow": r.storeWindow, "Warm": r.warm,
		"Instances": count(instances), "Connections": mostConnections, "FloodCallers": floodCallers,
		"SizeCallers": sizeCallers, "SizeRounds": sizeRounds, "Hot": count(hotSecrets), "Tables": tables,
	})
	if err != nil {
		return err
	}
	return errors.Join(
		devdir.WriteFile(filepath.Join(dir, "performance.md"), text.Bytes(), 0o644),
		devdir.WriteFile(filepath.Join(dir, "performance.svg"), r.chart(), 0o644))
}

// machine says where the figures are from, and names nobody.
func (r *report) machine() string {
	return fmt.Sprintf("%d cores, %s/%s, %s, %s; a write of 4 KiB with its fsync takes %s",
		runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, runtime.Version(), r.date.UTC().Format(time.DateOnly), seconds(r.fsync.Seconds()))
}

func (r *report) callTable() *table {
	t := &table{
		title:  "Calls, divided by the floor's of the same round: median of the rounds (least–greatest)",
		header: []string{"call", "callers", "server CPU", "calls/s", "p50", "p99", "allocated"},
	}
	for _, c := range r.calls {
		row := []string{c.call.String(), fmt.Sprint(c.callers)}
		for _, figure := range []func(sample) float64{cpu, rate, p50, p99, allocated} {
			row = append(row, ratios(c.rounds, figure).String())
		}
		t.add(row...)
	}
	return t
}

func (r *report) figureTable() *table {
	t := &table{
		title:  "The same as figures: medians of the rounds",
		header: []string{"call", "callers", "calls/s", "p50", "p99", "server CPU", "allocated"},
	}
	figures := func(name string, callers int, rounds []pair) {
		t.add(name, fmt.Sprint(callers), fmt.Sprintf("%.0f", median(rounds, rate)), seconds(median(rounds, p50)), seconds(median(rounds, p99)),
			seconds(median(rounds, cpu)), kilobytes(median(rounds, allocated)))
	}
	for _, floor := range []struct {
		name string
		call call
	}{{"floor, Get", cachedGet}, {"floor, VerifyToken", verifyToken}} {
		for _, callers := range callerCounts {
			figures(floor.name, callers, bases(r.of(floor.call, callers).rounds))
		}
	}
	for _, c := range r.calls {
		figures(c.call.String(), c.callers, c.rounds)
	}
	return t
}

func (r *report) floodTable() *table {
	t := &table{
		title:  fmt.Sprintf("Cached Gets of %d callers, with and without a flood of durable Puts by as many others", floodCallers),
		header: []string{"", "Gets/s", "p50", "p99", "p99 ÷ alone", "Puts/s"},
	}
	row := func(name string, rounds []pair, rest ...string) {
		t.add(append([]string{name, fmt.Sprintf("%.0f", median(rounds, rate)), seconds(median(rounds, p50)), seconds(median(rounds, p99))}, rest...)...)
	}
	row("alone", bases(r.flood.rounds), "", "")
	row("under the flood", r.flood.rounds, ratios(r.flood.rounds, p99).String(), fmt.Sprintf("%.0f", spreadOf(r.flood.puts).Median))
	return t
}

func (r *report) durableTable() *table {
	t := &table{
		title:  "Durable puts a second by the embedded store's own Set, beside bbolt's Update and Batch",
		header: []string{"callers", "Set/s", "Update/s", "Batch/s", "Set ÷ Update", "Set ÷ Batch"},
	}
	for _, callers := range []int{durableFew, durableMany} {
		set := durableWay{storeSet, callers}
		row := []string{fmt.Sprint(callers)}
		for _, name := range []string{storeSet, boltUpdate, boltBatch} {
			row = append(row, fmt.Sprintf("%.0f", spreadOf(r.durable[durableWay{name, callers}]).Median))
		}
		for _, name := range []string{boltUpdate, boltBatch} {
			row = append(row, r.durable.ratios(set, durableWay{name, callers}).String())
		}
		t.add(row...)
	}
	return t
}

func (r *report) sizeTable() *table {
	t := &table{
		title:  "A broker on an embedded store, by its number of secrets",
		header: []string{"secrets", "file", "filled in", "starts in", "memory then", "cold Gets", "memory after them"},
	}
	for _, s := range r.sizes {
		t.add(count(s.secrets), megabytes(s.file), seconds(s.fill.Seconds()), seconds(s.start.Seconds()), s.afterStart.String(), count(s.reads), s.afterReads.String())
	}
	return t
}

func (r *report) getTable() *table {
	first := "÷ among " + count(r.sizes[0].secrets)
	t := &table{
		title:  fmt.Sprintf("Gets of %d callers on such a store", sizeCallers),
		header: []string{"secrets", "cold Get, CPU", first, "p50", first, "cached Get, CPU", "p50"},
	}
	for _, s := range r.sizes {
		t.add(count(s.secrets),
			seconds(median(s.cold, cpu)), ratios(s.cold, cpu).String(), seconds(median(s.cold, p50)), ratios(s.cold, p50).String(),
			seconds(median(s.cached, cpu)), seconds(median(s.cached, p50)))
	}
	return t
}

func (r *report) barTable() *table {
	t := &table{title: "Bars", header: []string{"what", "bar", "measured", "holds"}}
	for _, b := range r.bars() {
		t.add(b.of, b.limit, b.got, b.holds)
	}
	return t
}

// String is the memory, and what of it is not pages of the store's file, which the
// kernel takes back when it needs them.
func (f footprint) String() string {
	return fmt.Sprintf("%s (%s)", megabytes(f.resident), megabytes(f.anonymous))
}

// bases are the rounds of what the others are divided by.
func bases(rounds []pair) []pair {
	all := make([]pair, len(rounds))
	for i, p := range rounds {
		all[i] = pair{p.base, p.base}
	}
	return all
}
