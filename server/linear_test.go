package server_test

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/google/uuid"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
	"github.com/exto/secrets-broker/internal/race"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
	"github.com/exto/secrets-broker/server/vault"
)

// linearCall is a call. Values are numbers, and each is written once.
type linearCall struct {
	do           string
	value        int           // that is written
	of           int           // the value whose version is read, or is to be replaced
	grace        time.Duration // of a rotate
	missing      bool          // allow_missing of a rotate
	began, ended int64         // by the clock
	loose        bool          // a late commit may have put another version in the place of one that is known
}

// linearResult is a value that was read, or why the call was refused; or the outcome
// of a write is not known.
type linearResult struct {
	value  int
	reason secret.Reason
	open   bool
	source secretsv1.FreshnessSource
}

func (c linearCall) reads() bool { return strings.HasPrefix(c.do, "get") }

// linearState is a secret as the contract has it.
type linearState struct {
	is    secretsv1.SecretState // unspecified: absent
	value int
	// kept are the values whose versions a put replaced: they can be read on. graced
	// is the one that a rotate replaced, until some time from..until.
	kept        string
	graced      int
	from, until int64
}

// write gives the state after a write, or why it is refused.
func (s linearState) write(c linearCall) (linearState, secret.Reason) {
	there := s.is == active
	next := s
	next.graced = 0 // any further write ends it
	switch c.do {
	case "put must_not_exist":
		if there {
			return s, secret.SecretExists
		}
	case "put on version":
		if !there || s.value != c.of {
			return s, secret.VersionMismatch
		}
	case "rotate":
		if !there && !c.missing {
			return s, map[bool]secret.Reason{true: secret.SecretDeleted, false: secret.SecretNotFound}[s.is == deleted]
		}
	case "delete":
		if next.is = deleted; !there {
			return s, secret.SecretNotFound
		}
		return next, ""
	case "recover":
		if next.is = active; there {
			return s, secret.SecretNotDeleted
		} else if s.is != deleted {
			return s, secret.SecretNotFound
		}
		return next, ""
	}
	switch {
	case !there:
		next.kept = "" // from before the delete
	case c.do == "rotate" && c.grace > 0:
		next.graced, next.from, next.until = s.value, c.began+int64(c.grace), c.ended+int64(c.grace)
	case c.do != "rotate":
		next.kept += string(rune(s.value))
	}
	next.is, next.value = active, c.value
	return next, ""
}

// gives reports whether a read may end so.
func (s linearState) gives(c linearCall, r linearResult) bool {
	switch {
	case s.is != active:
		return r.reason == secret.SecretNotFound
	case c.do != "get version" || c.of == s.value || strings.ContainsRune(s.kept, rune(c.of)):
		return r.value == cmp.Or(c.of, s.value) || c.loose && c.of != 0 && r.reason == secret.VersionExpired
	case r.reason == "":
		return r.value == c.of && (c.loose || s.graced == c.of && c.began < s.until)
	}
	return r.reason == secret.VersionExpired && (s.graced != c.of || c.ended >= s.from)
}

var linearModel = porcupine.Model{
	Init: func() any { return linearState{} },
	Step: func(state, input, output any) (bool, any) {
		s, c, r := state.(linearState), input.(linearCall), output.(linearResult)
		if c.reads() || c.loose && r.reason == secret.VersionMismatch && !r.open {
			return !c.reads() || s.gives(c, r), s
		}
		next, reason := s.write(c)
		return r.open || r.reason == reason, next
	},
}

// trouble is what a vault does: it is slow and fails now and then, and for some time
// all requests fail, when what the broker remembers is old and it has no time to wait.
type trouble struct {
	x      *subject
	asked  chan struct{} // holds something when it was asked a moment ago
	mu     sync.Mutex
	random *rand.Rand
	away   int // so many more requests fail
}

func (w *trouble) draw(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.random.IntN(n)
}

// meets says how long a request is on its way there and back, and whether it fails.
func (w *trouble) meets(op string) (there, back time.Duration, fails bool) {
	select {
	case w.asked <- struct{}{}:
	default:
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch w.away--; {
	case w.away == 0:
		w.x.hurried.Store(false)
	case w.away < 0 && w.random.IntN(60) == 0:
		w.away = 2 + w.random.IntN(30)
		w.x.hurried.Store(w.random.IntN(3) > 0)
		w.x.clock.advance(broker.DefaultCacheTTL)
	}
	if w.random.IntN(10) == 0 {
		w.x.clock.advance(time.Duration(w.random.IntN(15_000)) * time.Millisecond)
	}
	slow := func(in, most int) time.Duration {
		return time.Duration(max(0, 1-w.random.IntN(in))*w.random.IntN(most)) * time.Microsecond
	}
	// Many look while a write is on its way, and what they find is old when it comes.
	if there, back = slow(12, 5_000), slow(3, 15_000); isEffect(op) {
		there, back = slow(2, 5_000), slow(6, 5_000)
	}
	return there, back, w.away > 0 || w.random.IntN(30) == 0
}

func (w *trouble) onEmbedded() {
	fail := map[bool]error{false: vault.ErrUnavailable, true: vault.Uncertain(vault.ErrUnavailable)} // uncertain or not
	w.x.vault.SetBefore(func(ctx context.Context, op string, _ secret.Key) error {
		there, _, fails := w.meets(op)
		if err := vault.Wait(ctx, there); err != nil || !fails {
			return err
		}
		return fail[isEffect(op) && w.draw(2) == 0]
	})
	w.x.vault.SetAfter(func(ctx context.Context, op string, _ secret.Key, err error) error {
		_, back, fails := w.meets(op)
		_ = vault.Wait(context.WithoutCancel(ctx), back)
		if err == nil && fails {
			return fail[isEffect(op)]
		}
		return err
	})
}

// onKeyVault has some new versions committed long after they were sent, with late.
func (w *trouble) onKeyVault(late bool) {
	w.x.fake.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		if r.Challenge || r.Name != w.x.key.String() {
			return keyvaultfake.Fault{}
		}
		there, back, fails := w.meets(string(r.Op))
		fault := keyvaultfake.Fault{Delay: there}
		if back > 0 {
			answered := make(chan struct{})
			fault.HoldAfter = answered
			time.AfterFunc(there+back, func() { close(answered) })
		}
		switch n := w.draw(4); {
		case !fails:
		case n == 0 && late && r.Op == keyvaultfake.OpSet:
			fault.LateCommit = time.Duration(1+w.draw(60)) * time.Second
		case n == 1:
			fault.Status = 503
		case n == 2:
			fault.CutAfter = true
		default:
			fault.Cut = true
		}
		return fault
	})
}

// chronicle is what clients did with the secret.
type chronicle struct {
	x     *subject
	loose bool
	tick  atomic.Int64 // orders beginnings and ends
	begun atomic.Int64 // writes

	mu       sync.Mutex
	last     int // value that was written
	calls    []porcupine.Operation
	versions [][2]string // that callers were told of, each with its value
}

// call does one call, and mostly the same write again until its outcome is known.
func (h *chronicle) call(n int, c secretsv1.SecretsBrokerServiceClient, do string, random *rand.Rand) {
	in := linearCall{do: do, loose: h.loose, missing: random.IntN(4) == 0, grace: time.Duration(random.IntN(3)) * 40 * time.Second}
	var version string
	h.mu.Lock()
	if strings.HasSuffix(do, "version") {
		known := h.versions[max(0, len(h.versions)-1-random.IntN(2)*random.IntN(24)):]
		if len(known) == 0 {
			h.mu.Unlock()
			return
		}
		version = known[0][0]
		in.of, _ = strconv.Atoi(known[0][1])
	}
	if strings.HasPrefix(do, "put") || do == "rotate" {
		h.last++
		in.value = h.last
	}
	h.mu.Unlock()
	writes, id, again := h.begun.Load(), uuid.NewString(), random.IntN(8) > 0
	if !in.reads() {
		writes = h.begun.Add(1)
	}
	in.began = h.x.clock.Now().UnixNano()
	begin := h.tick.Add(1)
	var out linearResult
	var err error
	for doubt := false; ; doubt = out.open {
		patience := time.Minute
		if random.IntN(10) == 0 {
			patience = time.Duration(1+random.IntN(12)) * time.Millisecond
		}
		ctx, cancel := context.WithTimeout(h.x.ctx, patience)
		out, err = h.ask(ctx, c, in, version, id)
		cancel()
		// Who cannot reach the vault does not know what became of the tries before.
		out.open = out.open || doubt && slices.Contains(failures, out.reason)
		// Writes take turns in order of arrival, and the ids of eight are remembered.
		if !out.open || !again || h.begun.Load()-writes > 2 {
			break
		}
	}
	end := h.tick.Add(1)
	in.ended = h.x.clock.Now().UnixNano()
	switch {
	case out.open:
		end, in.ended = math.MaxInt64, math.MaxInt64/2
	case slices.Contains(failures, out.reason):
		return
	case out.reason != "" && !slices.Contains(observations, out.reason):
		h.x.t.Errorf("%+v: got %v", in, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls = append(h.calls, porcupine.Operation{ClientId: n, Input: in, Output: out, Call: begin, Return: end})
}

var (
	// observations say how the secret stands, failures do not.
	observations = []secret.Reason{secret.SecretNotFound, secret.SecretExists, secret.SecretDeleted, secret.SecretNotDeleted, secret.VersionMismatch, secret.VersionExpired}
	failures     = []secret.Reason{secret.VaultUnavailable, secret.StalenessUnsatisfiable, secret.DeadlineExceeded}
)

// ask makes the call itself.
func (h *chronicle) ask(ctx context.Context, c secretsv1.SecretsBrokerServiceClient, in linearCall, version, id string) (out linearResult, err error) {
	r := h.x.ref
	var told interface {
		GetMetadata() *secretsv1.SecretMetadata
	}
	switch in.do {
	case "rotate":
		told, err = c.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: r, NewValue: uri(in.value), GracePeriod: durationOf(in.grace), AllowMissing: in.missing, RequestId: id})
	case "delete":
		_, err = c.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: r, RequestId: id})
	case "recover":
		_, err = c.RecoverSecret(ctx, &secretsv1.RecoverSecretRequest{Ref: r, RequestId: id})
	case "put", "put must_not_exist", "put on version":
		req := &secretsv1.PutSecretRequest{Ref: r, Value: uri(in.value), RequestId: id}
		if in.do == "put must_not_exist" {
			req.Precondition = &secretsv1.PutSecretRequest_MustNotExist{MustNotExist: true}
		} else if version != "" {
			req.Precondition = &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: version}
		}
		told, err = c.PutSecret(ctx, req)
	default:
		req := &secretsv1.GetSecretRequest{Ref: r, Version: version}
		if in.do == "get 0s" {
			req.MaxStaleness = durationOf(0)
		}
		var got *secretsv1.GetSecretResponse
		if got, err = c.GetSecret(ctx, req); err == nil {
			told, out.source = got, got.GetFreshness().GetSource()
			if _, err := fmt.Sscanf(got.GetValue(), "postgres://app:pw-%d@db/orders", &out.value); err != nil {
				h.x.t.Errorf("got %q: %v", got.GetValue(), err)
			}
		}
	}
	if err == nil {
		if told != nil {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.versions = append(h.versions, [2]string{told.GetMetadata().GetVersion(), strconv.Itoa(cmp.Or(in.value, out.value))})
		}
		return out, nil
	}
	f := failed(h.x.t, err)
	if f.commit == secret.Applied {
		return out, nil
	}
	// An error without details is by the client's own stack.
	out.reason, out.open = cmp.Or(f.reason, secret.DeadlineExceeded), !in.reads() && f.commit != secret.NotApplied
	return out, err
}

// check fails unless the calls could have happened one after another.
func (h *chronicle) check() {
	seen := map[int]int64{}
	for _, o := range h.calls {
		if v := o.Output.(linearResult).value; v != 0 && (seen[v] == 0 || o.Return < seen[v]) {
			seen[v] = o.Return
		}
	}
	for i, o := range h.calls {
		// What somebody read was written by then.
		if end := seen[o.Input.(linearCall).value]; o.Output.(linearResult).open && end != 0 {
			h.calls[i].Return = end
		}
	}
	result, info := porcupine.CheckOperationsVerbose(linearModel, h.calls, time.Minute)
	if result == porcupine.Ok {
		return
	}
	orders := info.PartialLinearizationsOperations()[0]
	slices.SortFunc(orders, func(a, b []porcupine.Operation) int { return cmp.Compare(len(b), len(a)) })
	placed := map[int64]int{}
	for i, o := range orders[0] {
		placed[o.Call] = i + 1
	}
	stuck := int64(math.MaxInt64) // where the first one ends that has no place
	for _, o := range h.calls {
		if placed[o.Call] == 0 {
			stuck = min(stuck, o.Return)
		}
	}
	slices.SortFunc(h.calls, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	for _, o := range h.calls {
		if o.Call <= stuck && o.Return > stuck-60 {
			h.x.t.Logf("%3d to %3d client %d, place %3d: %+v: %+v", o.Call, min(o.Return, 9999), o.ClientId, placed[o.Call], o.Input, o.Output)
		}
	}
	h.x.t.Errorf("no order of the calls explains what they gave (%s): %d of %d have a place, and none the one that ends at %d", result, len(placed), len(h.calls), stuck)
}

// linearMenus are what clients draw from. What a delete and a recover change bears the
// same generation, so that nothing in an answer tells that it is old.
var linearMenus = [][]string{
	strings.Split("get,get,get,get 0s,get 0s,get version,get version,put,put,put,put must_not_exist,put on version,put on version,rotate,rotate,rotate,delete,delete,recover,recover", ","),
	strings.Split("get,get,get,get 0s,get 0s,get version,put,put must_not_exist,put on version,rotate,delete,delete,delete,delete,recover,recover,recover,recover", ","),
	strings.Split("get,get,get,get 0s,get version", ","), // of readers
}

// TestLinearizable has several clients work on one secret while the vault is slow and
// fails. What they were told can be put in one order, in which each call happens
// between its beginning and its end: reads from memory, and those in an outage, too.
func TestLinearizable(t *testing.T) {
	t.Parallel()
	seeds := uint64(6)
	if race.Enabled {
		seeds = 1
	}
	if more, err := strconv.ParseUint(os.Getenv("BROKER_TEST_SEEDS"), 10, 64); err == nil {
		seeds = more // make soak
	}
	const writers, readers, calls = 3, 3, 60
	onEachVault(t, func(t *testing.T, start func(*testing.T) *system) {
		for seed := range seeds {
			t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
				t.Parallel()
				x := start(t).in(t, "demo", "absent")
				w := &trouble{random: rand.New(rand.NewPCG(seed, 13)), x: x, asked: make(chan struct{}, readers)}
				h := &chronicle{x: x}
				if x.fake == nil {
					w.onEmbedded()
				} else {
					h.loose = seed%2 == 1
					w.onKeyVault(h.loose)
				}
				var writing, reading sync.WaitGroup
				done := make(chan struct{})
				for n := range writers + readers {
					c, random := x.as([]string{consoleAPI, worker}[n%2]), rand.New(rand.NewPCG(seed, uint64(100+n)))
					draw := func(from []string) { h.call(n, c, from[random.IntN(len(from))], random) }
					if n < writers {
						writing.Go(func() {
							for range calls {
								draw(linearMenus[seed/2%2])
							}
						})
						continue
					}
					reading.Go(func() {
						for {
							select {
							case <-w.asked: // there may be something new
								draw(linearMenus[2])
							case <-done:
								return
							}
						}
					})
				}
				writing.Wait()
				close(done)
				reading.Wait()
				h.check()
			})
		}
	})
}
