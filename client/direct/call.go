package direct

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/internal/keyvaultwire"
	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
)

// policyFunc is a step on the way of a request.
type policyFunc func(*policy.Request) (*http.Response, error)

func (f policyFunc) Do(req *policy.Request) (*http.Response, error) { return f(req) }

// stay lets no request go anywhere but to the vault: the SDK follows the link to a
// list's next page wherever it points, with a token.
func stay(vaultURL string) policyFunc {
	vault, err := url.Parse(vaultURL)
	return func(req *policy.Request) (*http.Response, error) {
		to := req.Raw().URL
		if err != nil || to.Scheme != vault.Scheme || to.Hostname() != vault.Hostname() {
			return nil, errors.New("a link that leads away from the vault")
		}
		return req.Next()
	}
}

// trace is what became of the last request of a call.
type trace struct {
	sent   time.Time
	status int // 0: no answer
}

type traceKey struct{}

// witness fills in the trace.
func witness(req *policy.Request) (*http.Response, error) {
	tr, _ := req.Raw().Context().Value(traceKey{}).(*trace)
	*tr = trace{sent: time.Now().UTC()}
	resp, err := req.Next()
	if err == nil {
		tr.status = resp.StatusCode
	}
	return resp, err
}

// credential tells its own errors from the vault's.
type credential struct{ azcore.TokenCredential }

func (c credential) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	token, err := c.TokenCredential.GetToken(ctx, o)
	if err != nil {
		err = &tokenError{err}
	}
	return token, err
}

type tokenError struct{ error }

func (e *tokenError) Unwrap() error { return e.error }

// ask makes one call of the SDK and gives what it brought, and when it was sent. It
// does not outlast ctx: in the SDK, who waits for a token that another asked for
// waits on.
func ask[T any](ctx context.Context, op string, f func(context.Context) (T, error)) (T, time.Time, error) {
	type outcome struct {
		result T
		sent   time.Time
		err    error
	}
	ended := make(chan outcome, 1)
	go func() {
		var o outcome
		var tr trace
		err := keyvaultwire.NoPanic(context.WithValue(ctx, traceKey{}, &tr), func(ctx context.Context) (err error) {
			o.result, err = f(ctx)
			return err
		})
		o.sent, o.err = tr.sent, toError(ctx, op, tr, err)
		ended <- o
	}()
	select {
	case o := <-ended:
		return o.result, o.sent, o.err
	case <-ctx.Done():
		var zero T
		return zero, time.Time{}, contextError(ctx)
	}
}

// get reads one version; the empty one is the current.
func (v *Vault) get(ctx context.Context, key secret.Key, id string) (reading, error) {
	read, sent, err := ask(ctx, "Get", func(ctx context.Context) (reading, error) {
		resp, err := v.client.GetSecret(ctx, key.String(), id, nil)
		if err != nil {
			return reading{}, err
		}
		p, err := properties(key, resp.ID, resp.Attributes, resp.ContentType, resp.Tags)
		if err == nil && resp.Value == nil {
			err = errors.New("no value")
		}
		if err != nil {
			return reading{}, err
		}
		return reading{version: versions.New(p), value: secret.NewValue(*resp.Value)}, nil
	})
	read.asOf = sent
	return read, err
}

// list reads all versions of what was read, which is to be the current one. Where a
// late version lies over it, the current one is another.
func (v *Vault) list(ctx context.Context, key secret.Key, r *reading) error {
	if r.all != nil {
		return nil
	}
	all, _, err := ask(ctx, "Versions", func(ctx context.Context) (versions.List, error) {
		var all versions.List
		for pages := v.client.NewListSecretPropertiesVersionsPager(key.String(), nil); pages.More(); {
			page, err := pages.NextPage(ctx)
			if err != nil {
				return nil, err
			}
			for _, item := range page.Value {
				p, err := properties(key, item.ID, item.Attributes, item.ContentType, item.Tags)
				if err != nil {
					return nil, err
				}
				all = append(all, versions.New(p))
			}
		}
		return all, nil
	})
	if err != nil {
		return changed(err)
	}
	known := r.version.Version != ""
	if !all.Arrange(r.version.Version) || known && !all[0].Enabled {
		return errChanged
	}
	if greatest := all.Greatest(); all[0].Generation > 0 && greatest.Beats(all[0]) {
		all.Lead(all.Index(greatest.Version))
	}
	r.version, r.all = all[0], all
	return nil
}

// changed is err of what the vault had a moment ago.
func changed(err error) error {
	if errors.Is(err, client.ErrNotFound) || errors.Is(err, client.ErrDisabled) {
		return errChanged
	}
	return err
}

const notFoundText = "there is no such secret, or it is deleted"

// toError puts how a call of the SDK ended into the words of package client. Nothing
// of an answer's body is in it.
func toError(ctx context.Context, op string, tr trace, err error) error {
	var (
		resp  *azcore.ResponseError
		token *tokenError
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &token) && ctx.Err() == nil:
		text := keyvaultwire.OneLine(token.error)
		if refuses(token.error) {
			return refuse(codes.Unavailable, secret.VaultRefused, "there is no token for the vault; give the program an identity: "+text)
		}
		return refuse(codes.Unavailable, secret.VaultUnavailable, "the token service cannot be reached or cannot do its work; try again: "+text)
	case errors.As(err, &resp):
		return answered(op, resp)
	case ctx.Err() != nil:
		return contextError(ctx)
	case tr.status == http.StatusUnauthorized:
		// The SDK sends no token to who gave this challenge, and says why.
		return refuse(codes.Unavailable, secret.VaultRefused, "what answers takes no token for a vault; correct the URL: "+keyvaultwire.OneLine(err))
	case tr.status != 0:
		return refuse(codes.Unavailable, secret.VaultUnavailable, op+": an answer that cannot be read; try again")
	}
	return refuse(codes.Unavailable, secret.VaultUnavailable, "the vault cannot be reached; try again: "+op+": "+keyvaultwire.TransportError(err).Error())
}

// answered sorts the vault's errors.
func answered(op string, resp *azcore.ResponseError) error {
	answer := answerError(op, resp)
	switch {
	case answer.Status == http.StatusNotFound:
		return refuse(codes.NotFound, secret.SecretNotFound, notFoundText)
	case answer.Status == http.StatusForbidden && answer.Inner == keyvaultwire.InnerDisabled:
		return refuse(codes.FailedPrecondition, secret.SecretDisabled, disabledText)
	case answer.Status == http.StatusUnauthorized, answer.Status == http.StatusForbidden:
		return refuse(codes.Unavailable, secret.VaultRefused, "the vault refuses this program's identity; give it the role Key Vault Secrets User on the secret: "+answer.Error())
	case answer.Status == http.StatusTooManyRequests:
		e := refuse(codes.Unavailable, secret.VaultThrottled, "the vault takes no more requests now; try again later: "+answer.Error())
		e.RetryAfter = max(throttleRetry, keyvaultwire.RetryAfter(resp.RawResponse))
		return e
	}
	return refuse(codes.Unavailable, secret.VaultUnavailable, "the vault cannot do its work; try again: "+answer.Error())
}

// throttleRetry is what the broker too tells after a 429 that names no time: Key
// Vault counts over 10 s.
const throttleRetry = 2 * time.Second

func refuse(code codes.Code, reason secret.Reason, text string) *client.Error {
	return &client.Error{Code: code, Reason: reason, Message: string(reason) + ": " + text}
}

func contextError(ctx context.Context) error {
	st := status.FromContextError(ctx.Err())
	return &client.Error{Code: st.Code(), Message: st.Message()}
}

// properties reads the SDK's words. A missing part is an error and no panic.
func properties(key secret.Key, id *azsecrets.ID, a *azsecrets.SecretAttributes, contentType *string, tags map[string]*string) (versions.Properties, error) {
	if id == nil || id.Version() == "" || a == nil {
		return versions.Properties{}, keyvaultwire.ErrIncomplete
	}
	return keyvaultwire.Properties(key, id.Version(), a.Enabled, a.Created, contentType, tags)
}

// answerError takes of the SDK's error what may be told.
func answerError(op string, e *azcore.ResponseError) *keyvaultwire.AnswerError {
	var header http.Header
	var body []byte
	if e.RawResponse != nil {
		header = e.RawResponse.Header
		body, _ = runtime.Payload(e.RawResponse) // kept by azcore, so that it can be read again
	}
	return keyvaultwire.NewAnswerError(op, e.ErrorCode, header, e.StatusCode, body)
}

// refuses reports whether a credential or its token service said no.
func refuses(err error) bool {
	var failed *azidentity.AuthenticationFailedError
	if errors.As(err, &failed) {
		return keyvaultwire.Refuses(err, true, failed.RawResponse)
	}
	return keyvaultwire.Refuses(err, false, nil)
}
