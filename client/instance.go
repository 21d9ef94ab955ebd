package client

import (
	"context"
	"errors"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/exto/secrets-broker/secret"
)

// Instance is the three secrets of one instance, each as a Source.
type Instance struct {
	Token            *Source
	DatabaseURI      *Source
	OIDCClientSecret *Source
}

// InstanceOptions say how an Instance begins and goes on.
type InstanceOptions struct {
	// SourceOptions are those of each of the three.
	SourceOptions
	// Optional are the kinds of which there need be no secret, as with AllowMissing.
	Optional []secret.Kind
}

// NewInstance is NewSource for the three secrets of an instance at once: it
// returns when all are held, or with the error of the first that can't be.
func NewInstance(ctx context.Context, from Getter, id secret.InstanceID, o InstanceOptions) (*Instance, error) {
	ctx, cancel := context.WithCancel(ctx)
	var instance Instance
	var all errgroup.Group
	for kind, source := range map[secret.Kind]**Source{
		secret.RegistrationToken: &instance.Token,
		secret.DatabaseURI:       &instance.DatabaseURI,
		secret.OIDCClientSecret:  &instance.OIDCClientSecret,
	} {
		all.Go(func() error {
			key, err := secret.NewKey(id, kind)
			if err == nil {
				one := o.SourceOptions
				one.AllowMissing = one.AllowMissing || slices.Contains(o.Optional, kind)
				*source, err = NewSource(ctx, from, key, one)
			}
			if err != nil {
				cancel() // the others need not be waited for
			}
			return err
		})
	}
	if err := all.Wait(); err != nil {
		cancel()
		return nil, err
	}
	context.AfterFunc(ctx, cancel)
	return &instance, nil
}

// DeleteInstance soft-deletes the three secrets of an instance; those that are
// absent or deleted already are as good. After an error or a crash it is safe to
// run again: it tries all three, and its error joins theirs.
func (c *Client) DeleteInstance(ctx context.Context, id secret.InstanceID) error {
	var errs []error
	for _, kind := range secret.Kinds() {
		key, err := secret.NewKey(id, kind)
		if err == nil {
			_, err = c.Delete(ctx, key, DeleteOptions{AllowMissing: true})
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
