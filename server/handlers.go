package server

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/server/broker"
)

// service has one handler per RPC: parse, ask the gate, ask the broker, answer.
type service struct {
	secretsv1.UnsafeSecretsBrokerServiceServer
	broker *broker.Broker
	gate   *gate
}

var _ secretsv1.SecretsBrokerServiceServer = (*service)(nil)

func (s *service) PutSecret(ctx context.Context, in *secretsv1.PutSecretRequest) (*secretsv1.PutSecretResponse, error) {
	c := callFrom(ctx)
	req, err := parsePut(in)
	if err != nil {
		return nil, err
	}
	c.requestID = req.RequestID
	if err := s.gate.allow(c, req.Key); err != nil {
		return nil, err
	}
	result, err := s.broker.Put(ctx, s.gate.onBehalf(c), req)
	if err != nil {
		return nil, err
	}
	c.gave(result.Version, result.Generation)
	return &secretsv1.PutSecretResponse{Metadata: metadata(result.Metadata), Unchanged: result.Unchanged}, nil
}

func (s *service) GetSecret(ctx context.Context, in *secretsv1.GetSecretRequest) (*secretsv1.GetSecretResponse, error) {
	c := callFrom(ctx)
	req, err := parseGet(in)
	if err != nil {
		return nil, err
	}
	if err := s.gate.allow(c, req.Key); err != nil {
		return nil, err
	}
	result, err := s.broker.Get(ctx, s.gate.onBehalf(c), req)
	if err != nil {
		return nil, err
	}
	c.gave(result.Version, result.Generation)
	return &secretsv1.GetSecretResponse{
		Metadata:    metadata(result.Metadata),
		Value:       result.Value.Reveal(),
		NotModified: result.NotModified,
		Freshness:   &secretsv1.Freshness{AsOf: timestamppb.New(result.AsOf), Source: secretsv1.FreshnessSource(result.Source)},
	}, nil
}

func (s *service) RotateSecret(ctx context.Context, in *secretsv1.RotateSecretRequest) (*secretsv1.RotateSecretResponse, error) {
	c := callFrom(ctx)
	req, err := parseRotate(in)
	if err != nil {
		return nil, err
	}
	c.requestID = req.RequestID
	if err := s.gate.allow(c, req.Key); err != nil {
		return nil, err
	}
	result, err := s.broker.Rotate(ctx, s.gate.onBehalf(c), req)
	if err != nil {
		return nil, err
	}
	c.gave(result.Version, result.Generation)
	out := &secretsv1.RotateSecretResponse{Metadata: metadata(result.Metadata), Value: result.Token.Reveal()}
	if result.Previous != nil {
		out.Previous = metadata(*result.Previous)
	}
	return out, nil
}

func (s *service) DeleteSecret(ctx context.Context, in *secretsv1.DeleteSecretRequest) (*secretsv1.DeleteSecretResponse, error) {
	c := callFrom(ctx)
	req, err := parseDelete(in)
	if err != nil {
		return nil, err
	}
	c.requestID = req.RequestID
	if err := s.gate.allow(c, req.Key); err != nil {
		return nil, err
	}
	result, err := s.broker.Delete(ctx, s.gate.onBehalf(c), req)
	if err != nil {
		return nil, err
	}
	out := &secretsv1.DeleteSecretResponse{}
	if result != nil {
		c.gave(result.Version, result.Generation)
		out.Metadata = metadata(*result)
	}
	return out, nil
}

func (s *service) RecoverSecret(ctx context.Context, in *secretsv1.RecoverSecretRequest) (*secretsv1.RecoverSecretResponse, error) {
	c := callFrom(ctx)
	req, err := parseRecover(in)
	if err != nil {
		return nil, err
	}
	c.requestID = req.RequestID
	if err := s.gate.allow(c, req.Key); err != nil {
		return nil, err
	}
	result, err := s.broker.Recover(ctx, s.gate.onBehalf(c), req)
	if err != nil {
		return nil, err
	}
	c.gave(result.Version, result.Generation)
	return &secretsv1.RecoverSecretResponse{Metadata: metadata(result)}, nil
}

func (s *service) VerifyToken(ctx context.Context, in *secretsv1.VerifyTokenRequest) (*secretsv1.VerifyTokenResponse, error) {
	c := callFrom(ctx)
	key, token, err := parseVerify(in)
	if err != nil {
		return nil, err
	}
	if err := s.gate.allow(c, key); err != nil {
		return nil, err
	}
	call := s.gate.onBehalf(c)
	call.Crowded = c.crowded
	v, err := s.broker.Verify(ctx, call, key, token)
	if err != nil && !c.crowded {
		return nil, err
	}
	if c.overQuota != nil && (err != nil || v.Result == broker.NoMatch) {
		// No longer: it has a place among the caller's calls, which a token that matches
		// must find.
		wait(ctx, quotaPause)
		return nil, c.overQuota
	}
	c.match = v.Result != broker.NoMatch
	return &secretsv1.VerifyTokenResponse{
		Result:     secretsv1.VerifyResult(v.Result),
		Generation: v.Generation,
		ExpireTime: timestamp(v.ExpireTime),
	}, nil
}

func (s *service) DescribeSecret(ctx context.Context, in *secretsv1.DescribeSecretRequest) (*secretsv1.DescribeSecretResponse, error) {
	c := callFrom(ctx)
	key, err := parseRef(in.GetRef())
	if err != nil {
		return nil, err
	}
	if err := s.gate.allow(c, key); err != nil {
		return nil, err
	}
	result, err := s.broker.Describe(ctx, s.gate.onBehalf(c), key)
	if err != nil {
		return nil, err
	}
	c.gave(result.Version, result.Generation)
	out := &secretsv1.DescribeSecretResponse{Metadata: metadata(result.Metadata), RedactedValue: result.Redacted}
	for _, v := range result.Versions {
		out.Versions = append(out.Versions, metadata(v))
	}
	return out, nil
}

func (s *service) ListSecrets(ctx context.Context, in *secretsv1.ListSecretsRequest) (*secretsv1.ListSecretsResponse, error) {
	c := callFrom(ctx)
	req, err := parseList(in)
	if err != nil {
		return nil, err
	}
	if err := s.broker.CheckToken(req); err != nil {
		return nil, err
	}
	if in.GetInstanceId() != "" {
		if err := s.gate.allowInstance(c, req.Instance); err != nil {
			return nil, err
		}
	}
	req.Visible = s.gate.visible(c)
	result, err := s.broker.List(ctx, s.gate.onBehalf(c), req)
	if err != nil {
		return nil, err
	}
	out := &secretsv1.ListSecretsResponse{NextPageToken: result.NextToken}
	for _, m := range result.Secrets {
		out.Secrets = append(out.Secrets, metadata(m))
	}
	return out, nil
}

func (s *service) WatchSecrets(in *secretsv1.WatchSecretsRequest, stream grpc.ServerStreamingServer[secretsv1.WatchSecretsResponse]) error {
	ctx := stream.Context()
	c := callFrom(ctx)
	keys, err := parseWatch(in)
	if err != nil {
		return err
	}
	if err := s.gate.allowWatch(c, keys); err != nil {
		return err
	}
	defer c.watches.Add(-1)
	if c.watches.Add(1) > maxWatches {
		return errTooManyWatches()
	}
	if err := s.gate.opened(ctx, c); err != nil {
		return err
	}
	return s.broker.Watch(ctx, s.gate.onBehalf(c), keys, func(e broker.Event) error {
		return stream.Send(&secretsv1.WatchSecretsResponse{Type: secretsv1.ChangeType(e.Change), Metadata: metadata(e.Metadata)})
	})
}
