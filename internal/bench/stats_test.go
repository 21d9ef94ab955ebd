package main

import (
	"bytes"
	"math"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

func TestSpread(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		values []float64
		want   spread
	}{
		{[]float64{3}, spread{3, 3, 3}},
		{[]float64{9, 1, 2}, spread{2, 1, 9}},
		{[]float64{4, 1, 2, 9}, spread{3, 1, 9}},
	} {
		if got := spreadOf(test.values); got != test.want {
			t.Errorf("%v: got %v, want %v", test.values, got, test.want)
		}
	}
}

// TestRatios has rounds in which the machine was busy with something else: the
// ratio of the medians would be 4.
func TestRatios(t *testing.T) {
	t.Parallel()
	rounds := []pair{
		{sample{CPU: 2}, sample{CPU: 1}},
		{sample{CPU: 40}, sample{CPU: 10}},
		{sample{CPU: 4}, sample{CPU: 2}},
	}
	if got := ratios(rounds, cpu); got != (spread{2, 2, 4}) {
		t.Errorf("got %v, want the median of the rounds' own ratios", got)
	}
	if got := median(rounds, cpu); got != 4 {
		t.Errorf("got a median of %v, want 4", got)
	}
	if got := median(bases(rounds), cpu); got != 2 {
		t.Errorf("got a median of %v for what they are divided by, want 2", got)
	}
	d := durableResult{{storeSet, 1}: {30, 200, 50}, {boltBatch, 1}: {10, 100, 50}}
	if got := d.ratios(durableWay{storeSet, 1}, durableWay{boltBatch, 1}); got != (spread{2, 1, 3}) {
		t.Errorf("got %v, want the median of the rounds' own ratios", got)
	}
}

func TestLatencies(t *testing.T) {
	t.Parallel()
	for d := time.Duration(1); d < time.Minute; d += d/50 + 1 {
		b := bucket(d)
		if low, high := lowest(b), lowest(b+1); d < low || d >= high || high-low > max(1, d/sub) {
			t.Fatalf("%v is in the bucket from %v to %v", d, low, high)
		}
	}
	var half, all latencies
	for i := range 1000 {
		if i%2 == 0 {
			half.add(time.Duration(i+1) * time.Microsecond)
		} else {
			all.add(time.Duration(i+1) * time.Microsecond)
		}
	}
	all.merge(&half)
	all.add(-time.Second)
	all.add(24 * time.Hour)
	for share, want := range map[float64]float64{0.5: 500e-6, 0.99: 990e-6} {
		if got := all.quantile(share).Seconds(); math.Abs(got/want-1) > 0.01 {
			t.Errorf("%v: got %v s, want %v", share, got, want)
		}
	}
	if all.total != 1002 {
		t.Errorf("got %d latencies, want 1002", all.total)
	}
}

// TestRequests fills requests of each kind, and reads them as a server does.
func TestRequests(t *testing.T) {
	t.Parallel()
	for c, message := range map[call]proto.Message{
		cachedGet: &secretsv1.GetSecretRequest{}, coldGet: &secretsv1.GetSecretRequest{},
		verifyToken: &secretsv1.VerifyTokenRequest{}, put: &secretsv1.PutSecretRequest{},
	} {
		r, err := c.request(100)
		if err != nil {
			t.Fatal(err)
		}
		frame := bytes.Clone(r.Frame)
		r.fill(frame, 42, 0xabc)
		if err := proto.Unmarshal(frame[5:], message); err != nil {
			t.Fatalf("%v: %v", c, err)
		}
		var want proto.Message
		ref := &secretsv1.SecretRef{InstanceId: "bench-0000042", Kind: secretsv1.SecretKind_SECRET_KIND_DATABASE_URI}
		switch got := message.(type) {
		case *secretsv1.GetSecretRequest:
			want = &secretsv1.GetSecretRequest{Ref: ref, MaxStaleness: got.GetMaxStaleness()}
			if fresh := got.GetMaxStaleness() != nil; fresh != (c == coldGet) {
				t.Errorf("%v: got a bound of staleness: %v", c, fresh)
			}
		case *secretsv1.VerifyTokenRequest:
			want = &secretsv1.VerifyTokenRequest{InstanceId: "bench-0000042", Token: token("0000042")}
		case *secretsv1.PutSecretRequest:
			want = putRequest("0000042", "000000000abc")
		}
		if !proto.Equal(message, want) {
			t.Errorf("%v: got %v, want %v", c, message, want)
		}
	}
}
