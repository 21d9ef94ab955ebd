package client_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/secret"
)

// errorsGetter gives its errors, one after the other, and then a value.
type errorsGetter chan error

func (g errorsGetter) Get(context.Context, secret.Key, client.GetOptions) (client.GetResult, error) {
	select {
	case err := <-g:
		return client.GetResult{}, err
	default:
		return client.GetResult{Metadata: client.Metadata{Version: "v1"}}, nil
	}
}

// A program that starts while the vault takes no requests waits for it, and not for what
// does not come by itself.
func TestFirstValueIsWaitedFor(t *testing.T) {
	t.Parallel()
	throttled := &client.Error{Code: codes.Unavailable, Reason: secret.VaultThrottled, RetryAfter: 10 * time.Millisecond}
	refused := &client.Error{Code: codes.Unavailable, Reason: secret.VaultRefused}
	g := make(errorsGetter, 3)
	g <- throttled
	g <- throttled
	if got := newSource(t, t.Context(), g, "acme", client.SourceOptions{}).Value(); got.Version != "v1" {
		t.Errorf("got %+v, want the value after two refusals", got)
	}
	g <- throttled
	g <- refused
	if _, err := client.NewSource(t.Context(), g, mustKey("instance-acme"), client.SourceOptions{}); !errors.Is(err, refused) {
		t.Errorf("got %v, want %v at once", err, refused)
	}
	g <- &client.Error{Code: codes.Unavailable, Reason: secret.VaultThrottled, RetryAfter: time.Hour}
	if _, err := client.NewSource(t.Context(), g, mustKey("instance-acme"), client.SourceOptions{}); !errors.Is(err, client.ErrUnavailable) {
		t.Errorf("got %v, want what is beyond MaxWait", err)
	}
}
