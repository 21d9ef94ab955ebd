package client

import (
	"context"
	"errors"
	"io"
	"iter"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

// ChangeType says what happened to a secret. A later broker may have further
// words.
type ChangeType string

// The types of changes.
const (
	// ChangeCurrent: the state as it is now, at the beginning of a watch or in place
	// of several changes.
	ChangeCurrent ChangeType = "CURRENT"
	// ChangeMissing: there is no such secret.
	ChangeMissing ChangeType = "MISSING"
	// These four were done through the broker.
	ChangePut       ChangeType = "PUT"
	ChangeRotated   ChangeType = "ROTATED"
	ChangeDeleted   ChangeType = "DELETED"
	ChangeRecovered ChangeType = "RECOVERED"
	// ChangeOutside: done in the vault by somebody other than the broker.
	ChangeOutside ChangeType = "CHANGED_OUTSIDE"
)

// Change is one message of a watch. It carries no value.
type Change struct {
	// Type is what happened.
	Type ChangeType
	// Metadata is the secret after it; of a Missing one the Key alone.
	Metadata
}

// Watch follows 1 to 256 distinct secrets: first the present state of each, then
// the changes. The newest state of each is always seen, those in between may be
// joined. Most programs want a Source.
//
// It goes on until the loop over it is left, ctx ends or an error comes, which
// has a zero Change and is the last: ErrUnavailable when the broker goes or the
// connection breaks, so that the watch should be begun again after a moment of
// random length. When the Client goes over to another connection (Config), the
// present states come again.
func (c *Client) Watch(ctx context.Context, keys ...secret.Key) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		for {
			left, err := c.watch(ctx, keys, func(change Change) bool { return yield(change, nil) })
			if left {
				return
			}
			if !errors.Is(err, errMoved) {
				yield(Change{}, err)
				return
			}
		}
	}
}

// errMoved ends a stream whose connection is no longer the one in use.
var errMoved = errors.New("another connection took the place of this one")

// watch is one stream. It reports whether yield left it, or else why it ended:
// errMoved or an *Error.
func (c *Client) watch(ctx context.Context, keys []secret.Key, yield func(Change) bool) (left bool, err error) {
	req := &secretsv1.WatchSecretsRequest{}
	for _, key := range keys {
		req.Refs = append(req.Refs, refTo(key))
	}
	conn := c.acquire()
	defer conn.calls.Done()
	streamCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(conn.ctx, cancel)()
	stream, err := conn.rpc.WatchSecrets(streamCtx, req)
	for err == nil {
		var resp *secretsv1.WatchSecretsResponse
		if resp, err = stream.Recv(); err != nil {
			break
		}
		if !yield(Change{word[ChangeType](resp.GetType(), "CHANGE_TYPE_"), toMetadata(resp.GetMetadata())}) {
			return true, nil
		}
	}
	switch {
	case ctx.Err() != nil:
		err = contextStatus(ctx)
	case conn.ctx.Err() != nil && c.ctx.Err() == nil:
		return false, errMoved
	case errors.Is(err, io.EOF): // the broker's streams end with a status that says why
		err = status.Error(codes.Unavailable, "the watch ended")
	}
	return false, newError(err, "")
}
