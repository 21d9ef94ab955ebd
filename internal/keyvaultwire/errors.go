package keyvaultwire

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// InnerDisabled is the inner code of the 403 for a version that is disabled.
const InnerDisabled = "SecretDisabled"

// AnswerError is an answer of the vault that is no success, without its body
// and without the secret's name: for the log.
type AnswerError struct {
	Op, Code, Inner   string
	Status            int
	RequestID, Region string
}

func (e *AnswerError) Error() string {
	s := fmt.Sprintf("%s: the vault answered %d %s", e.Op, e.Status, e.Code)
	if e.Inner != "" {
		s += " " + e.Inner
	}
	return s + fmt.Sprintf(" (x-ms-request-id %s, region %s)", e.RequestID, e.Region)
}

// NewAnswerError takes of an answer what may be told; code is what the SDK read of it.
func NewAnswerError(op, code string, header http.Header, status int, body []byte) *AnswerError {
	return &AnswerError{
		Op: op, Status: status, Code: word(code), Inner: innerCode(body),
		RequestID: word(header.Get("x-ms-request-id")), Region: word(header.Get("x-ms-keyvault-region")),
	}
}

// innerCode is error.innererror.code of an answer, which azcore does not read.
func innerCode(body []byte) string {
	var told struct {
		Error struct {
			Inner struct {
				Code string `json:"code"`
			} `json:"innererror"`
		} `json:"error"`
	}
	if json.Unmarshal(body, &told) != nil {
		return ""
	}
	return word(told.Error.Inner.Code)
}

// word lets nothing into a log line but a code or an id, so that no body gets
// there by way of one.
func word(s string) string {
	if len(s) > 64 {
		return "?"
	}
	for _, c := range []byte(s) {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '_' || c == '.') {
			return "?"
		}
	}
	return s
}

// TransportError is err without the URL, which holds the secret's name.
func TransportError(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// RetryAfter is the answer's Retry-After; zero when there is none.
func RetryAfter(resp *http.Response) time.Duration {
	if resp == nil {
		return 0
	}
	at := resp.Header.Get("Retry-After")
	if seconds, err := strconv.Atoi(at); err == nil {
		return time.Duration(min(max(seconds, 0), 60)) * time.Second
	}
	if t, err := http.ParseTime(at); err == nil {
		return min(max(time.Until(t), 0), time.Minute)
	}
	return 0
}

// WrongTenant is how azidentity says that it does not ask at all, in the one error
// without an answer for which waiting does not help.
const WrongTenant = "isn't configured to acquire tokens for tenant"

// Refuses reports whether err, of a credential, is a refusal, or that there is no
// credential: not that the token service cannot be reached or cannot do its work. Where
// a credential did ask, answer is what it got, which may be nothing.
func Refuses(err error, asked bool, answer *http.Response) bool {
	switch {
	case asked && strings.Contains(err.Error(), WrongTenant):
		return true
	case asked && answer == nil, errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return false
	case asked:
		status := answer.StatusCode
		return status < http.StatusInternalServerError && status != http.StatusTooManyRequests && status != http.StatusRequestTimeout
	}
	return true // no credential of the chain had what it takes to ask
}

// OneLine makes a line of the SDK's paragraphs.
func OneLine(err error) string {
	const most = 600
	s := strings.Join(strings.Fields(strings.ReplaceAll(err.Error(), "-----", "")), " ")
	if len(s) > most {
		s = fmt.Sprintf("%s… (%d characters)", strings.ToValidUTF8(s[:most], ""), len(s))
	}
	return s
}
