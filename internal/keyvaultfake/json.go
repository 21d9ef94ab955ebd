package keyvaultfake

import (
	"encoding/json"
	"net"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"
)

// What Key Vault takes.
const (
	maxValue       = 25 * 1024 // bytes
	maxContentType = 255       // characters
	maxTags        = 15
	maxTag         = 512 // characters, of name and of value
)

// parameters are the body of a set or an update.
type parameters struct {
	Value       *string `json:"value"`
	ContentType *string `json:"contentType"`
	Attributes  *struct {
		Enabled   *bool  `json:"enabled"`
		NotBefore *int64 `json:"nbf"`
		Expires   *int64 `json:"exp"`
	} `json:"attributes"`
	Tags map[string]*string `json:"tags"`
}

func badParameter(message string) *failure {
	return &failure{status: http.StatusBadRequest, code: "BadParameter", message: message}
}

func parseSet(body []byte) (string, properties, *failure) {
	var in parameters
	if json.Unmarshal(body, &in) != nil || in.Value == nil {
		return "", properties{}, badParameter("Property value is missing or the body is not JSON")
	}
	if len(*in.Value) > maxValue {
		return "", properties{}, badParameter("Property value has to be at most 25 KB")
	}
	p, fail := in.properties()
	return *in.Value, p, fail
}

func parseUpdate(body []byte) (properties, *failure) {
	var in parameters
	if json.Unmarshal(body, &in) != nil {
		return properties{}, badParameter("The body is not JSON")
	}
	return in.properties() // a value cannot be changed, and is not looked at
}

func (in parameters) properties() (properties, *failure) {
	p := properties{contentType: in.ContentType}
	if in.ContentType != nil && utf8.RuneCountInString(*in.ContentType) > maxContentType {
		return p, badParameter("Property contentType has to be at most 255 characters")
	}
	if a := in.Attributes; a != nil {
		p.enabled, p.notBefore, p.expires = a.Enabled, a.NotBefore, a.Expires
	}
	if len(in.Tags) > maxTags {
		return p, badParameter("There can be at most 15 tags")
	}
	if in.Tags == nil {
		return p, nil
	}
	p.tags = map[string]string{}
	for name, value := range in.Tags {
		if value == nil {
			value = new(string)
		}
		if utf8.RuneCountInString(name) > maxTag || utf8.RuneCountInString(*value) > maxTag {
			return p, badParameter("A tag's name and value have to be at most 512 characters")
		}
		p.tags[name] = *value
	}
	return p, nil
}

// echo is what an error repeats of a body: its value, as it is, or else all of it.
func echo(body []byte) string {
	var in parameters
	if json.Unmarshal(body, &in) == nil && in.Value != nil {
		return *in.Value
	}
	return string(body)
}

type attributes struct {
	Enabled         bool   `json:"enabled"`
	NotBefore       *int64 `json:"nbf,omitempty"`
	Expires         *int64 `json:"exp,omitempty"`
	Created         int64  `json:"created"`
	Updated         int64  `json:"updated"`
	RecoveryLevel   string `json:"recoveryLevel"`
	RecoverableDays int    `json:"recoverableDays"`
}

// bundle is a secret, a deleted secret, or an item of a list, by what is set.
type bundle struct {
	Value              *string           `json:"value,omitempty"`
	ContentType        string            `json:"contentType,omitempty"`
	ID                 string            `json:"id"`
	Attributes         attributes        `json:"attributes"`
	Tags               map[string]string `json:"tags,omitempty"`
	RecoveryID         string            `json:"recoveryId,omitempty"`
	DeletedDate        int64             `json:"deletedDate,omitempty"`
	ScheduledPurgeDate int64             `json:"scheduledPurgeDate,omitempty"`
}

// bundle is a version with the id of its secret, without the value.
func (f restFace) bundle(x *exchange, s *secret, ver *version) bundle {
	level := "Recoverable"
	if f.vault.retention < defaultRetention {
		level = "CustomizedRecoverable"
	}
	if !f.vault.purgeProtection {
		level += "+Purgeable"
	}
	return bundle{
		ID:          f.idBase(x) + "/secrets/" + s.name,
		ContentType: ver.contentType,
		Tags:        ver.tags,
		Attributes: attributes{
			Enabled: ver.enabled, NotBefore: ver.notBefore, Expires: ver.expires,
			Created: ver.created.Unix(), Updated: ver.updated.Unix(),
			RecoveryLevel: level, RecoverableDays: int(f.vault.retention / (24 * time.Hour)),
		},
	}
}

func (b *bundle) setDeleted(base string, s *secret) {
	b.RecoveryID = base + "/deletedsecrets/" + s.name
	b.DeletedDate, b.ScheduledPurgeDate = s.deletedAt.Unix(), s.purgeAt.Unix()
}

// idBase is the vault's URL as the request has it. The links to next pages name the
// port; ids never do.
func (f restFace) idBase(x *exchange) string { return "https://" + hostname(x) }

func hostname(x *exchange) string {
	if host, _, err := net.SplitHostPort(x.http.Host); err == nil {
		return strings.ToLower(host)
	}
	return strings.ToLower(x.http.Host)
}
