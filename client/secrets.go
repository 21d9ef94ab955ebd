package client

import (
	"context"
	"iter"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

// State says what can be done with a secret or with one of its versions. A later
// broker may have further words.
type State string

// The states.
const (
	// Active: it can be read.
	Active State = "ACTIVE"
	// Disabled: somebody disabled it in the vault.
	Disabled State = "DISABLED"
	// Deleted: soft-deleted; Recover brings it back until PurgeTime.
	Deleted State = "DELETED"
)

// FreshnessSource says where an answer came from. A later broker may have further
// words.
type FreshnessSource string

// The sources.
const (
	// Live: from the vault, for this call.
	Live FreshnessSource = "LIVE"
	// Cache: from the broker's memory, within the bound of the call.
	Cache FreshnessSource = "CACHE"
	// StaleOnError: from the broker's memory, beyond its own bound, because the
	// vault could not be reached and the call set no MaxStaleness.
	StaleOnError FreshnessSource = "STALE_ON_ERROR"
)

// Metadata is all that is known of a secret or of one of its versions, but the
// value. Times are UTC; a zero time is one that is not set.
type Metadata struct {
	// Key names the secret; its String is what a database stores. The zero Key
	// when the broker names none that this package knows.
	Key secret.Key
	// Version is the vault's own opaque id of this version. Empty in List.
	Version string
	// Generation counts the versions of the secret: 1, 2, 3 … with gaps where a
	// write never arrived. 0: written outside the broker. After a purge the name
	// is a new secret and begins at 1.
	Generation int64
	// State is that of the secret; in DescribeResult.Versions, of this version.
	State State
	// CreateTime is when this version was written, in whole seconds.
	CreateTime time.Time
	// ExpireTime is when this version stops being honoured. Set on the versions
	// that a Rotate replaced, on no others.
	ExpireTime time.Time
	// DeleteTime is when the secret was deleted. Set in state Deleted only.
	DeleteTime time.Time
	// PurgeTime is when the vault purges it. Set in state Deleted only, and not
	// while the vault has yet to finish the delete.
	PurgeTime time.Time
	// CreatedBy is the SPIFFE ID of the caller that wrote this version. Empty at
	// generation 0.
	CreatedBy string
}

// PutOptions are the conditions of a Put. The zero value sets none.
type PutOptions struct {
	// MustNotExist refuses a secret that exists with ErrExists. A deleted one does
	// not count. Not together with MustMatchVersion.
	MustNotExist bool
	// MustMatchVersion refuses with ErrVersionMismatch unless this version is the
	// current one. It alone overwrites a disabled secret. Empty: any.
	MustMatchVersion string
	// RequestID is a UUID in canonical lower case. Empty: one is made for this
	// call. Give that of an Error to make the same call again.
	RequestID string
}

// PutResult is the version that holds the value.
type PutResult struct {
	Metadata
	// Unchanged reports that the value was the current one already, so that
	// nothing was written.
	Unchanged bool
}

// Put makes the secret hold value: it creates or overwrites it, and recovers it
// first if it is deleted. The value must be UTF-8 of at most 25,000 bytes in the
// form of the key's kind (secret.CheckValue), else ErrInvalid.
//
// Other errors: ErrExists and ErrVersionMismatch for the conditions of o, and
// ErrDisabled.
func (c *Client) Put(ctx context.Context, key secret.Key, value secret.Value, o PutOptions) (PutResult, error) {
	requestID := orNewID(o.RequestID)
	if err := checkEncoding(value, requestID); err != nil {
		return PutResult{}, err
	}
	req := &secretsv1.PutSecretRequest{Ref: refTo(key), Value: value.Reveal(), RequestId: requestID}
	switch {
	case o.MustNotExist && o.MustMatchVersion != "":
		return PutResult{}, refuse(secret.InvalidRequest, "MustNotExist and MustMatchVersion exclude each other: set one of them", requestID)
	case o.MustNotExist:
		req.Precondition = &secretsv1.PutSecretRequest_MustNotExist{MustNotExist: true}
	case o.MustMatchVersion != "":
		req.Precondition = &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: o.MustMatchVersion}
	}
	resp, err := call(ctx, c, secretsv1.SecretsBrokerServiceClient.PutSecret, req, requestID)
	if err != nil {
		return PutResult{}, err
	}
	return PutResult{toMetadata(resp.GetMetadata()), resp.GetUnchanged()}, nil
}

// GetOptions say which value is wanted and how fresh it must be. The zero value
// is the current one within the broker's own bound.
type GetOptions struct {
	// Version is the version to read. Empty: the current one.
	Version string
	// MaxStaleness is how old the answer may be, in an outage too. Nil: the
	// broker's own bound, and in an outage an older value. Zero, as in
	// new(time.Duration): the vault is asked for this call. Not negative.
	MaxStaleness *time.Duration
	// MinGeneration asks for this generation or a later one; one of generation 0,
	// as the vault holds it now, meets it too. 0: any. Not negative, and not
	// together with Version.
	MinGeneration int64
	// KnownVersion is a version that the caller holds already. When it is the
	// current one, the answer is NotModified and carries no value. Optional.
	KnownVersion string
}

// GetResult is a value and how fresh it is.
type GetResult struct {
	Metadata
	// Value is the secret. Empty when NotModified.
	Value secret.Value
	// NotModified reports that KnownVersion is the current version.
	NotModified bool
	// AsOf is the moment, by the broker's clock, at which the vault was asked for
	// this answer.
	AsOf time.Time
	// Source says where the answer came from.
	Source FreshnessSource
}

// Get reads a value. A version that a Rotate replaced is readable until its
// ExpireTime.
//
// Errors: ErrNotFound, also for a deleted secret; ErrDisabled; for a Version
// also ErrVersionNotFound and ErrVersionExpired; and ErrUnavailable, also when
// the answer can't be as fresh as o asks.
func (c *Client) Get(ctx context.Context, key secret.Key, o GetOptions) (GetResult, error) {
	req := &secretsv1.GetSecretRequest{
		Ref:           refTo(key),
		Version:       o.Version,
		MinGeneration: o.MinGeneration,
		KnownVersion:  o.KnownVersion,
	}
	if o.MaxStaleness != nil {
		req.MaxStaleness = durationpb.New(*o.MaxStaleness)
	}
	resp, err := call(ctx, c, secretsv1.SecretsBrokerServiceClient.GetSecret, req, "")
	if err != nil {
		return GetResult{}, err
	}
	return GetResult{
		Metadata:    toMetadata(resp.GetMetadata()),
		Value:       secret.NewValue(resp.GetValue()),
		NotModified: resp.GetNotModified(),
		AsOf:        toTime(resp.GetFreshness().GetAsOf()),
		Source:      word[FreshnessSource](resp.GetFreshness().GetSource(), "FRESHNESS_SOURCE_"),
	}, nil
}

// RotateOptions say how to rotate. The zero value makes a new registration token
// and ends the old one at once.
type RotateOptions struct {
	// NewValue is the new value. Empty for registration tokens, which the broker
	// makes; required for the other kinds.
	NewValue secret.Value
	// GracePeriod is how long the replaced version stays readable, from 0 to 24 h.
	// 0: it expires at once.
	GracePeriod time.Duration
	// MustMatchVersion refuses with ErrVersionMismatch unless this version is the
	// current one. It alone rotates a disabled secret. Empty: any.
	MustMatchVersion string
	// AllowMissing creates a secret that is absent, and recovers and overwrites a
	// deleted one, instead of ErrNotFound and ErrDeleted.
	AllowMissing bool
	// RequestID is as in PutOptions. The same call again returns the same token.
	RequestID string
}

// RotateResult is the new version.
type RotateResult struct {
	Metadata
	// Previous is the version that was replaced, with its ExpireTime. Nil when
	// nothing was.
	Previous *Metadata
	// Value is the token that the broker made. Empty for the other kinds.
	Value secret.Value
}

// Rotate replaces the value of a secret. Only the version that the last Rotate
// replaced can be in its grace period: a further Rotate, Put, Delete or write
// outside the broker ends it.
//
// Errors: ErrNotFound and ErrDeleted, unless AllowMissing; ErrValueUnchanged;
// ErrVersionMismatch; ErrDisabled; and ErrInvalid, also for a NewValue that is
// not in the form of its kind. A repeated call may also end with the errors of a
// Get of the version that it made; its CommitState is then secret.Applied.
func (c *Client) Rotate(ctx context.Context, key secret.Key, o RotateOptions) (RotateResult, error) {
	requestID := orNewID(o.RequestID)
	if err := checkEncoding(o.NewValue, requestID); err != nil {
		return RotateResult{}, err
	}
	req := &secretsv1.RotateSecretRequest{
		Ref:              refTo(key),
		NewValue:         o.NewValue.Reveal(),
		MustMatchVersion: o.MustMatchVersion,
		AllowMissing:     o.AllowMissing,
		RequestId:        requestID,
	}
	if o.GracePeriod != 0 {
		req.GracePeriod = durationpb.New(o.GracePeriod)
	}
	resp, err := call(ctx, c, secretsv1.SecretsBrokerServiceClient.RotateSecret, req, requestID)
	if err != nil {
		return RotateResult{}, err
	}
	return RotateResult{
		Metadata: toMetadata(resp.GetMetadata()),
		Previous: toOptional(resp.GetPrevious()),
		Value:    secret.NewValue(resp.GetValue()),
	}, nil
}

// DeleteOptions are the conditions of a Delete. The zero value sets none.
type DeleteOptions struct {
	// MustMatchVersion refuses with ErrVersionMismatch unless this version is the
	// current one. Empty: any.
	MustMatchVersion string
	// AllowMissing accepts a secret that is absent or deleted already, instead of
	// ErrNotFound.
	AllowMissing bool
	// RequestID is as in PutOptions.
	RequestID string
}

// Delete soft-deletes a secret: from the moment it returns, no read through the
// broker gives the value. The result is the deleted secret, nil when there was
// none (AllowMissing).
//
// Errors: ErrNotFound, unless AllowMissing, and ErrVersionMismatch.
func (c *Client) Delete(ctx context.Context, key secret.Key, o DeleteOptions) (*Metadata, error) {
	requestID := orNewID(o.RequestID)
	resp, err := call(ctx, c, secretsv1.SecretsBrokerServiceClient.DeleteSecret, &secretsv1.DeleteSecretRequest{
		Ref:              refTo(key),
		MustMatchVersion: o.MustMatchVersion,
		AllowMissing:     o.AllowMissing,
		RequestId:        requestID,
	}, requestID)
	if err != nil {
		return nil, err
	}
	return toOptional(resp.GetMetadata()), nil
}

// RecoverOptions are the options of a Recover.
type RecoverOptions struct {
	// RequestID is as in PutOptions.
	RequestID string
}

// Recover undoes a Delete and returns once the secret is readable again. One
// that was disabled before comes back Disabled. A grace period that ran at the
// delete is over.
//
// Errors: ErrNotFound and ErrNotDeleted.
func (c *Client) Recover(ctx context.Context, key secret.Key, o RecoverOptions) (Metadata, error) {
	requestID := orNewID(o.RequestID)
	resp, err := call(ctx, c, secretsv1.SecretsBrokerServiceClient.RecoverSecret, &secretsv1.RecoverSecretRequest{Ref: refTo(key), RequestId: requestID}, requestID)
	if err != nil {
		return Metadata{}, err
	}
	return toMetadata(resp.GetMetadata()), nil
}

// DescribeResult is what is known of a secret: its state and its current
// version.
type DescribeResult struct {
	Metadata
	// RedactedValue is a database URI without its secrets, such as
	// mongodb://app:***@db-7:27017/orders, and *** for the other kinds and for what
	// does not parse. Empty unless the state is Active.
	RedactedValue string
	// Versions are all versions: the current one first, then by creation, newest
	// first. Of a deleted secret the current one alone.
	Versions []Metadata
}

// Describe gives all that is known of a secret but its value.
//
// Errors: ErrNotFound. A disabled or a deleted secret is none.
func (c *Client) Describe(ctx context.Context, key secret.Key) (DescribeResult, error) {
	resp, err := call(ctx, c, secretsv1.SecretsBrokerServiceClient.DescribeSecret, &secretsv1.DescribeSecretRequest{Ref: refTo(key)}, "")
	if err != nil {
		return DescribeResult{}, err
	}
	result := DescribeResult{Metadata: toMetadata(resp.GetMetadata()), RedactedValue: resp.GetRedactedValue()}
	for _, version := range resp.GetVersions() {
		result.Versions = append(result.Versions, toMetadata(version))
	}
	return result, nil
}

// ListOptions say what to list. The zero value is all live secrets.
type ListOptions struct {
	// InstanceID limits the list to one instance. Zero: all instances.
	InstanceID secret.InstanceID
	// PageSize is how many secrets one call to the broker asks for, from 1 to
	// 1,000. 0: 100. The list itself is complete with any.
	PageSize int32
	// ShowDeleted lists the deleted secrets too, after the live ones.
	ShowDeleted bool
}

// List gives the metadata of all secrets that the caller may list, without their
// Version. It asks for a page whenever the one before is used up; a range over
// it begins with the first page each time. A secret that changes meanwhile may
// be missing, and those of a kind that this package does not know are left out.
//
// An error comes with a zero Metadata and is the last. A context without
// deadline gets 30 s for each page.
func (c *Client) List(ctx context.Context, o ListOptions) iter.Seq2[Metadata, error] {
	return func(yield func(Metadata, error) bool) {
		for pageToken := ""; ; {
			resp, err := call(ctx, c, secretsv1.SecretsBrokerServiceClient.ListSecrets, &secretsv1.ListSecretsRequest{
				InstanceId:  o.InstanceID.String(),
				PageSize:    o.PageSize,
				PageToken:   pageToken,
				ShowDeleted: o.ShowDeleted,
			}, "")
			if err != nil {
				yield(Metadata{}, err)
				return
			}
			for _, s := range resp.GetSecrets() {
				m := toMetadata(s)
				if m.Key != (secret.Key{}) && !yield(m, nil) {
					return
				}
			}
			if pageToken = resp.GetNextPageToken(); pageToken == "" {
				return
			}
		}
	}
}

// ParseKey is secret.ParseKey: it reads back what Key.String made, such as the
// reference in a database's row.
func ParseKey(s string) (secret.Key, error) { return secret.ParseKey(s) }

func orNewID(requestID string) string {
	if requestID != "" {
		return requestID
	}
	return uuid.NewString()
}

// checkEncoding refuses what protobuf would not encode: gRPC calls that
// INTERNAL, as if it were nobody's fault. All other rules are the broker's.
func checkEncoding(value secret.Value, requestID string) error {
	if valid(value) {
		return nil
	}
	return refuse(secret.InvalidValue, "the value is not valid UTF-8", requestID)
}

func valid(value secret.Value) bool { return utf8.ValidString(value.Reveal()) }

// refTo relies on secret.Kind having the numbers of the contract.
func refTo(key secret.Key) *secretsv1.SecretRef {
	return &secretsv1.SecretRef{InstanceId: key.InstanceID().String(), Kind: secretsv1.SecretKind(key.Kind())}
}

func toMetadata(m *secretsv1.SecretMetadata) Metadata {
	key, _ := secret.ParseKey(m.GetKey()) // zero when it is none
	return Metadata{
		Key:        key,
		Version:    m.GetVersion(),
		Generation: m.GetGeneration(),
		State:      word[State](m.GetState(), "SECRET_STATE_"),
		CreateTime: toTime(m.GetCreateTime()),
		ExpireTime: toTime(m.GetExpireTime()),
		DeleteTime: toTime(m.GetDeleteTime()),
		PurgeTime:  toTime(m.GetPurgeTime()),
		CreatedBy:  m.GetCreatedBy(),
	}
}

func toOptional(m *secretsv1.SecretMetadata) *Metadata {
	if m == nil {
		return nil
	}
	result := toMetadata(m)
	return &result
}

func toTime(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{} // AsTime would give 1970
	}
	return t.AsTime()
}

// word is the name of an enum's value without the prefix that proto asks for,
// and its number when this package does not know it. Empty for 0, unspecified.
func word[W ~string, E enum](value E, prefix string) W {
	if value == 0 {
		return ""
	}
	return W(strings.TrimPrefix(value.String(), prefix))
}

type enum interface {
	~int32
	String() string
}
