package server_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
)

// TestUnknownInstanceAndWrongTokenAreAlike: nobody learns from the answer, nor from
// what it costs, which instances there are.
func TestUnknownInstanceAndWrongTokenAreAlike(t *testing.T) {
	t.Parallel()
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		for name, tt := range map[string]struct {
			cold   bool
			age    time.Duration
			fails  error
			answer string
			want   []string
		}{
			"cold":                     {cold: true, answer: noMatch, want: []string{"Get"}},
			"younger than 2 s":         {age: time.Second, answer: noMatch},
			"of 2 s":                   {age: 2 * time.Second, answer: noMatch},
			"older than 2 s":           {age: 2*time.Second + 1, answer: noMatch, want: []string{"Get"}},
			"older than 5 s":           {age: 6 * time.Second, answer: noMatch, want: []string{"Get"}},
			"older than the bound":     {age: pastBound, answer: noMatch, want: []string{"Get"}},
			"cold in an outage":        {cold: true, fails: vault.ErrUnavailable, answer: "VAULT_UNAVAILABLE", want: []string{"Get"}},
			"younger in an outage":     {age: time.Second, fails: vault.ErrUnavailable, answer: noMatch},
			"older in an outage":       {age: 3 * time.Second, fails: vault.ErrUnavailable, answer: noMatch, want: []string{"Get"}},
			"the broker is refused":    {age: 3 * time.Second, fails: vault.ErrRefused, answer: "VAULT_REFUSED", want: []string{"Get"}},
			"the vault is overwhelmed": {age: 3 * time.Second, fails: vault.ErrThrottled, answer: noMatch, want: []string{"Get"}},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				x, _ := start(t).instance(t, "demo", "active")
				x.cold()
				for _, y := range []*subject{x, x.token(t, "unknown")} {
					if !tt.cold {
						y.wantVerify(wrong, noMatch)
					}
					x.clock.advance(tt.age)
					x.vault.SetBefore(func(context.Context, string, secret.Key) error { return tt.fails })
					if got := y.lookups(func() { y.wantVerify(wrong, tt.answer) }); !reflect.DeepEqual(got, tt.want) {
						t.Errorf("%s: the vault was asked for %v, want %v", y.key, got, tt.want)
					}
					x.vault.SetBefore(nil)
				}
			})
		}
	})
}

// TestLooksThatCross: wherever a call is when another one's look ends, it goes by what
// that found, and does not ask again.
func TestLooksThatCross(t *testing.T) {
	t.Parallel()
	// Before it asks, a call looks at the clock so often.
	for name, looks := range map[string]int64{"second look": 6, "cold": 3} {
		for n := range looks {
			t.Run(fmt.Sprintf("%s, %d", name, n), func(t *testing.T) {
				t.Parallel()
				s := newSystem(t)
				var looked atomic.Int64
				held, release := make(chan struct{}), make(chan struct{})
				s.heart = func(c *broker.Config) {
					now := c.Now
					c.Now = func() time.Time {
						if looked.Add(1) == n+1 {
							close(held)
							<-release
						}
						return now()
					}
				}
				looked.Store(100)
				s.startEmbedded()
				x, _ := s.instance(t, "demo", "active")
				x.cold()
				if name != "cold" {
					x.wantVerify(wrong, noMatch)
				}
				x.setOutside("new")
				x.clock.advance(2 * time.Second)
				got := x.lookups(func() {
					ended := make(chan struct{})
					looked.Store(0)
					go func() { x.wantVerify("new", "MATCH_CURRENT/0"); close(ended) }()
					select {
					case <-held:
					case <-ended:
					}
					x.wantVerify(wrong, noMatch)
					close(release)
					<-ended
				})
				if len(got) != 1 {
					t.Errorf("the vault was asked for %v, want one Get", got)
				}
			})
		}
	}
}

// TestVerifyTiming measures how long tokens take that match and that do not, all of them
// from memory, in the heart and over the wire, and prints how well the times tell which
// is which. It asserts nothing of them; it runs when BROKER_TEST_TIMING is set.
//
// In each round there is one call of each kind, in random order, for one of the kind's
// own 40 instances. D is the greatest distance of two distributions (Kolmogorov–Smirnov),
// and AUC how often a call of the first kind took longer than one of the second, ties
// counting half (Mann–Whitney): 0.5 tells nothing. What the machine's noise makes of two
// kinds that are the same is seen from "again".
func TestVerifyTiming(t *testing.T) {
	if os.Getenv("BROKER_TEST_TIMING") == "" {
		t.Skip("BROKER_TEST_TIMING is not set")
	}
	const instances, right, unknown = 40, 0, 5
	token := "timing-" + strings.Repeat("t", 51)
	kinds := []struct{ name, token string }{
		right:   {"right", token},
		1:       {"wrong", "timing-" + strings.Repeat("u", 51)},
		2:       {"wrong again", "timing-" + strings.Repeat("v", 51)},
		3:       {"wrong first byte", "u" + token[1:]},
		4:       {"wrong last byte", token[:57] + "u"},
		unknown: {"unknown instance", token},
		6:       {"unknown again", token},
	}
	x := startSystem(t).token(t, "nobody")
	heart := broker.New(broker.Config{Vault: x.store, Logger: x.logger(), Now: x.clock.Now})
	defer heart.Close(context.Background())
	keys := make([][]secret.Key, len(kinds))
	for k := range kinds {
		for i := range instances {
			at := key(t, fmt.Sprintf("kind-%d-instance-%02d", k, i), secret.RegistrationToken)
			keys[k] = append(keys[k], at)
			if k < unknown {
				if _, err := x.store.Set(x.ctx, at, vault.NewVersion{Value: secret.NewValue(token)}); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	measure := func(name string, rounds int, verify func(at secret.Key, token string) (broker.VerifyResult, error)) {
		took := make([][]time.Duration, len(kinds))
		for round := range rounds + rounds/10 { // the first tenth is to warm up
			for _, k := range rand.Perm(len(kinds)) {
				at := keys[k][rand.IntN(instances)]
				begun := time.Now()
				result, err := verify(at, kinds[k].token)
				d := time.Since(begun)
				if err != nil || (result == broker.MatchCurrent) != (k == right) {
					t.Fatalf("%s: got %v, %v", kinds[k].name, result, err)
				}
				if round >= rounds/10 {
					took[k] = append(took[k], d)
				}
			}
		}
		w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintf(w, "\n%s, %d calls of each kind\tmedian\tp99\t\n", name, rounds)
		for k := range kinds {
			slices.Sort(took[k])
			fmt.Fprintf(w, "%s\t%v\t%v\t\n", kinds[k].name, took[k][rounds/2], took[k][rounds*99/100])
		}
		fmt.Fprintf(w, "\npair\tmedians apart\tD\tAUC\t\n")
		for _, pair := range [][2]int{{1, 2}, {5, 6}, {1, 5}, {3, 4}, {0, 1}, {0, 4}} {
			a, b := took[pair[0]], took[pair[1]]
			d, auc := apart(a, b)
			fmt.Fprintf(w, "%s, %s\t%v\t%.4f\t%.4f\t\n", kinds[pair[0]].name, kinds[pair[1]].name, a[rounds/2]-b[rounds/2], d, auc)
		}
		_ = w.Flush()
		fmt.Printf("of equal kinds, D is below %.4f in 99 of 100 runs\n", 1.628*math.Sqrt(2/float64(rounds)))
	}
	measure("heart", 200_000, func(at secret.Key, token string) (broker.VerifyResult, error) {
		v, err := heart.Verify(x.ctx, broker.Call{Caller: consoleAPI}, at, secret.NewValue(token))
		return v.Result, err
	})
	measure("wire", 20_000, func(at secret.Key, token string) (broker.VerifyResult, error) {
		out, err := x.c.VerifyToken(x.ctx, &secretsv1.VerifyTokenRequest{InstanceId: at.InstanceID().String(), Token: token})
		return broker.VerifyResult(out.GetResult()), err
	})
}

// apart compares two sorted samples.
func apart(a, b []time.Duration) (d, auc float64) {
	share := func(s []time.Duration, v time.Duration) float64 { // below v
		at, _ := slices.BinarySearch(s, v)
		return float64(at) / float64(len(s))
	}
	for _, v := range a {
		auc += (share(b, v) + share(b, v+1)) / 2 / float64(len(a))
	}
	for _, v := range slices.Concat(a, b) {
		d = max(d, math.Abs(share(a, v+1)-share(b, v+1)))
	}
	return d, auc
}
