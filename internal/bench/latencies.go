package main

import (
	"math/bits"
	"time"
)

// Latencies are counted in buckets that are 1/128 of their value wide.
const (
	subBits = 7
	sub     = 1 << subBits
	buckets = sub * 32 // the last begins at 2^37 ns, over two minutes
)

// latencies is a histogram. Its zero value is ready.
type latencies struct {
	counts [buckets]uint64
	total  uint64
}

func (l *latencies) add(d time.Duration) {
	l.counts[bucket(d)]++
	l.total++
}

func (l *latencies) merge(other *latencies) {
	for i, n := range other.counts {
		l.counts[i] += n
	}
	l.total += other.total
}

// quantile is the middle of the bucket in which that share of the calls ends; 0
// without calls.
func (l *latencies) quantile(share float64) time.Duration {
	var seen uint64
	for i, n := range l.counts {
		if seen += n; n > 0 && float64(seen) >= share*float64(l.total) {
			low, high := lowest(i), lowest(i+1)
			return low + (high-low)/2
		}
	}
	return 0
}

// bucket counts exactly below sub, and by the first bits of the value above.
func bucket(d time.Duration) int {
	if d < sub {
		return int(max(d, 0))
	}
	shift := bits.Len64(uint64(d)) - subBits - 1
	return min(shift*sub+int(d>>shift), buckets-1)
}

// lowest is the least value of a bucket.
func lowest(bucket int) time.Duration {
	if bucket < 2*sub {
		return time.Duration(bucket)
	}
	shift := bucket/sub - 1
	return time.Duration(bucket-shift*sub) << shift
}
