package main

import "slices"

// spread is what several rounds gave.
type spread struct{ Median, Min, Max float64 }

// spreadOf needs at least one value. The median of an even number of them is
// between the two in the middle.
func spreadOf(values []float64) spread {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return spread{(sorted[(n-1)/2] + sorted[n/2]) / 2, sorted[0], sorted[n-1]}
}

// each is one figure of every round.
func each[T any](rounds []T, figure func(T) float64) []float64 {
	figures := make([]float64, len(rounds))
	for i, r := range rounds {
		figures[i] = figure(r)
	}
	return figures
}

// pair is what two servers gave in one round, one right after the other: whatever
// else the machine had to do, it had for both.
type pair struct{ subject, base sample }

// ratios divides the subject's figure by the base's in each round.
func ratios(rounds []pair, figure func(sample) float64) spread {
	return spreadOf(each(rounds, func(p pair) float64 { return figure(p.subject) / figure(p.base) }))
}

// median of the subject's figure.
func median(rounds []pair, figure func(sample) float64) float64 {
	return spreadOf(each(rounds, func(p pair) float64 { return figure(p.subject) })).Median
}

// The figures of a sample.
func rate(s sample) float64      { return s.Rate }
func p50(s sample) float64       { return s.P50 }
func p99(s sample) float64       { return s.P99 }
func cpu(s sample) float64       { return s.CPU }
func allocated(s sample) float64 { return s.Allocated }
