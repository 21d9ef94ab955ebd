package embedded

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"

	"go.etcd.io/bbolt"

	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

// Versions lists the newest version first and the others in no order.
func (s *Store) Versions(ctx context.Context, key secret.Key) ([]vault.Properties, error) {
	name, err := nameOf(ctx, key)
	if err != nil {
		return nil, err
	}
	var all []vault.Properties
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		_, _, r, err := find(tx, name, "")
		if err != nil {
			return err
		}
		p, err := r.properties(key)
		if err != nil {
			return err
		}
		all = append(all, p)
		older, prefix := openTable(tx, tableVersions), olderPrefix(name)
		c := older.bucket.Cursor()
		for k, data := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, data = c.Next() {
			r, err := decodeRecord(older.name, k, data)
			if err != nil {
				return err
			}
			if p, err = r.properties(key); err != nil {
				return err
			}
			all = append(all, p)
		}
		return nil
	})
	return orZero(all, err)
}

// List is in the order of names.
func (s *Store) List(ctx context.Context, skip string, max int) (vault.Page, error) {
	var page vault.Page
	next, err := s.list(ctx, tableLive, skip, max, func(key secret.Key, r record) error {
		p, err := r.properties(key)
		p.Version = ""
		page.Live = append(page.Live, p)
		return err
	})
	page.Next = next
	return orZero(page, err)
}

// ListDeleted is in the order of names.
func (s *Store) ListDeleted(ctx context.Context, skip string, max int) (vault.Page, error) {
	var page vault.Page
	next, err := s.list(ctx, tableDeleted, skip, max, func(key secret.Key, r record) error {
		d, err := r.deletedProperties(key)
		d.Version = ""
		page.Deleted = append(page.Deleted, d)
		return err
	})
	page.Next = next
	return orZero(page, err)
}

// list gives up to max names after skip to add. next is empty when there are no
// more.
func (s *Store) list(ctx context.Context, tableName, skip string, max int, add func(secret.Key, record) error) (next string, err error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if max < 1 {
		return "", errors.New("embedded store: a page has at least 1 item")
	}
	after, err := parseSkip(tableName, skip)
	if err != nil {
		return "", err
	}
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		now := s.now()
		t := openTable(tx, tableName)
		c := t.bucket.Cursor()
		name, data := c.Seek(after)
		if name != nil && bytes.Equal(name, after) {
			name, data = c.Next()
		}
		for n := 0; name != nil; name, data = c.Next() {
			r, err := decodeRecord(t.name, name, data)
			if err != nil {
				return err
			}
			if t.name == tableDeleted && r.purged(now) {
				continue
			}
			key, err := secret.ParseKey(string(name))
			if err != nil {
				continue
			}
			if n == max {
				next = formatSkip(tableName, after)
				return nil
			}
			if err := add(key, r); err != nil {
				return err
			}
			n++
			after = bytes.Clone(name)
		}
		return nil
	})
	return next, err
}

// A skip is the list and the last name of the page before, encoded, so that
// nobody takes it for something to make up.
func formatSkip(tableName string, last []byte) string {
	return base64.RawURLEncoding.EncodeToString(append([]byte(tableName+" "), last...))
}

func parseSkip(tableName, skip string) (after []byte, err error) {
	if skip == "" {
		return nil, nil
	}
	decoded, err := base64.RawURLEncoding.DecodeString(skip)
	if err != nil {
		return nil, vault.ErrSkip
	}
	after, ok := bytes.CutPrefix(decoded, []byte(tableName+" "))
	if !ok {
		return nil, vault.ErrSkip
	}
	if _, err := secret.ParseKey(string(after)); err != nil {
		return nil, vault.ErrSkip
	}
	return after, nil
}
