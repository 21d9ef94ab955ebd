package keyvault

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/exto/secrets-broker/internal/keyvaultwire"
	"github.com/exto/secrets-broker/server/vault"
)

const (
	// probed is a name that no secret of the broker's has: the vault says 404 to
	// whom it lets read, and 403 to whom it does not.
	probed  = "exto-broker-probe"
	probeOp = "Probe"
	// beginTimeout bounds what a start waits for the vault.
	beginTimeout = 10 * time.Second
	probeTimeout = 3 * time.Second
	// How often the vault is asked when nobody else asks: while it cannot be used
	// and while it can; and how often at most after calls that failed.
	probeDown   = time.Second
	probeUp     = 30 * time.Second
	probeUrgent = time.Second
)

// condition is whether the vault can be used: what the last probe ended with.
type condition struct{ err error }

// Check reports what was found last: by a probe at most 30 s ago, or a second
// after a call failed. It does not ask the vault itself.
func (v *Vault) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if v.closed.Load() {
		return errClosed
	}
	return v.state.Load().err
}

// begin asks the vault for the first time: whether values may be read, and names
// listed. Both need no secret.
func (v *Vault) begin(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, beginTimeout)
	defer cancel()
	err := v.ready(ctx)
	if err == nil {
		_, err = v.List(ctx, "", 1)
	}
	v.state.Store(&condition{err})
	if err == nil {
		return nil
	}
	if advice := v.advice(err); advice != nil {
		return advice
	}
	v.log.Warn("the vault cannot be reached yet; the broker is not ready and goes on trying", "vault", v.url, "error", err)
	return nil
}

// advice is what to do about an error that waiting does not mend; nil for others.
func (v *Vault) advice(err error) error {
	var (
		token *tokenError
		resp  *keyvaultwire.AnswerError
		dns   *net.DNSError
		proxy *keyvaultwire.ProxyError
		wrong *challengeError
	)
	switch {
	case errors.As(err, &token) && errors.Is(token, vault.ErrRefused):
		return fmt.Errorf("%s: %s", token.text, credentialAdvice(token.text))
	case errors.As(err, &resp) && resp.Status == http.StatusForbidden && (resp.Inner == "ForbiddenByFirewall" || resp.Inner == "ForbiddenByConnection"):
		return fmt.Errorf("the network rules of vault %s do not let this machine in (%w): az keyvault network-rule add --name %s --ip-address ADDRESS, or a private endpoint", v.name, resp, v.name)
	case errors.As(err, &resp) && resp.Status == http.StatusUnauthorized:
		return fmt.Errorf("what answers at %s takes no token of the broker's identity (%w): have the identity be one of the vault's own tenant, or correct the URL if that is no vault", v.url, resp)
	case errors.As(err, &resp) && resp.Status == http.StatusForbidden:
		return fmt.Errorf(`vault %s refuses the broker's identity (%w): grant it with az role assignment create --role "Key Vault Secrets Officer" --assignee IDENTITY --scope "$(az keyvault show --name %s --query id --output tsv)", which takes some minutes`, v.name, resp, v.name)
	case errors.As(err, &dns) && dns.IsNotFound:
		return fmt.Errorf("there is no vault at %s: set AZURE_KEY_VAULT_URL to one of those that az keyvault list --query [].properties.vaultUri names", v.url)
	case errors.As(err, &proxy) && proxy.Status < http.StatusInternalServerError:
		return fmt.Errorf("%w when asked for %s: have it let the broker through, or correct AZURE_KEY_VAULT_URL", proxy, v.url)
	case errors.As(err, &wrong):
		return fmt.Errorf("what answers at %s is no vault: %w", v.url, wrong)
	case errors.As(err, &resp) && resp.Status < http.StatusInternalServerError && resp.Status != http.StatusTooManyRequests && resp.Status != http.StatusRequestTimeout:
		return fmt.Errorf("what answers at %s is no vault: %w", v.url, resp)
	}
	return nil
}

// credentialAdvice is what to do about an error of the credential, by what the SDK
// says of it.
func credentialAdvice(text string) string {
	switch {
	case strings.Contains(text, "AZURE_TOKEN_CREDENTIALS"):
		return "unset AZURE_TOKEN_CREDENTIALS, or set it to prod or dev"
	case strings.Contains(text, "authority host"):
		return "unset AZURE_AUTHORITY_HOST, or set it to the https address of the cloud's token service"
	case strings.Contains(text, keyvaultwire.WrongTenant), strings.Contains(text, "tenantID"):
		return "set AZURE_TENANT_ID to the tenant of the vault"
	}
	return "on a laptop run az login; in CI set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET; on AKS give the pod a workload identity"
}

// ready blocks until the challenge was answered once and there is a token: all
// who come before that wait for one and the same request.
func (v *Vault) ready(ctx context.Context) error {
	if !v.warm.Load() && ctx.Value(probeKey{}) == nil {
		shaken := v.handshake.DoChan("", func() (any, error) {
			if v.warm.Load() {
				return nil, nil
			}
			ctx, cancel := context.WithTimeout(v.running, probeTimeout+tokenTimeout)
			defer cancel()
			return nil, v.probe(ctx)
		})
		select {
		case r := <-shaken:
			if r.Err != nil {
				return r.Err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return v.tokens.ready(ctx)
}

type probeKey struct{}

// probe asks the vault for what is not there.
func (v *Vault) probe(ctx context.Context) error {
	ctx = context.WithValue(ctx, probeKey{}, true)
	err := v.do(ctx, &call{op: probeOp}, func(ctx context.Context) error {
		_, err := v.client.GetSecret(ctx, probed, "", nil)
		return err
	})
	if err == nil || errors.Is(err, vault.ErrNotFound) || errors.Is(err, vault.ErrDisabled) {
		if !v.tokens.known() {
			return fmt.Errorf("%w: %w", vault.ErrRefused, &challengeError{"it asks for no token"})
		}
		v.warm.Store(true)
		return nil
	}
	return err
}

// suspect has the vault probed soon.
func (v *Vault) suspect() {
	select {
	case v.wake <- struct{}{}:
	default:
	}
}

// watch probes the vault until Close.
func (v *Vault) watch() {
	for {
		every := probeUp
		if v.state.Load().err != nil {
			every = probeDown
		}
		asked := time.NewTimer(every)
		select {
		case <-v.running.Done():
			asked.Stop()
			return
		case <-asked.C:
		case <-v.wake:
			asked.Stop()
			if v.state.Load().err != nil {
				every = probeDown
			} else {
				every = probeUrgent / 4
			}
			if vault.Wait(v.running, every) != nil {
				return
			}
		}
		ctx, cancel := context.WithTimeout(v.running, probeTimeout)
		err := v.ready(ctx)
		if err == nil {
			err = v.probe(ctx)
		}
		cancel()
		if v.running.Err() != nil {
			return
		}
		if errors.Is(err, vault.ErrThrottled) {
			continue // busy, not broken
		}
		before := v.state.Swap(&condition{err}).err
		switch {
		case err != nil && before == nil:
			v.log.Error("the vault cannot be used", "vault", v.url, "error", err)
		case err == nil && before != nil:
			v.log.Info("the vault can be used again", "vault", v.url)
		}
		select {
		case <-v.wake: // of the probe itself
		default:
		}
	}
}
