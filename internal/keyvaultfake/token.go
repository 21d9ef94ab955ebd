package keyvaultfake

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	resource      = "https://vault.azure.net"
	tokenLife     = time.Hour
	assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
	identityPath  = "/msi/token"
)

// token is a bearer token that was given out. Those that the fake does not know were
// never given out or are refused.
type token struct {
	clientID string
	expires  time.Time
	revoked  bool
}

// issue makes a token. Whoever calls it holds mu.
func (f *Fake) issue(clientID string, now time.Time) string {
	name := randomHex() + randomHex()
	f.tokens[name] = &token{clientID: clientID, expires: now.Add(tokenLife)}
	return name
}

// ExpireTokens makes the vault refuse every token that was given out so far with
// error="invalid_token". The SDK does not recover from that: it asks its credential,
// whose cache gives the same token for as long as it should have lived.
func (f *Fake) ExpireTokens() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.tokens)
}

// RevokeTokens makes the vault refuse every token that was given out so far with a
// claims challenge, as continuous access evaluation does. The SDK then gets a new one,
// past its cache.
func (f *Fake) RevokeTokens() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, t := range f.tokens {
		t.revoked = true
	}
}

func bearer(r *http.Request) string {
	scheme, name, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return name
}

// authenticate finds the token of a request to the vault, or answers the challenge.
func (f restFace) authenticate(x *exchange, now time.Time) (*token, *answer) {
	fail := &failure{status: http.StatusUnauthorized, code: "Unauthorized"}
	more := ""
	t := f.tokens[bearer(x.http)]
	switch {
	case x.Challenge:
		fail.message = "AKV10000: Request is missing a Bearer or PoP token."
	case t == nil:
		fail.message = "[TokenExpired] Error validating token: 'S2S12086'."
		more = `, error="invalid_token"`
	case t.revoked, !now.Before(t.expires):
		// A token that is too old by the fake's clock is so too: the clock of the client's
		// cache was not advanced, and nothing else makes it ask for a new one.
		fail.message = "Continuous access evaluation resulted in challenge."
		claims := fmt.Sprintf(`{"access_token":{"nbf":{"essential":true,"value":"%d"}}}`, now.Unix())
		more = `, error="insufficient_claims", claims="` + base64.StdEncoding.EncodeToString([]byte(claims)) + `"`
	default:
		return t, nil
	}
	header := http.Header{}
	header.Set("WWW-Authenticate", f.challenge(more))
	refusal := f.answer(x, answer{header: header}, fail)
	return nil, &refusal
}

// challenge tells a client whom to ask for a token, and for what.
func (f *Fake) challenge(more string) string {
	return fmt.Sprintf(`Bearer authorization="https://%s/%s", resource="%s"%s`, loginHost, f.tenant, resource, more)
}

// tokenFace is as much of Entra as a confidential client asks.
type tokenFace struct{ *Fake }

func (f tokenFace) read(x *exchange) {
	switch {
	case strings.HasSuffix(x.Path, "/oauth2/v2.0/token"):
		x.Op = OpToken
	case strings.HasSuffix(x.Path, "/v2.0/.well-known/openid-configuration"), x.Path == "/common/discovery/instance":
		x.Op = OpDiscovery
	}
	if x.ClientRequestID == "" {
		x.ClientRequestID = x.http.Header.Get("client-request-id") // Entra's name for it
	}
}

func (tokenFace) later(*exchange, time.Time) {} // a token that nobody gets

func (f tokenFace) refuse(x *exchange, fault Fault) answer {
	code := fault.Inner
	if code == "" {
		code = "temporarily_unavailable"
	}
	a := tokenError(x, fault.Status, code, 90033, "A transient error has occurred. Please try again.")
	a.header = retryAfter(fault.RetryAfter)
	return a
}

func (f tokenFace) handle(x *exchange, _ bool) answer {
	tenant, _, _ := strings.Cut(strings.TrimPrefix(x.Path, "/"), "/")
	authority := "https://" + loginHost + "/" + f.tenant
	switch {
	case x.Path == "/common/discovery/instance":
		return answer{status: http.StatusOK, body: map[string]any{
			"tenant_discovery_endpoint": authority + "/v2.0/.well-known/openid-configuration",
			"api-version":               "1.1",
			"metadata": []map[string]any{
				{"preferred_network": loginHost, "preferred_cache": "login.windows.net", "aliases": []string{loginHost, "login.windows.net"}},
			},
		}}
	case x.Op != "" && !strings.EqualFold(tenant, f.tenant):
		return tokenError(x, http.StatusBadRequest, "invalid_tenant", 90002, "Tenant '"+tenant+"' not found. Check to make sure you have the correct tenant ID.")
	case x.Op == OpDiscovery:
		return answer{status: http.StatusOK, body: map[string]any{
			"issuer":                 authority + "/v2.0",
			"authorization_endpoint": authority + "/oauth2/v2.0/authorize",
			"token_endpoint":         authority + "/oauth2/v2.0/token",
		}}
	case x.Op == OpToken:
		return f.token(x)
	}
	return tokenError(x, http.StatusNotFound, "invalid_request", 900144, "The fake has no "+x.Path+".")
}

// token answers a client credentials grant.
func (f tokenFace) token(x *exchange) answer {
	form, err := url.ParseQuery(string(x.body))
	if err != nil || x.Method != http.MethodPost || form.Get("grant_type") != "client_credentials" {
		return tokenError(x, http.StatusBadRequest, "unsupported_grant_type", 70003, "The app requested an unsupported grant type.")
	}
	x.Principal = form.Get("client_id")
	var p Principal
	switch x.Principal {
	case f.broker.ClientID:
		p = f.broker
	case f.person.ClientID:
		p = f.person
	default:
		return tokenError(x, http.StatusUnauthorized, "invalid_client", 700016, "Application with identifier '"+x.Principal+"' was not found in the directory.")
	}
	switch {
	case !hasScope(form.Get("scope")):
		return tokenError(x, http.StatusBadRequest, "invalid_scope", 70011, "The provided request must include a 'scope' input parameter that is valid.")
	case form.Has("client_assertion"):
		if form.Get("client_assertion_type") != assertionType || form.Get("client_assertion") != p.FederatedToken {
			return tokenError(x, http.StatusUnauthorized, "invalid_client", 700213, "No matching federated identity record found for presented assertion subject.")
		}
	case form.Get("client_secret") != p.ClientSecret:
		return tokenError(x, http.StatusUnauthorized, "invalid_client", 7000215, "Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, not the client secret ID.")
	}
	now := f.enter()
	defer f.mu.Unlock()
	return answer{status: http.StatusOK, body: map[string]any{
		"token_type":   "Bearer",
		"expires_in":   int(tokenLife / time.Second),
		"access_token": f.issue(p.ClientID, now),
	}}
}

// hasScope looks for the vault's scope; MSAL sends others along.
func hasScope(scopes string) bool {
	for scope := range strings.FieldsSeq(scopes) {
		if scope == resource+"/.default" {
			return true
		}
	}
	return false
}

// tokenError is an error in Entra's words.
func tokenError(x *exchange, status int, code string, number int, message string) answer {
	return answer{status: status, inner: code, body: map[string]any{
		"error":             code,
		"error_description": fmt.Sprintf("AADSTS%d: %s Trace ID: %s", number, message, x.RequestID),
		"error_codes":       []int{number},
		"trace_id":          x.RequestID,
		"correlation_id":    x.ClientRequestID,
	}}
}

// identityFace is the managed identity endpoint of an App Service.
type identityFace struct{ *Fake }

func (identityFace) read(x *exchange) {
	if x.Path == identityPath {
		x.Op = OpIdentity
	}
}

func (identityFace) later(*exchange, time.Time) {}

func (f identityFace) refuse(x *exchange, fault Fault) answer {
	return tokenFace(f).refuse(x, fault)
}

func (f identityFace) handle(x *exchange, _ bool) answer {
	id := x.Query.Get("client_id")
	switch {
	case x.Op == "":
		return tokenError(x, http.StatusNotFound, "invalid_request", 900144, "The fake has no "+x.Path+".")
	case x.http.Header.Get("X-IDENTITY-HEADER") != f.identityHeader:
		return tokenError(x, http.StatusUnauthorized, "unauthorized_client", 50079, "Wrong X-IDENTITY-HEADER.")
	case strings.TrimSuffix(x.Query.Get("resource"), "/") != resource:
		return tokenError(x, http.StatusBadRequest, "invalid_resource", 500011, "The resource principal named "+x.Query.Get("resource")+" was not found.")
	case id != "" && id != f.broker.ClientID:
		return tokenError(x, http.StatusBadRequest, "invalid_request", 700016, "No managed identity with client id "+id+".")
	}
	x.Principal = f.broker.ClientID
	now := f.enter()
	defer f.mu.Unlock()
	return answer{status: http.StatusOK, body: map[string]any{
		"access_token": f.issue(f.broker.ClientID, now),
		// The client judges this by its own clock, which is the real one.
		"expires_on": strconv.FormatInt(time.Now().Add(tokenLife).Unix(), 10),
		"resource":   resource,
		"token_type": "Bearer",
		"client_id":  f.broker.ClientID,
	}}
}
