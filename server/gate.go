package server

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/audit"
	"github.com/exto/secrets-broker/server/authz"
	"github.com/exto/secrets-broker/server/broker"
)

// method is what the gate knows of an RPC.
type method struct {
	permission authz.Permission
	write      bool
}

// methods has every RPC of the broker's service. What is missing here is refused
// to everybody.
var methods = map[string]method{
	secretsv1.SecretsBrokerService_PutSecret_FullMethodName:      {authz.Put, true},
	secretsv1.SecretsBrokerService_GetSecret_FullMethodName:      {authz.Get, false},
	secretsv1.SecretsBrokerService_RotateSecret_FullMethodName:   {authz.Rotate, true},
	secretsv1.SecretsBrokerService_DeleteSecret_FullMethodName:   {authz.Delete, true},
	secretsv1.SecretsBrokerService_RecoverSecret_FullMethodName:  {authz.Recover, true},
	secretsv1.SecretsBrokerService_VerifyToken_FullMethodName:    {authz.Verify, false},
	secretsv1.SecretsBrokerService_DescribeSecret_FullMethodName: {authz.Describe, false},
	secretsv1.SecretsBrokerService_ListSecrets_FullMethodName:    {authz.List, false},
	secretsv1.SecretsBrokerService_WatchSecrets_FullMethodName:   {authz.Watch, false},
}

// gate is the one place that decides who may do what. It judges in this order:
// is the caller known, has any rule of it this permission (admit, before the
// request is looked at), and once the request is parsed, does a rule allow this
// secret (allow, allowInstance).
type gate struct {
	trust    *Trust
	now      func() time.Time
	log      *slog.Logger
	accounts *accounts
	audit    *audit.Log
}

// identity is who a certificate says that the caller is.
type identity struct {
	id      spiffeid.ID
	problem error // why there is no id
}

// name is the SPIFFE ID, or why there is none, for the log.
func (i identity) name() string {
	if i.problem != nil {
		return "unknown: " + i.problem.Error()
	}
	return i.id.String()
}

// admit judges a call before its request is looked at. What is in force then is so
// for the whole of a unary call.
func (g *gate) admit(c *call) error {
	c.under = g.trust.now.Load()
	return g.judge(c, c.under)
}

// judge is admit under some snapshot. A connection outlives the handshake that checked
// its certificate by days, so that this asks everything again.
func (g *gate) judge(c *call, under *snapshot) error {
	if c.health {
		// It takes a certificate, at the handshake, and no rule. Clients balance by it: one
		// whose certificate is revoked is to hear so from its calls, and not to wait for a
		// broker that is in good health.
		return nil
	}
	if why := under.certified(c.connection, g.now()); why != nil {
		return errUnknown(why)
	}
	if c.caller.problem != nil {
		return errUnknown(c.caller.problem)
	}
	if !under.policy.Knows(c.caller.id) {
		return errUnknown(errNoRule)
	}
	if c.action == "" || !under.policy.Permits(c.caller.id, c.action) {
		return errNotAllowed()
	}
	return nil
}

// allow judges a call for one secret.
func (g *gate) allow(c *call, key secret.Key) error {
	c.key = key
	if !c.under.policy.Allows(c.caller.id, c.action, key) {
		return errNotAllowed()
	}
	return nil
}

// allowWatch judges a watch of these secrets, now and, by decideStream, as long as it
// lasts.
func (g *gate) allowWatch(c *call, keys []secret.Key) error {
	c.watched.Store(&keys)
	// By what is in force after that: a change before it was judged without the keys.
	return g.judgeWatch(c, g.trust.now.Load())
}

// judgeWatch judges the secrets that a call watches, if it is a watch and got so far.
func (g *gate) judgeWatch(c *call, under *snapshot) error {
	keys := c.watched.Load()
	if keys == nil {
		return nil
	}
	for _, key := range *keys {
		if !under.policy.Allows(c.caller.id, authz.Watch, key) {
			return errNotAllowed()
		}
	}
	return nil
}

// allowInstance judges a call for whatever secrets of one instance.
func (g *gate) allowInstance(c *call, id secret.InstanceID) error {
	c.instance = id
	if !c.under.policy.AllowsInstance(c.caller.id, c.action, id) {
		return errNotAllowed()
	}
	return nil
}

// errUnknown is the same whatever the reason, which is for the log.
func errUnknown(why error) error {
	return (&broker.Error{Reason: secret.CallerUnknown,
		Message: "the policy knows no caller by this certificate: it needs exactly one URI SAN, the SPIFFE ID of an identity in the policy, and to be unexpired, not revoked and of the present client CA"}).Because(why)
}

// errNotAllowed is the same for secrets that exist and for those that don't, and
// names nobody who would have been allowed.
func errNotAllowed() error {
	return &broker.Error{Reason: secret.CallerNotAllowed, Message: "no rule of the policy allows this caller this call; ask the broker's operator for one"}
}

// errTooManyWatches leaves room on a connection for the calls that are no watches.
func errTooManyWatches() error {
	return &broker.Error{Reason: secret.CallerQuotaExceeded, RetryAfter: time.Minute,
		Message: fmt.Sprintf("a connection has at most %d watches at once: watch more secrets in each (up to %d), or use another connection", maxWatches, maxWatched)}
}

// visible gives the judgement of single secrets for a list, in which what is not
// allowed is left out.
func (g *gate) visible(c *call) func(secret.Key) bool {
	return func(key secret.Key) bool { return c.under.policy.Allows(c.caller.id, c.action, key) }
}
