package server

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/broker"
)

const (
	defaultPage = 100
	maxPage     = 1000
	maxGrace    = 24 * time.Hour
	maxWatched  = 256
)

// invalid refuses a request for one of its fields. The message says what is
// accepted and repeats nothing of what was sent: a secret may have strayed into
// any field.
func invalid(reason secret.Reason, field, format string, args ...any) error {
	return &broker.Error{Reason: reason, Field: field, Message: field + ": " + fmt.Sprintf(format, args...)}
}

func parseRef(ref *secretsv1.SecretRef) (secret.Key, error) {
	if ref == nil {
		return secret.Key{}, invalid(secret.InvalidRequest, "ref", "required: an instance_id and a kind")
	}
	id, err := parseInstance(ref.GetInstanceId(), "ref.instance_id")
	if err != nil {
		return secret.Key{}, err
	}
	key, err := secret.NewKey(id, secret.Kind(ref.GetKind()))
	if err != nil {
		return secret.Key{}, invalid(secret.InvalidKind, "ref.kind", "%v", err)
	}
	return key, nil
}

func parseInstance(s, field string) (secret.InstanceID, error) {
	id, err := secret.ParseInstanceID(s)
	if err != nil {
		return secret.InstanceID{}, invalid(secret.InvalidInstanceID, field, "%v", err)
	}
	return id, nil
}

func parseValue(kind secret.Kind, s, field string) (secret.Value, error) {
	v := secret.NewValue(s)
	if err := secret.CheckValue(kind, v); err != nil {
		return secret.Value{}, invalid(secret.InvalidValue, field, "%v", err)
	}
	return v, nil
}

func checkRequestID(s string) error {
	if s == "" {
		return nil
	}
	if id, err := uuid.Parse(s); err != nil || id.String() != s {
		return invalid(secret.InvalidRequest, "request_id", "a UUID in canonical lower case, such as 6f2c1d1e-8f1b-4f3a-9d55-0c9a3e1b7a42, or empty")
	}
	return nil
}

func parseDuration(d *durationpb.Duration, field string) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if !d.IsValid() || d.AsDuration() < 0 {
		return 0, invalid(secret.InvalidRequest, field, "a duration that is not negative, such as 60s")
	}
	return d.AsDuration(), nil
}

func parsePut(in *secretsv1.PutSecretRequest) (req broker.PutRequest, err error) {
	if req.Key, err = parseRef(in.GetRef()); err != nil {
		return req, err
	}
	if req.Value, err = parseValue(req.Key.Kind(), in.GetValue(), "value"); err != nil {
		return req, err
	}
	switch p := in.GetPrecondition().(type) {
	case *secretsv1.PutSecretRequest_MustNotExist:
		if req.MustNotExist = p.MustNotExist; !p.MustNotExist {
			return req, invalid(secret.InvalidRequest, "must_not_exist", "true, or leave it out")
		}
	case *secretsv1.PutSecretRequest_MustMatchVersion:
		if req.MustMatchVersion = p.MustMatchVersion; p.MustMatchVersion == "" {
			return req, invalid(secret.InvalidRequest, "must_match_version", "a version, or leave it out")
		}
	}
	req.RequestID = in.GetRequestId()
	return req, checkRequestID(req.RequestID)
}

func parseGet(in *secretsv1.GetSecretRequest) (req broker.GetRequest, err error) {
	if req.Key, err = parseRef(in.GetRef()); err != nil {
		return req, err
	}
	if in.GetMaxStaleness() != nil {
		bound, err := parseDuration(in.GetMaxStaleness(), "max_staleness")
		if err != nil {
			return req, err
		}
		req.MaxStaleness = &bound
	}
	req.Version, req.MinGeneration, req.KnownVersion = in.GetVersion(), in.GetMinGeneration(), in.GetKnownVersion()
	if req.MinGeneration < 0 {
		return req, invalid(secret.InvalidRequest, "min_generation", "a generation, from 1, or 0 for any")
	}
	if req.Version != "" && req.MinGeneration > 0 {
		return req, invalid(secret.InvalidRequest, "min_generation", "not together with version, which names one generation already")
	}
	return req, nil
}

func parseRotate(in *secretsv1.RotateSecretRequest) (req broker.RotateRequest, err error) {
	if req.Key, err = parseRef(in.GetRef()); err != nil {
		return req, err
	}
	if req.Key.Kind() == secret.RegistrationToken {
		if in.GetNewValue() != "" {
			return req, invalid(secret.InvalidValue, "new_value", "empty for a registration token, which the broker makes; PutSecret stores a given one")
		}
	} else if req.NewValue, err = parseValue(req.Key.Kind(), in.GetNewValue(), "new_value"); err != nil {
		return req, err
	}
	if req.Grace, err = parseDuration(in.GetGracePeriod(), "grace_period"); err != nil {
		return req, err
	}
	if req.Grace > maxGrace {
		return req, invalid(secret.InvalidRequest, "grace_period", "at most 24 h (86400s)")
	}
	req.MustMatchVersion, req.AllowMissing, req.RequestID = in.GetMustMatchVersion(), in.GetAllowMissing(), in.GetRequestId()
	return req, checkRequestID(req.RequestID)
}

func parseDelete(in *secretsv1.DeleteSecretRequest) (req broker.DeleteRequest, err error) {
	if req.Key, err = parseRef(in.GetRef()); err != nil {
		return req, err
	}
	req.MustMatchVersion, req.AllowMissing, req.RequestID = in.GetMustMatchVersion(), in.GetAllowMissing(), in.GetRequestId()
	return req, checkRequestID(req.RequestID)
}

func parseRecover(in *secretsv1.RecoverSecretRequest) (req broker.RecoverRequest, err error) {
	if req.Key, err = parseRef(in.GetRef()); err != nil {
		return req, err
	}
	req.RequestID = in.GetRequestId()
	return req, checkRequestID(req.RequestID)
}

// parseVerify reads all but what cannot be a token, which is for the broker to judge.
func parseVerify(in *secretsv1.VerifyTokenRequest) (secret.Key, secret.Value, error) {
	id, err := parseInstance(in.GetInstanceId(), "instance_id")
	if err != nil {
		return secret.Key{}, secret.Value{}, err
	}
	if in.GetToken() == "" {
		return secret.Key{}, secret.Value{}, invalid(secret.InvalidValue, "token", "required: what the instance presented")
	}
	key, err := secret.NewKey(id, secret.RegistrationToken)
	return key, secret.NewValue(in.GetToken()), err
}

func parseWatch(in *secretsv1.WatchSecretsRequest) ([]secret.Key, error) {
	if n := len(in.GetRefs()); n < 1 || n > maxWatched {
		return nil, invalid(secret.InvalidRequest, "refs", "from 1 to %d", maxWatched)
	}
	keys := make([]secret.Key, 0, len(in.GetRefs()))
	seen := map[secret.Key]bool{}
	for i, ref := range in.GetRefs() {
		key, err := parseRef(ref)
		if e := (*broker.Error)(nil); errors.As(err, &e) {
			// As the contract names it, with its place in the list.
			return nil, invalid(e.Reason, fmt.Sprintf("refs[%d]%s", i, strings.TrimPrefix(e.Field, "ref")), "%s", strings.TrimPrefix(e.Message, e.Field+": "))
		}
		if seen[key] {
			return nil, invalid(secret.InvalidRequest, fmt.Sprintf("refs[%d]", i), "each secret once")
		}
		seen[key] = true
		keys = append(keys, key)
	}
	return keys, nil
}

func parseList(in *secretsv1.ListSecretsRequest) (req broker.ListRequest, err error) {
	if in.GetInstanceId() != "" {
		if req.Instance, err = parseInstance(in.GetInstanceId(), "instance_id"); err != nil {
			return req, err
		}
	}
	req.PageSize, req.Token, req.ShowDeleted = int(in.GetPageSize()), in.GetPageToken(), in.GetShowDeleted()
	if req.PageSize < 0 || req.PageSize > maxPage {
		return req, invalid(secret.InvalidRequest, "page_size", "from 1 to %d, or 0 for %d", maxPage, defaultPage)
	}
	if req.PageSize == 0 {
		req.PageSize = defaultPage
	}
	return req, nil
}

func metadata(m broker.Metadata) *secretsv1.SecretMetadata {
	return &secretsv1.SecretMetadata{
		Ref: &secretsv1.SecretRef{
			InstanceId: m.Key.InstanceID().String(),
			Kind:       secretsv1.SecretKind(m.Key.Kind()),
		},
		Key:        m.Key.String(),
		Version:    m.Version,
		Generation: m.Generation,
		State:      secretsv1.SecretState(m.State), // numbered alike; a test holds them together
		CreateTime: timestamp(m.CreateTime),
		ExpireTime: timestamp(m.ExpireTime),
		CreatedBy:  m.CreatedBy,
		DeleteTime: timestamp(m.DeleteTime),
		PurgeTime:  timestamp(m.PurgeTime),
	}
}

// timestamp is unset for the zero time.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
