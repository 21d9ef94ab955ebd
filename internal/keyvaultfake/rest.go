package keyvaultfake

import (
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// restFace is the vault's REST API, at any api-version.
type restFace struct{ *Fake }

var validName = regexp.MustCompile(`^[0-9a-zA-Z-]{1,127}$`)

func (f restFace) read(x *exchange) {
	x.Op, x.given, x.Version = route(x.http)
	x.Name = strings.ToLower(x.given)
	x.Challenge = bearer(x.http) == ""
}

// route tells what a path asks for. An empty version and a trailing slash are the
// same. The name may be one that no secret can have.
func route(r *http.Request) (op Op, name, version string) {
	parts := strings.Split(strings.Trim(r.URL.EscapedPath(), "/"), "/")
	for i, part := range parts {
		if decoded, err := url.PathUnescape(part); err == nil {
			parts[i] = decoded
		}
	}
	if len(parts) > 1 {
		name = parts[1]
	}
	third := ""
	if len(parts) == 3 {
		third = parts[2]
	}
	switch fmt.Sprintf("%s %s %d", r.Method, parts[0], len(parts)) {
	case "GET secrets 1":
		op = OpList
	case "GET secrets 2", "GET secrets 3":
		if third == "versions" {
			return OpVersions, name, ""
		}
		return OpGet, name, third
	case "PUT secrets 2":
		op = OpSet
	case "PATCH secrets 2", "PATCH secrets 3":
		return OpUpdate, name, third
	case "DELETE secrets 2":
		op = OpDelete
	case "GET deletedsecrets 1":
		op = OpListDeleted
	case "GET deletedsecrets 2":
		op = OpGetDeleted
	case "DELETE deletedsecrets 2":
		op = OpPurge
	case "POST deletedsecrets 3":
		if third == "recover" {
			op = OpRecover
		}
	}
	return op, name, ""
}

// handle counts the request against the limits, looks who asks and whether they may,
// and lets the vault do it.
func (f restFace) handle(x *exchange, stale bool) answer {
	now := f.enter()
	defer f.mu.Unlock()
	if !f.throttle.allow(x.Op == OpSet && !x.Challenge, now) {
		return f.answer(x, answer{header: retryAfter(f.throttle.RetryAfter)}, &throttled)
	}
	if refusal := f.admit(x, now); refusal != nil {
		return *refusal
	}
	return f.perform(x, stale, now)
}

// later lets the vault do it when it is due; who asks is judged now.
func (f restFace) later(x *exchange, due time.Time) {
	now := f.enter()
	refusal := f.admit(x, now)
	f.mu.Unlock()
	if refusal == nil {
		f.postpone(due, func(now time.Time) { f.perform(x, false, now) })
	}
}

func (f restFace) refuse(x *exchange, fault Fault) answer {
	fail := throttled
	switch fault.Status {
	case http.StatusTooManyRequests:
	case http.StatusConflict:
		fail = failure{code: "Conflict", inner: fault.Inner, message: "There was a conflict with another operation on secret " + x.Name + "."}
	case http.StatusForbidden:
		fail = failure{code: "Forbidden", inner: fault.Inner, message: "Operation is not allowed on secret " + x.Name + "."}
	default:
		code := fault.Inner
		if code == "" {
			code = injectedCode(fault.Status)
		}
		fail = failure{code: code, message: "An error occurred with " + x.Name + "."}
	}
	fail.status = fault.Status
	a := answer{header: retryAfter(fault.RetryAfter)}
	if fault.Status == http.StatusUnauthorized {
		a.header.Set("WWW-Authenticate", f.challenge(`, error="invalid_token"`))
	}
	return f.answer(x, a, &fail)
}

func injectedCode(status int) string {
	switch status {
	case http.StatusBadRequest:
		return "BadParameter"
	case http.StatusUnauthorized:
		return "Unauthorized"
	case http.StatusNotFound:
		return "SecretNotFound"
	case http.StatusInternalServerError:
		return "InternalServerError"
	}
	return strings.ReplaceAll(http.StatusText(status), " ", "")
}

// admit finds who asks and whether they may; nil: yes.
func (f restFace) admit(x *exchange, now time.Time) *answer {
	t, refusal := f.authenticate(x, now)
	if refusal != nil {
		return refusal
	}
	x.Principal = t.clientID
	if x.Op != "" && !f.rights[t.clientID][x.Op] {
		refused := f.answer(x, answer{}, f.forbidden(x))
		return &refused
	}
	return nil
}

func (f restFace) forbidden(x *exchange) *failure {
	return &failure{http.StatusForbidden, "Forbidden", "ForbiddenByRbac", fmt.Sprintf("Caller is not authorized to perform action on resource.\r\n"+
		"If role assignments, deny assignments or role definitions were changed recently, please observe propagation time.\r\n"+
		"Caller: appid=%s;iss=https://sts.windows.net/%s/\r\nAction: %s\r\nResource: secrets/%s\r\nVault: %s\r\n",
		x.Principal, f.tenant, x.Op, x.Name, f.name)}
}

// perform does what is asked for somebody who may.
func (f restFace) perform(x *exchange, stale bool, now time.Time) answer {
	if f.readOnly && x.Op.writes() {
		// What Key Vault says during a failover is documented nowhere, but that it is a 403.
		return f.answer(x, answer{}, &failure{http.StatusForbidden, "Forbidden", "VaultReadOnly", "Operation is not allowed while the vault is read-only."})
	}
	if x.Op == "" {
		return f.answer(x, answer{}, &failure{status: http.StatusMethodNotAllowed, code: "NotSupported", message: "The fake has no " + x.Method + " " + x.Path + "."})
	}
	if x.Query.Get("api-version") == "" {
		return f.answer(x, answer{}, badParameter("api-version must be specified"))
	}
	if x.Op != OpList && x.Op != OpListDeleted && !validName.MatchString(x.Name) {
		return f.answer(x, answer{}, badParameter("The request URI contains an invalid name: "+x.Name))
	}
	var s *secret
	var ver *version
	var fail *failure
	switch x.Op {
	case OpList, OpListDeleted, OpVersions:
		return f.page(x, stale, now)
	case OpSet:
		var value string
		var p properties
		if value, p, fail = parseSet(x.body); fail == nil {
			s, ver, fail = f.vault.set(x.given, value, p, now)
		}
	case OpGet:
		s, ver, fail = f.vault.get(x.given, x.Version, stale, now)
	case OpUpdate:
		var p properties
		if p, fail = parseUpdate(x.body); fail == nil {
			s, ver, fail = f.vault.update(x.given, x.Version, p, now)
		}
	case OpDelete:
		s, fail = f.vault.remove(x.given, now)
	case OpGetDeleted:
		s, fail = f.vault.deleted(x.given, now)
	case OpRecover:
		s, fail = f.vault.recover(x.given, now)
	case OpPurge:
		if fail = f.vault.purge(x.given, now); fail == nil {
			return f.answer(x, answer{status: http.StatusNoContent}, nil)
		}
	}
	if fail != nil {
		return f.answer(x, answer{}, fail)
	}
	if ver == nil {
		ver = s.newest()
	}
	b := f.bundle(x, s, ver)
	b.ID += "/" + ver.id
	switch x.Op {
	case OpSet, OpGet:
		b.Value = &ver.value
	case OpDelete, OpGetDeleted:
		b.setDeleted(f.idBase(x), s)
	}
	return f.answer(x, answer{status: http.StatusOK, body: b}, nil)
}

// errorBody is how the vault words errors.
type errorBody struct {
	Error struct {
		Code    string      `json:"code"`
		Message string      `json:"message"`
		Inner   *innerError `json:"innererror,omitempty"`
	} `json:"error"`
}

type innerError struct {
	Code string `json:"code"`
}

// answer completes a with what each has, and with the failure if it is one. A 400 holds
// the request's value, as services do echo what they could not take.
func (f restFace) answer(x *exchange, a answer, fail *failure) answer {
	if a.header == nil {
		a.header = http.Header{}
	}
	a.header.Set("x-ms-keyvault-region", "westeurope")
	if fail == nil {
		return a
	}
	a.status, a.inner = fail.status, fail.code
	var body errorBody
	body.Error.Code, body.Error.Message = fail.code, fail.message
	if fail.inner != "" {
		a.inner = fail.inner
		body.Error.Inner = &innerError{fail.inner}
	}
	if fail.status == http.StatusBadRequest && len(x.body) > 0 {
		body.Error.Message += " (" + x.Method + " https://" + x.http.Host + x.Path + " was sent: " + echo(x.body) + ")"
	}
	a.body = body
	return a
}
