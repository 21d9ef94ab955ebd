package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/devdir"
)

// instances are how many have secrets that the calls ask for.
const instances = 1024

// floodCallers put, and as many read, when reads are measured under a flood.
const floodCallers = 64

var callerCounts = []int{1, 16, 64, 256}

// callResult is what one kind of call gave, beside the floor's.
type callResult struct {
	call    call
	callers int
	rounds  []pair
}

// floodResult is what cached Gets gave under a flood of puts, beside those without.
type floodResult struct {
	rounds []pair
	puts   []float64 // a second
}

// callTargets are the servers that calls are measured on.
type callTargets struct {
	floor, embedded, keyVault *target
	recorded, unrecorded      *target // like embedded, but nobody puts
	stop                      func()
}

// startTargets starts and fills the servers. The floor is the last, since it
// answers what the broker does.
func (b *bench) startTargets(ctx context.Context) (t callTargets, err error) {
	var running []*child
	t.stop = func() {
		for _, c := range slices.Backward(running) {
			c.stop()
		}
	}
	defer func() {
		if err != nil {
			t.stop()
		}
	}()
	if err := devdir.Prepare(b.dir, time.Now()); err != nil {
		return t, err
	}
	if t.embedded, err = startBroker(ctx, b.broker, b.dir, embeddedStore(filepath.Join(b.dir, "calls"))...); err != nil {
		return t, err
	}
	running = append(running, t.embedded.child)
	fake, settings, err := startFake(ctx, b.dir)
	if err != nil {
		return t, err
	}
	running = append(running, fake)
	if t.keyVault, err = startBroker(ctx, b.broker, b.dir, settings...); err != nil {
		return t, err
	}
	running = append(running, t.keyVault.child)
	if t.recorded, err = startBroker(ctx, b.broker, b.dir, embeddedStore(filepath.Join(b.dir, "recorded"))...); err != nil {
		return t, err
	}
	running = append(running, t.recorded.child)
	if t.unrecorded, err = startBroker(ctx, b.unrecorded, b.dir, embeddedStore(filepath.Join(b.dir, "unrecorded"))...); err != nil {
		return t, err
	}
	running = append(running, t.unrecorded.child)
	for _, filled := range []*target{t.embedded, t.keyVault, t.recorded, t.unrecorded} {
		if err := filled.fill(ctx, instances); err != nil {
			return t, err
		}
	}
	if err := t.embedded.takeAnswers(ctx); err != nil {
		return t, err
	}
	if t.floor, err = startFloor(ctx, b.dir); err != nil {
		return t, err
	}
	running = append(running, t.floor.child)
	return t, nil
}

// takeAnswers keeps a broker's answers for the floor. It is an error if they are
// not what is to be measured.
func (t *target) takeAnswers(ctx context.Context) error {
	client, done, err := t.client()
	if err != nil {
		return err
	}
	defer done()
	var got *secretsv1.GetSecretResponse
	for range 2 { // the first may be what fills the broker's memory
		got, err = client.GetSecret(ctx, &secretsv1.GetSecretRequest{
			Ref: &secretsv1.SecretRef{InstanceId: instance(digits(0)), Kind: secretsv1.SecretKind_SECRET_KIND_DATABASE_URI},
		})
		if err != nil {
			return err
		}
	}
	if source := got.GetFreshness().GetSource(); source != secretsv1.FreshnessSource_FRESHNESS_SOURCE_CACHE {
		return fmt.Errorf("a Get that is to be answered from the broker's memory has %v", source)
	}
	verified, err := client.VerifyToken(ctx, &secretsv1.VerifyTokenRequest{InstanceId: instance(digits(0)), Token: token(digits(0))})
	if err != nil {
		return err
	}
	if result := verified.GetResult(); result != secretsv1.VerifyResult_VERIFY_RESULT_MATCH_CURRENT {
		return fmt.Errorf("the right token has %v", result)
	}
	if err := writeAnswer(t.dir, floorGetFile, got); err != nil {
		return err
	}
	return writeAnswer(t.dir, floorVerifyFile, verified)
}

// warmUp has each server answer all that will be asked of it, so that the first
// round is like the others.
func (b *bench) warmUp(ctx context.Context, t callTargets) error {
	for _, s := range []step{
		{on: t.floor, call: cachedGet}, {on: t.floor, call: verifyToken},
		{on: t.embedded, call: cachedGet}, {on: t.embedded, call: verifyToken}, {on: t.embedded, call: put},
		{on: t.recorded, call: cachedGet}, {on: t.recorded, call: verifyToken},
		{on: t.unrecorded, call: cachedGet}, {on: t.unrecorded, call: verifyToken},
		{on: t.keyVault, call: coldGet},
	} {
		if err := s.run(ctx, b, callerCounts[len(callerCounts)-1]); err != nil {
			return err
		}
	}
	return nil
}

// step is one window: a call of one server.
type step struct {
	on     *target
	call   call
	sample sample
}

func (s *step) run(ctx context.Context, b *bench, callers int) error {
	r, err := s.call.request(instances)
	if err != nil {
		return err
	}
	if s.sample, err = s.on.load(ctx, r, callers, b.warm, b.window); err != nil {
		return fmt.Errorf("%v of %s, %d callers: %w", s.call, s.on.name, callers, err)
	}
	return nil
}

// measureCalls measures every kind of call with every number of callers, round
// after round.
func (b *bench) measureCalls(ctx context.Context, t callTargets) ([]callResult, error) {
	var results []callResult
	for _, c := range []call{cachedGet, verifyToken, coldGet, put} {
		for _, callers := range callerCounts {
			results = append(results, callResult{call: c, callers: callers})
		}
	}
	for round := range b.rounds {
		for _, callers := range callerCounts {
			b.say("calls: round %d of %d, %d callers", round+1, b.rounds, callers)
			measured, err := b.measureRound(ctx, t, round, callers)
			if err != nil {
				return nil, err
			}
			for i, r := range results {
				if p, ok := measured[r.call]; ok && r.callers == callers {
					results[i].rounds = append(r.rounds, p)
				}
			}
		}
	}
	return results, nil
}

// measureRound measures each kind of call once. What is compared runs one right
// after the other, and in the other order in the next round. The calls that no bar
// is about come in every second round. They have no floor of their own, and are
// compared with the floor's Get.
func (b *bench) measureRound(ctx context.Context, t callTargets, round, callers int) (map[call]pair, error) {
	floorGet, floorVerify := &step{on: t.floor, call: cachedGet}, &step{on: t.floor, call: verifyToken}
	get, verify := &step{on: t.embedded, call: cachedGet}, &step{on: t.embedded, call: verifyToken}
	cold, puts := &step{on: t.keyVault, call: coldGet}, &step{on: t.embedded, call: put}
	order := []*step{floorGet, get, verify, floorVerify}
	if round%2 == 0 {
		order = append(order, cold, puts)
	} else {
		slices.Reverse(order)
	}
	for _, s := range order {
		if err := s.run(ctx, b, callers); err != nil {
			return nil, err
		}
	}
	pairs := map[call]pair{cachedGet: {get.sample, floorGet.sample}, verifyToken: {verify.sample, floorVerify.sample}}
	if round%2 == 0 {
		pairs[coldGet], pairs[put] = pair{cold.sample, floorGet.sample}, pair{puts.sample, floorGet.sample}
	}
	return pairs, nil
}

// auditedCalls are those that are measured with and without a record.
var auditedCalls = []call{cachedGet, verifyToken}

// measureAudit measures what the record of a call costs: a broker as it is, beside one
// that differs in nothing else, nor in what it was asked before.
func (b *bench) measureAudit(ctx context.Context, t callTargets) (map[call][]pair, error) {
	rounds := map[call][]pair{}
	for round := range b.rounds {
		b.say("calls with and without their records: round %d of %d", round+1, b.rounds)
		for _, c := range auditedCalls {
			with, without := &step{on: t.recorded, call: c}, &step{on: t.unrecorded, call: c}
			order := []*step{with, without}
			if round%2 == 1 {
				slices.Reverse(order)
			}
			for _, s := range order {
				if err := s.run(ctx, b, cpuCallers); err != nil {
					return nil, err
				}
			}
			rounds[c] = append(rounds[c], pair{with.sample, without.sample})
		}
	}
	return rounds, nil
}

// measureFlood measures cached Gets while other callers put as fast as they can,
// and without those.
func (b *bench) measureFlood(ctx context.Context, t callTargets) (result floodResult, err error) {
	reads, err := cachedGet.request(instances)
	if err != nil {
		return result, err
	}
	puts, err := put.request(instances)
	if err != nil {
		return result, err
	}
	for round := range b.rounds {
		b.say("reads under a flood of puts: round %d of %d", round+1, b.rounds)
		var p pair
		quiet := func() error {
			p.base, err = t.embedded.load(ctx, reads, floodCallers, b.warm, b.window)
			return err
		}
		flooded := func() error {
			flood, err := t.embedded.startLoad(ctx, puts, floodCallers, b.warm, 0)
			if err != nil {
				return err
			}
			defer flood.stop()
			if p.subject, err = t.embedded.load(ctx, reads, floodCallers, b.warm, b.window); err != nil {
				return err
			}
			did, err := finishLoad(flood)
			result.puts = append(result.puts, did.Rate)
			return err
		}
		order := []func() error{quiet, flooded}
		if round%2 == 1 {
			slices.Reverse(order)
		}
		for _, measure := range order {
			if err := measure(); err != nil {
				return result, fmt.Errorf("reads under a flood of puts: %w", err)
			}
		}
		result.rounds = append(result.rounds, p)
	}
	return result, nil
}
