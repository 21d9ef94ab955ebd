package brokertest

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/server/authz"
)

// VaultOutage makes every request of the broker to its vault fail, as when the
// vault cannot be reached, until over is called. Each has an end of its own.
func (b *Broker) VaultOutage() (over func()) {
	b.outages.Add(1)
	return sync.OnceFunc(func() { b.outages.Add(-1) })
}

// SetLatency lets whatever the broker sends, on every connection, come later by d
// or somewhat more; 0: at once, as at the start. What is on its way arrives then.
func (b *Broker) SetLatency(d time.Duration) { b.latency.set(d) }

// Revoke revokes all certificates of an identity, those to come too, until undo is
// called. Identities are as for Client.
func (b *Broker) Revoke(identity string) (undo func()) {
	b.t.Helper()
	return b.revoke(b.id(identity).String())
}

// RevokeClient is Revoke for the certificate of one Client of this broker.
func (b *Broker) RevokeClient(c *client.Client) (undo func()) {
	b.t.Helper()
	b.mu.Lock()
	serial := b.serials[c]
	b.mu.Unlock()
	if serial == "" {
		b.fatal("RevokeClient", errors.New("the client is not one that Client of this broker made"))
	}
	return b.revoke(serial)
}

func (b *Broker) revoke(entry string) (undo func()) {
	b.t.Helper()
	b.change(func() { b.revoked[entry] = true })
	return func() {
		b.t.Helper()
		b.change(func() { delete(b.revoked, entry) })
	}
}

// Deny takes permissions, such as get, from an identity until undo is called; all
// of them when none is named. It is an identity of the policy, which allows it
// these: for instances instance/{instance_id}, which is all of them. It stays
// known: its calls are CALLER_NOT_ALLOWED. Another Deny of it takes the place of
// this one.
func (b *Broker) Deny(identity string, permissions ...string) (undo func()) {
	b.t.Helper()
	id := b.spiffeID(identity)
	b.change(func() {
		allowed := b.policy.allows(id)
		if len(allowed) == 0 {
			b.t.Fatalf("brokertest: Deny: the policy has no rule for %s", id)
		}
		for _, p := range permissions {
			if !slices.Contains(allowed, p) {
				b.t.Fatalf("brokertest: Deny: %s of %s, to which the policy allows %s", p, id, strings.Join(allowed, ", "))
			}
		}
		b.denied[id] = permissions
	})
	return func() {
		b.t.Helper()
		b.change(func() { delete(b.denied, id) })
	}
}

// SetPolicy puts another policy in force, as the option Policy. What is denied
// stays so.
func (b *Broker) SetPolicy(policy string) {
	b.t.Helper()
	p, err := parsePolicy(policy)
	if err != nil {
		b.fatal("SetPolicy", err)
	}
	b.change(func() { b.policy = p })
}

// change puts in force what f changes.
func (b *Broker) change(f func()) {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
	b.writeTrust()
	b.trust.Reload()
}

// writeTrust writes what the broker reads of policy and revocations.
func (b *Broker) writeTrust() {
	b.t.Helper()
	policy, err := b.policy.without(b.denied)
	if err != nil {
		b.fatal("writing the policy", err)
	}
	b.write(b.files.Policy, policy)
	b.write(b.files.Revoked, []byte(strings.Join(slices.Sorted(maps.Keys(b.revoked)), "\n")))
}

// policyFile is a policy as it is written; what it means is authz's.
type policyFile struct {
	TrustDomain string `yaml:"trust_domain"`
	Rules       []rule `yaml:"rules"`
}

type rule struct {
	Identity  string   `yaml:"identity"`
	Allow     []string `yaml:"allow"`
	Kinds     []string `yaml:"kinds,omitempty"`
	Instances []string `yaml:"instances,omitempty"`
}

func parsePolicy(text string) (p policyFile, err error) {
	if _, err := authz.ParsePolicy([]byte(text)); err != nil {
		return policyFile{}, err
	}
	return p, yaml.Unmarshal([]byte(text), &p)
}

// allows is what it allows to an identity for some secret.
func (p policyFile) allows(identity string) (all []string) {
	for _, r := range p.Rules {
		if r.Identity == identity {
			all = append(all, r.Allow...)
		}
	}
	return all
}

// without is the policy in YAML without these permissions of these identities.
func (p policyFile) without(denied map[string][]string) ([]byte, error) {
	p.Rules = slices.Clone(p.Rules)
	for i, r := range p.Rules {
		permissions, some := denied[r.Identity]
		if !some {
			continue
		}
		left := slices.DeleteFunc(slices.Clone(r.Allow), func(a string) bool {
			return len(permissions) == 0 || slices.Contains(permissions, a)
		})
		if len(left) == 0 {
			left = []string{string(authz.Debug)} // a rule allows something, and this reaches no secret
		}
		p.Rules[i].Allow = left
	}
	return yaml.Marshal(p)
}
