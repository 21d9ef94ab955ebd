package keyvaultsdk

import (
	"errors"

	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
)

// Properties reads the vault's words. A missing part is an error and no panic.
func Properties(key secret.Key, id *azsecrets.ID, a *azsecrets.SecretAttributes, contentType *string, tags map[string]*string) (versions.Properties, error) {
	if id == nil || a == nil || a.Created == nil {
		return versions.Properties{}, errors.New("the vault's answer lacks the id or the attributes of a secret")
	}
	p := versions.Properties{
		Key:     key,
		Version: id.Version(),
		Enabled: a.Enabled == nil || *a.Enabled,
		Created: a.Created.UTC(),
	}
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
