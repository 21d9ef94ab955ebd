package secret

import (
	"errors"
	"regexp"
	"slices"
	"strings"
)

// databaseURI is a database URI taken apart. net/url is of no use here: it
// refuses the host lists of mongodb and quotes the URI in its errors.
type databaseURI struct {
	scheme   string
	userinfo string // all before the last @ of the authority, without it
	hosts    []string
	rest     string // path, query and fragment
}

var (
	databaseSchemes = []string{"mongodb", "mongodb+srv", "postgres", "postgresql"}
	// A name or address, a bracketed IPv6 address, or the percent-encoded path of
	// a socket; then perhaps a port.
	hostForm = regexp.MustCompile(`^(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+(?:%25[A-Za-z0-9._~-]+)?\])(?::[0-9]{1,5})?$`)
)

const uriForm = "a database URI is mongodb://, mongodb+srv://, postgres:// or postgresql://, then one host or several with commas between; reserved characters in user and password are percent-encoded"

// parseDatabaseURI refuses what has no known scheme or no well-formed host. Its
// error holds no part of s.
func parseDatabaseURI(s string) (databaseURI, error) {
	scheme, after, ok := strings.Cut(s, "://")
	if !ok || !slices.Contains(databaseSchemes, scheme) {
		return databaseURI{}, errors.New("unknown scheme: " + uriForm)
	}
	end := strings.IndexAny(after, "/?#")
	if end < 0 {
		end = len(after)
	}
	u := databaseURI{scheme: scheme, rest: after[end:]}
	hosts := after[:end]
	if at := strings.LastIndexByte(hosts, '@'); at >= 0 {
		u.userinfo, hosts = hosts[:at], hosts[at+1:]
	}
	u.hosts = strings.Split(hosts, ",")
	for _, h := range u.hosts {
		if !hostForm.MatchString(h) {
			return databaseURI{}, errors.New("no host, or a malformed one: " + uriForm)
		}
	}
	return u, nil
}

func checkDatabaseURI(s string) error {
	_, err := parseDatabaseURI(s)
	return err
}

// harmlessParameters are the query parameters of the MongoDB and PostgreSQL
// drivers that hold no secret, in lower case. All others are left out of a
// redacted URI: password, sslpassword, authMechanismProperties and whatever
// comes later carry secrets too.
var harmlessParameters = map[string]bool{
	// https://www.mongodb.com/docs/manual/reference/connection-string-options/
	"authmechanism": true, "authsource": true, "compressors": true, "connecttimeoutms": true, "directconnection": true,
	"heartbeatfrequencyms": true, "journal": true, "loadbalanced": true, "localthresholdms": true, "maxconnecting": true,
	"maxidletimems": true, "maxpoolsize": true, "maxstalenessseconds": true, "minpoolsize": true, "readconcernlevel": true,
	"readpreference": true, "replicaset": true, "retryreads": true, "retrywrites": true, "serverselectiontimeoutms": true,
	"sockettimeoutms": true, "srvmaxhosts": true, "srvservicename": true, "ssl": true, "tls": true, "uuidrepresentation": true,
	"w": true, "waitqueuetimeoutms": true, "wtimeoutms": true, "zlibcompressionlevel": true,
	// https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
	"channel_binding": true, "connect_timeout": true, "gssencmode": true, "keepalives": true, "keepalives_count": true,
	"keepalives_idle": true, "keepalives_interval": true, "load_balance_hosts": true, "sslmode": true, "sslnegotiation": true,
	"target_session_attrs": true, "tcp_user_timeout": true,
}

var (
	plainUser  = regexp.MustCompile(`^[A-Za-z0-9._~%+-]*$`)
	plainPath  = regexp.MustCompile(`^(?:/[A-Za-z0-9._~%-]*)?$`)
	plainParam = regexp.MustCompile(`^[A-Za-z0-9._-]*$`)
	// An encoded colon or @, or an encoded percent sign that may hide one, puts
	// the password into what looks like the name of a user, host or database.
	strayed = regexp.MustCompile(`(?i)%(?:3a|40|25)`)
)

// Redact is what may be shown of a value. For a database URI: scheme, user,
// hosts, database and the query parameters known to be harmless, with *** for
// the password. *** alone for the other kinds, and for a URI that does not
// parse or has characters where a password may have strayed to.
func Redact(kind Kind, v Value) string {
	if kind != DatabaseURI {
		return redacted
	}
	u, err := parseDatabaseURI(v.Reveal())
	if err != nil {
		return redacted
	}
	// A raw / ? or # in a password ends the authority too early; the true @ then
	// stands in what looks like the path or the query.
	path, query, _ := strings.Cut(u.rest, "?")
	if strings.ContainsAny(u.rest, "@#") || !plainPath.MatchString(path) {
		return redacted
	}
	var b strings.Builder
	b.WriteString(u.scheme + "://")
	if u.userinfo != "" {
		user, _, hasPassword := strings.Cut(u.userinfo, ":")
		if !plainUser.MatchString(user) {
			return redacted
		}
		b.WriteString(user)
		if hasPassword {
			b.WriteString(":" + redacted)
		}
		b.WriteByte('@')
	}
	b.WriteString(strings.Join(u.hosts, ",") + path)
	if strayed.MatchString(b.String()) {
		return redacted
	}
	sep := byte('?')
	for param := range strings.SplitSeq(query, "&") {
		name, value, ok := strings.Cut(param, "=")
		if ok && harmlessParameters[strings.ToLower(name)] && plainParam.MatchString(value) {
			b.WriteByte(sep)
			b.WriteString(param)
			sep = '&'
		}
	}
	return b.String()
}
