package keyvaultwire_test

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/exto/secrets-broker/internal/keyvaultwire"
)

func TestOneLine(t *testing.T) {
	t.Parallel()
	if got, want := keyvaultwire.OneLine(errors.New("a\n\tb\r\n-----\nc")), "a b c"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := keyvaultwire.OneLine(errors.New(strings.Repeat("ü", 500) + "x" + strings.Repeat("ü", 500))); len(got) > 700 || strings.ContainsRune(got, '\uFFFD') {
		t.Errorf("got %q, want it cut between two letters", got)
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"7":                             7 * time.Second,
		"-7":                            0,
		"61":                            time.Minute,
		"10000000000":                   time.Minute, // overflows in nanoseconds
		"9223372036854775807":           time.Minute,
		"soon":                          0,
		"Mon, 02 Jan 2006 15:04:05 GMT": 0, // gone by
		"Fri, 02 Jan 2999 15:04:05 GMT": time.Minute,
	} {
		resp := &http.Response{Header: http.Header{"Retry-After": {header}}}
		if got := keyvaultwire.RetryAfter(resp); got != want {
			t.Errorf("%q: got %v, want %v", header, got, want)
		}
	}
}
