package client

import (
	"context"
	"time"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

// Match says whether a token is an instance's. A later broker may have further
// words: only the two that are known here let a caller in.
type Match string

// The matches.
const (
	// MatchCurrent: it is the instance's token.
	MatchCurrent Match = "MATCH_CURRENT"
	// MatchPrevious: it is the one that the last Rotate replaced, in its grace
	// period.
	MatchPrevious Match = "MATCH_PREVIOUS"
	// NoMatch: it is another, or there is no such instance.
	NoMatch Match = "NO_MATCH"
)

// VerifyResult is what is known of a token.
type VerifyResult struct {
	// Match says whether it is the instance's.
	Match Match
	// Generation is that of the version that it matches.
	Generation int64
	// ExpireTime is when a MatchPrevious ends. Zero for the others.
	ExpireTime time.Time
}

// OK reports whether the token is good now.
func (r VerifyResult) OK() bool { return r.Match == MatchCurrent || r.Match == MatchPrevious }

// maxToken is how long a token may be. A request takes more, but not whatever a stranger
// sends in a header.
const maxToken = 4096

// Verify asks whether token is the registration token of an instance. A wrong
// token and an unknown instance are no error but NoMatch. The caller needs no
// right to read tokens.
//
// Errors: ErrInvalid for an empty token.
func (c *Client) Verify(ctx context.Context, id secret.InstanceID, token secret.Value) (VerifyResult, error) {
	if !valid(token) || len(token.Reveal()) > maxToken {
		return VerifyResult{Match: NoMatch}, nil // as the broker says of all that is no token
	}
	resp, err := call(ctx, c, secretsv1.SecretsBrokerServiceClient.VerifyToken,
		&secretsv1.VerifyTokenRequest{InstanceId: id.String(), Token: token.Reveal()}, "")
	if err != nil {
		return VerifyResult{}, err
	}
	return VerifyResult{word[Match](resp.GetResult(), "VERIFY_RESULT_"), resp.GetGeneration(), toTime(resp.GetExpireTime())}, nil
}
