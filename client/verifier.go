package client

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"sync"
	"time"

	"github.com/exto/secrets-broker/secret"
)

// VerifierOptions say what a Verifier remembers.
type VerifierOptions struct {
	// Instances is for how many instances it remembers the tokens that matched. 0:
	// for none, and every token is asked about.
	Instances int
}

// Verifier checks the tokens that instances send. It may remember those that
// matched, for as long as the broker tells of changes: a rotation, a deletion or
// the end of a grace ends that, and so does a broken watch. A connection that
// died silently is noticed within 25 s; a revoked token may pass until then. What
// did not match is never remembered. Safe for concurrent use.
type Verifier struct {
	client *Client
	ctx    context.Context
	most   int
	digest [32]byte // key of the digests by which tokens are remembered

	mu        sync.Mutex
	instances map[secret.InstanceID]*verified
}

// verified is what is remembered of one instance.
type verified struct {
	mu      sync.Mutex
	watched bool
	// epoch counts the messages of the watch: an answer that began before the last
	// one is not remembered.
	epoch  int
	tokens map[[32]byte]VerifyResult
}

// maxTokens bounds what is remembered of one instance: two tokens are good at a
// time, the current one and the one in grace.
const maxTokens = 2

// NewVerifier makes a Verifier that remembers until ctx ends. The caller needs
// the right to watch registration tokens if it is to remember any.
func NewVerifier(ctx context.Context, c *Client, o VerifierOptions) *Verifier {
	v := &Verifier{client: c, ctx: ctx, most: o.Instances, instances: map[secret.InstanceID]*verified{}}
	_, _ = rand.Read(v.digest[:]) // never fails
	context.AfterFunc(ctx, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		for id := range v.instances {
			v.forget(id)
		}
	})
	return v
}

// VerifyToken is Client.Verify, from memory where that is possible.
func (v *Verifier) VerifyToken(ctx context.Context, id secret.InstanceID, token secret.Value) (VerifyResult, error) {
	if v.most <= 0 {
		return v.client.Verify(ctx, id, token)
	}
	mac := hmac.New(sha256.New, v.digest[:])
	mac.Write([]byte(token.Reveal()))
	digest := [32]byte(mac.Sum(nil))
	v.mu.Lock()
	one := v.instances[id]
	v.mu.Unlock()
	epoch := 0
	if one != nil {
		one.mu.Lock()
		result, known := one.tokens[digest]
		epoch = one.epoch
		one.mu.Unlock()
		if known && (result.ExpireTime.IsZero() || time.Now().Before(result.ExpireTime)) {
			return result, nil
		}
	}
	result, err := v.client.Verify(ctx, id, token)
	if err != nil || !result.OK() {
		return result, err
	}
	if one == nil {
		v.follow(id)
		return result, nil
	}
	one.mu.Lock()
	defer one.mu.Unlock()
	if one.watched && one.epoch == epoch {
		if _, again := one.tokens[digest]; !again && len(one.tokens) >= maxTokens {
			clear(one.tokens)
		}
		one.tokens[digest] = result
	}
	return result, nil
}

// follow begins to watch an instance; what matches after the first message is
// remembered.
func (v *Verifier) follow(id secret.InstanceID) {
	key, err := secret.NewKey(id, secret.RegistrationToken)
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil || v.instances[id] != nil || v.ctx.Err() != nil {
		return
	}
	for other := range v.instances {
		if len(v.instances) < v.most {
			break
		}
		v.forget(other) // whichever: better than to keep a record of each use
	}
	one := &verified{tokens: map[[32]byte]VerifyResult{}}
	v.instances[id] = one
	v.client.feed.add(key, one)
}

// forget needs v.mu.
func (v *Verifier) forget(id secret.InstanceID) {
	one := v.instances[id]
	delete(v.instances, id)
	if key, err := secret.NewKey(id, secret.RegistrationToken); err == nil {
		v.client.feed.remove(key, one)
	}
	one.lost()
}

func (one *verified) seen(Change) func() {
	one.mu.Lock()
	defer one.mu.Unlock()
	one.watched = true
	one.epoch++
	clear(one.tokens)
	return nil
}

func (one *verified) lost() {
	one.mu.Lock()
	defer one.mu.Unlock()
	one.watched = false
	one.epoch++
	clear(one.tokens)
}
