package broker

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strconv"
	"time"

	"github.com/exto/secrets-broker/internal/versions"
	"github.com/exto/secrets-broker/secret"
	"github.com/exto/secrets-broker/server/vault"
)

const (
	// tokenLife is how long a page token is accepted.
	tokenLife = time.Hour
	// maxScan bounds the names that one page looks at, for callers whom the
	// policy lets see few of many.
	maxScan = 1000
)

// ListRequest asks for a page of secrets.
type ListRequest struct {
	// Instance limits the list to one instance; zero: all.
	Instance secret.InstanceID
	// PageSize is the most secrets to return, from 1 to 1,000.
	PageSize int
	// Token is the NextToken of the page before; empty: the first page.
	Token       string
	ShowDeleted bool
	// Visible reports whether the caller may see this key. Required.
	Visible func(secret.Key) bool
}

// ListResult is a page. It may be short or empty while NextToken is set.
type ListResult struct {
	Secrets   []Metadata // without Version
	NextToken string
}

// place is where a list goes on; as a page token it is opaque to callers. It
// holds nothing secret and steers nothing: the vault adapters take from Skip no
// more than a place in their own list.
type place struct {
	Issued   int64  `json:"t"` // Unix seconds
	Instance string `json:"i,omitempty"`
	Deleted  bool   `json:"d,omitempty"` // show_deleted
	Section  int    `json:"s,omitempty"`
	Marked   bool   `json:"m,omitempty"` // the live section came upon marked ones
	Skip     string `json:"k,omitempty"`
}

// Sections of a list of all instances, in the order in which a list with
// show_deleted goes through them. The marked ones are live in the vault and
// deleted to every caller: a second look at the vault's list finds them, where
// the first came upon any.
const (
	sectionLive = iota
	sectionMarked
	sectionDeleted
)

// valid reports whether a token with this place can have been given out.
func (p place) valid() bool {
	switch {
	case p.Section < sectionLive || p.Section > sectionDeleted:
		return false
	case p.Instance != "" || !p.Deleted:
		return p.Section == sectionLive
	}
	return true
}

func (p place) token() string {
	raw, _ := json.Marshal(p) // cannot fail: strings and numbers
	return base64.RawURLEncoding.EncodeToString(raw)
}

// CheckToken is List's error for the request's Token: whether the request parses is to be
// known before anybody asks whether it is allowed.
func (b *Broker) CheckToken(req ListRequest) error {
	_, err := b.begins(req)
	return err
}

// begins is where the list begins.
func (b *Broker) begins(req ListRequest) (place, error) {
	first := place{Instance: req.Instance.String(), Deleted: req.ShowDeleted}
	if req.Token == "" {
		return first, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(req.Token)
	var from place
	if err != nil || json.Unmarshal(raw, &from) != nil || !from.valid() {
		return place{}, errToken("it is not one that a ListSecrets returned")
	}
	if from.Instance != first.Instance || from.Deleted != first.Deleted {
		return place{}, errToken("it belongs to a list with another instance_id or show_deleted")
	}
	if age := b.now().Sub(time.Unix(from.Issued, 0)); age > tokenLife || age < -tokenLife {
		return place{}, errToken("it is older than 1 h")
	}
	return from, nil
}

// List gives the metadata of many secrets, live ones first.
func (b *Broker) List(ctx context.Context, call Call, req ListRequest) (ListResult, error) {
	ctx = call.on(ctx)
	at, err := b.begins(req)
	if err != nil {
		return ListResult{}, err
	}
	at.Issued = b.now().Unix()
	var result ListResult
	if req.Instance != (secret.InstanceID{}) {
		result, err = b.listInstance(ctx, req, at)
	} else {
		result, err = b.listAll(ctx, req, at)
	}
	if errors.Is(err, vault.ErrSkip) {
		return ListResult{}, errToken("it is not one that a ListSecrets returned")
	}
	if err != nil {
		return ListResult{}, vaultError(ctx, secret.Key{}, err)
	}
	return result, nil
}

func errToken(why string) error {
	e := refuse(secret.Key{}, secret.InvalidRequest, "page_token is not accepted: %s; begin again without it", why)
	e.Field = "page_token"
	return e
}

// listInstance reads the three secrets of an instance one by one, which costs
// the vault less than its list of everything.
func (b *Broker) listInstance(ctx context.Context, req ListRequest, at place) (ListResult, error) {
	var live, deleted []Metadata
	for _, kind := range secret.Kinds() {
		key, err := secret.NewKey(req.Instance, kind)
		if err != nil {
			return ListResult{}, err
		}
		if !req.Visible(key) {
			continue
		}
		s, err := b.listed(ctx, key)
		if err != nil {
			return ListResult{}, err
		}
		m := s.metadata(s.current)
		m.Version = ""
		switch {
		case s.state == Active || s.state == Disabled:
			live = append(live, m)
		case s.state == Deleted && req.ShowDeleted:
			deleted = append(deleted, m)
		}
	}
	all := append(live, deleted...)
	skip := 0
	if at.Skip != "" {
		var err error
		if skip, err = strconv.Atoi(at.Skip); err != nil || skip < 0 {
			return ListResult{}, vault.ErrSkip
		}
	}
	all = all[min(skip, len(all)):]
	if len(all) <= req.PageSize {
		return ListResult{Secrets: all}, nil
	}
	at.Skip = strconv.Itoa(skip + req.PageSize)
	return ListResult{Secrets: all[:req.PageSize], NextToken: at.token()}, nil
}

func (b *Broker) listed(ctx context.Context, key secret.Key) (*snapshot, error) {
	aside := b.cache.aside(key)
	defer b.cache.over(key, aside)
	s, err := b.look(ctx, key, whole)
	if err == nil && !s.current.Copied() {
		b.offer(s, aside)
	}
	return s, err
}

// listAll goes through the vault's own lists until the page is full.
func (b *Broker) listAll(ctx context.Context, req ListRequest, at place) (ListResult, error) {
	var result ListResult
	for scanned := 0; scanned < maxScan; {
		room := min(req.PageSize-len(result.Secrets), maxScan-scanned)
		if room == 0 {
			break
		}
		list := b.vault.List
		if at.Section == sectionDeleted {
			list = b.vault.ListDeleted
		}
		page, err := list(ctx, at.Skip, room)
		if err != nil {
			return ListResult{}, err
		}
		for _, p := range page.Live {
			m, live := b.listedLive(p)
			at.Marked = at.Marked || !live
			if req.Visible(p.Key) && live == (at.Section == sectionLive) {
				result.Secrets = append(result.Secrets, m)
			}
		}
		for _, d := range page.Deleted {
			if req.Visible(d.Key) {
				s := &snapshot{key: d.Key, state: Deleted, deletedAt: d.DeletedAt, purgeAt: d.PurgeAt}
				result.Secrets = append(result.Secrets, s.metadata(versions.New(d.Properties)))
			}
		}
		scanned += max(1, len(page.Live)+len(page.Deleted))
		at.Skip = page.Next
		if page.Next == "" {
			if at.Section == sectionDeleted || !req.ShowDeleted {
				return result, nil
			}
			at.Section++
			if at.Section == sectionMarked && !at.Marked {
				at.Section++
			}
		}
	}
	result.NextToken = at.token()
	return result, nil
}

// listedLive is the metadata of a name that is live in the vault, and whether
// the secret is: a marked or hidden one is deleted all the same.
func (b *Broker) listedLive(p vault.Properties) (Metadata, bool) {
	v := versions.New(p)
	s := &snapshot{key: p.Key, state: Active}
	if v.Marked() {
		s.state, s.deletedAt = Deleted, v.Deleted.At
	} else if at, ok := b.isHidden(p); ok {
		s.state, s.deletedAt = Deleted, at
	}
	return s.metadata(v), s.state == Active
}
