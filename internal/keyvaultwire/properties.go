package keyvaultwire

import (
	"errors"
	"time"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
)

// ErrIncomplete is of an answer that is not what the vault's API says.
var ErrIncomplete = errors.New("the vault's answer lacks the id or the attributes of a secret")

// Properties reads the vault's words, of which those that are not there are nil. In a list
// of names, the vault gives no versions.
func Properties(key secret.Key, version string, enabled *bool, created *time.Time, contentType *string, tags map[string]*string) (versions.Properties, error) {
	if created == nil {
		return versions.Properties{}, ErrIncomplete
	}
	p := versions.Properties{Key: key, Version: version, Enabled: enabled == nil || *enabled, Created: created.UTC()}
	if contentType != nil {
		p.ContentType = *contentType
	}
	for name, value := range tags {
		if p.Tags == nil {
			p.Tags = versions.Tags{}
		}
		if value != nil {
			p.Tags[name] = *value
		} else {
			p.Tags[name] = ""
		}
	}
	return p, nil
}
