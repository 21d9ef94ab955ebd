package keyvault

import (
	"context"
	"net/url"
	"strconv"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"

	"github.com/exto/secrets-broker/internal/keyvaultwire"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

const (
	skipParam = "$skiptoken"
	maxPage   = 25 // of the vault's own pages
)

// Versions lists all versions, page by page.
func (v *Vault) Versions(ctx context.Context, key secret.Key) ([]vault.Properties, error) {
	var all []vault.Properties
	for skip := ""; ; {
		var page []vault.Properties
		next, err := v.page(ctx, "Versions", false, skip, maxPage, func(ctx context.Context) (*string, error) {
			page = page[:0]
			resp, err := v.client.NewListSecretPropertiesVersionsPager(key.String(), nil).NextPage(ctx)
			if err != nil {
				return nil, err
			}
			for _, item := range resp.Value {
				p, err := properties(key, item.ID, item.Attributes, item.ContentType, item.Tags)
				if err != nil {
					return nil, err
				}
				page = append(page, p)
			}
			return resp.NextLink, nil
		})
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		if skip = next; skip == "" {
			if len(all) == 0 {
				return nil, vault.ErrNotFound // a list of nothing is how a name that is gone may look
			}
			v.seenLive(key)
			return all, nil
		}
	}
}

// List gives a page of the live names.
func (v *Vault) List(ctx context.Context, skip string, max int) (vault.Page, error) {
	var page vault.Page
	next, err := v.page(ctx, "List", true, skip, max, func(ctx context.Context) (*string, error) {
		page = vault.Page{}
		resp, err := v.client.NewListSecretPropertiesPager(nil).NextPage(ctx)
		if err != nil {
			return nil, err
		}
		for _, item := range resp.Value {
			key, ok := keyOf(item.ID)
			if !ok {
				continue
			}
			p, err := properties(key, item.ID, item.Attributes, item.ContentType, item.Tags)
			if err != nil {
				return nil, err
			}
			p.Version = ""
			page.Live = append(page.Live, p)
		}
		return resp.NextLink, nil
	})
	page.Next = next
	return orZero(page, err)
}

// ListDeleted gives a page of the deleted names.
func (v *Vault) ListDeleted(ctx context.Context, skip string, max int) (vault.Page, error) {
	var page vault.Page
	next, err := v.page(ctx, "ListDeleted", true, skip, max, func(ctx context.Context) (*string, error) {
		page = vault.Page{}
		resp, err := v.client.NewListDeletedSecretPropertiesPager(nil).NextPage(ctx)
		if err != nil {
			return nil, err
		}
		for _, item := range resp.Value {
			key, ok := keyOf(item.ID)
			if !ok {
				continue
			}
			d, err := deleted(key, item.ID, item.Attributes, item.ContentType, item.Tags, item.DeletedDate, item.ScheduledPurgeDate)
			if err != nil {
				return nil, err
			}
			d.Version = ""
			page.Deleted = append(page.Deleted, d)
		}
		return resp.NextLink, nil
	})
	page.Next = next
	return orZero(page, err)
}

// page reads one page. Host and path are always the vault's: of the link to the
// next page nothing is kept but the skip token.
func (v *Vault) page(ctx context.Context, op string, listing bool, skip string, max int, f func(context.Context) (next *string, err error)) (string, error) {
	query := url.Values{"maxresults": {strconv.Itoa(min(max, maxPage))}}
	if skip != "" {
		if !isSkip(skip) {
			return "", vault.ErrSkip
		}
		query.Set(skipParam, skip)
	}
	var next string
	read := func(ctx context.Context) error {
		link, err := f(ctx)
		if err != nil || link == nil || *link == "" {
			next = ""
			return err
		}
		if next, err = skipOf(*link); err == nil && next == skip {
			err = errLink // who follows it never comes to an end
		}
		return err
	}
	err := v.again(ctx, func() error { return v.do(ctx, &call{op: op, listing: listing, query: query}, read) })
	return next, err
}

// skipOf is the skip token of a link.
func skipOf(link string) (string, error) {
	u, err := url.Parse(link)
	if err != nil {
		return "", errLink
	}
	if skip := u.Query().Get(skipParam); isSkip(skip) {
		return skip, nil
	}
	return "", errLink
}

// isSkip reports whether s can be a skip token: what base64 and numbers are made
// of, and no address. What it says is for the vault to judge.
func isSkip(s string) bool {
	if s == "" || len(s) > 4096 {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || strings.IndexByte("-._~+/=!*|", c) >= 0) {
			return false
		}
	}
	return true
}

// keyOf is the key that a listed id names. Names are case-insensitive in the
// vault, and a person may have written one in capitals.
func keyOf(id *azsecrets.ID) (secret.Key, bool) {
	if id == nil {
		return secret.Key{}, false
	}
	u, err := url.Parse(string(*id))
	if err != nil {
		return secret.Key{}, false
	}
	parts := strings.Split(strings.Trim(u.Path, "/"), "/")
	if len(parts) < 2 {
		return secret.Key{}, false
	}
	key, err := secret.ParseKey(strings.ToLower(parts[1]))
	return key, err == nil
}

// properties reads the SDK's words. A missing part is an error and no panic.
func properties(key secret.Key, id *azsecrets.ID, a *azsecrets.SecretAttributes, contentType *string, tags map[string]*string) (vault.Properties, error) {
	if id == nil || a == nil {
		return vault.Properties{}, keyvaultwire.ErrIncomplete
	}
	return keyvaultwire.Properties(key, id.Version(), a.Enabled, a.Created, contentType, tags)
}
