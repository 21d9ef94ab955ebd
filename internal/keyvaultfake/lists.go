package keyvaultfake

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// maxPage is the most and the default of maxresults.
const maxPage = 25

// list is a page.
type list struct {
	Value    []bundle `json:"value"`
	NextLink *string  `json:"nextLink"`
}

// marker is what a skip token holds: the last key of the page before. What is made or
// goes between two pages therefore shifts nothing.
type marker struct {
	Last string `json:"last"`
}

// item of a list before it is cut into pages, in order of key.
type item struct {
	key string
	bundle
}

// page answers the lists.
func (f restFace) page(x *exchange, stale bool, now time.Time) answer {
	limit, after, fail := paging(x.Query)
	if fail != nil {
		return f.answer(x, answer{}, fail)
	}
	var items []item
	if x.Op == OpVersions {
		items = f.versionItems(x, stale, now)
	} else {
		items = f.nameItems(x, now)
	}
	slices.SortFunc(items, func(a, b item) int { return cmp.Compare(a.key, b.key) })
	page := list{Value: []bundle{}}
	for _, it := range items {
		if it.key <= after {
			continue
		}
		if len(page.Value) == limit {
			link := nextLink(x, limit, after)
			page.NextLink = &link
			break
		}
		page.Value = append(page.Value, it.bundle)
		after = it.key
	}
	return f.answer(x, answer{status: http.StatusOK, body: page}, nil)
}

// nameItems are the live or the deleted names, with what their newest versions have.
func (f restFace) nameItems(x *exchange, now time.Time) []item {
	want := Live
	if x.Op == OpListDeleted {
		want = Deleted
	}
	var items []item
	for key := range f.vault.secrets {
		s, state := f.vault.find(key, now)
		if state != want {
			continue
		}
		b := f.bundle(x, s, s.newest())
		if state == Deleted {
			b.setDeleted(f.idBase(x), s)
		}
		items = append(items, item{key, b})
	}
	return items
}

// versionItems are in the order of ids, which is none that means anything. For a name
// that is not there the list is empty: unlike a get, it is not an error.
func (f restFace) versionItems(x *exchange, stale bool, now time.Time) []item {
	s, versions := f.vault.readable(x.Name, stale, now)
	items := make([]item, len(versions))
	for i, ver := range versions {
		b := f.bundle(x, s, ver)
		b.ID += "/" + ver.id
		items[i] = item{ver.id, b}
	}
	return items
}

// paging reads how much is asked for, and after what.
func paging(query url.Values) (limit int, after string, fail *failure) {
	limit = maxPage
	if given := query.Get("maxresults"); given != "" {
		var err error
		if limit, err = strconv.Atoi(given); err != nil || limit < 1 || limit > maxPage {
			return 0, "", badParameter("Invalid maxresults: " + given)
		}
	}
	token := query.Get("$skiptoken")
	if token == "" {
		return limit, "", nil
	}
	decoded, err := base64.RawURLEncoding.DecodeString(token)
	var m marker
	if err != nil || json.Unmarshal(decoded, &m) != nil || m.Last == "" {
		return 0, "", badParameter("Invalid $skiptoken: " + token)
	}
	return limit, m.Last, nil
}

// nextLink names the port, as Key Vault's does.
func nextLink(x *exchange, limit int, last string) string {
	encoded, err := json.Marshal(marker{last})
	if err != nil {
		panic(err) // a string
	}
	return fmt.Sprintf("https://%s:443%s?api-version=%s&$skiptoken=%s&maxresults=%d", hostname(x),
		strings.TrimSuffix(x.http.URL.EscapedPath(), "/"), url.QueryEscape(x.Query.Get("api-version")),
		base64.RawURLEncoding.EncodeToString(encoded), limit)
}
