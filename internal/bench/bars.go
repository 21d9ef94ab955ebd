package main

import (
	"fmt"
	"math"
)

// bar is what is asked of the broker, and what was measured.
type bar struct {
	of    string
	limit string
	got   string
	holds string
}

// atMost and atLeast judge the median of a ratio, as it is shown.
func atMost(of string, got spread, most float64) bar {
	return bar{of, fmt.Sprintf("at most %.2f", most), got.String(), yesOrNo(shown(got.Median) <= most)}
}

func atLeast(of string, got spread, least float64) bar {
	return bar{of, fmt.Sprintf("at least %.2f", least), got.String(), yesOrNo(shown(got.Median) >= least)}
}

func shown(ratio float64) float64 { return math.Round(ratio*100) / 100 }

func yesOrNo(holds bool) string {
	if holds {
		return "yes"
	}
	return "**no**"
}

// The bars. cpuAim is what is striven for beyond the bar.
const (
	cpuBar    = 1.00
	cpuAim    = 0.80
	auditBar  = 1.15
	floodBar  = 3.00
	batchBar  = 2.00
	updateBar = 0.85
	startBar  = 2.0 // seconds
	coldBar   = 3.00

	cpuCallers = 64
	sizeOfBar  = 1_000_000
)

// speedCallers are the numbers of callers with which the broker is to be as fast as
// the floor.
var speedCallers = []int{16, 256}

// bars are all of them, in the order of the sections.
func (r *report) bars() (all []bar) {
	for _, c := range []call{cachedGet, verifyToken} {
		cost := ratios(r.of(c, cpuCallers).rounds, cpu)
		b := atMost(fmt.Sprintf("CPU of a %v ÷ the floor's, %d callers", c, cpuCallers), cost, cpuBar)
		b.limit += fmt.Sprintf(", aim %.2f", cpuAim)
		if shown(cost.Median) <= cpuAim {
			b.holds += ", and the aim"
		}
		all = append(all, b)
	}
	for _, c := range []call{cachedGet, verifyToken} {
		for _, callers := range speedCallers {
			rounds := r.of(c, callers).rounds
			all = append(all,
				atLeast(fmt.Sprintf("%vs a second ÷ the floor's, %d callers", c, callers), ratios(rounds, rate), 1),
				atMost(fmt.Sprintf("p99 of a %v ÷ the floor's, %d callers", c, callers), ratios(rounds, p99), 1))
		}
	}
	for _, c := range auditedCalls {
		all = append(all, atMost(fmt.Sprintf("CPU of a %v with its record ÷ without, %d callers", c, cpuCallers), ratios(r.audit[c], cpu), auditBar))
	}
	all = append(all,
		atMost(fmt.Sprintf("p99 of a cached Get under a flood of Puts ÷ without, %d callers", floodCallers), ratios(r.flood.rounds, p99), floodBar),
		atLeast(fmt.Sprintf("Sets a second ÷ bbolt's Batch, %d callers", durableMany),
			r.durable.ratios(durableWay{storeSet, durableMany}, durableWay{boltBatch, durableMany}), batchBar),
		atLeast("Sets a second ÷ bbolt's Update, one caller",
			r.durable.ratios(durableWay{storeSet, durableFew}, durableWay{boltUpdate, durableFew}), updateBar))
	for _, s := range r.sizes {
		if s.secrets != sizeOfBar {
			continue
		}
		all = append(all,
			bar{fmt.Sprintf("start on a store of %s secrets", count(s.secrets)), fmt.Sprintf("less than %.0f s", startBar), seconds(s.start.Seconds()), yesOrNo(s.start.Seconds() < startBar)},
			atMost(fmt.Sprintf("CPU of a cold Get among %s secrets ÷ among %s", count(s.secrets), count(r.sizes[0].secrets)), ratios(s.cold, cpu), coldBar),
			atMost(fmt.Sprintf("p50 of a cold Get among %s secrets ÷ among %s", count(s.secrets), count(r.sizes[0].secrets)), ratios(s.cold, p50), coldBar))
	}
	return all
}
