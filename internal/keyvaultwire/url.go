package keyvaultwire

import (
	"errors"
	"net/url"
	"regexp"
	"strings"
)

// Names of vaults: https://learn.microsoft.com/azure/key-vault/general/about-keys-secrets-certificates
var vaultHost = regexp.MustCompile(`^([a-z][a-z0-9-]{1,22}[a-z0-9])\.vault(\.[a-z0-9-]+){2,}$`)

// ParseURL accepts the URL of a vault in any of Azure's clouds: https, the vault's
// own host, and nothing else. The host is where tokens go, so that it
// is judged here and once more against the vault's challenge.
func ParseURL(s string) (normal, name string, err error) {
	const accepted = "set it to https://NAME.vault.azure.net/, or the host of another Azure cloud's vaults"
	u, err := url.Parse(s)
	if err != nil || u.Host == "" {
		return "", "", errors.New("not the URL of a vault; " + accepted)
	}
	host := strings.ToLower(strings.TrimSuffix(u.Host, ":443"))
	switch {
	case strings.Contains(host, ".managedhsm."):
		return "", "", errors.New("a managed HSM holds keys and no secrets; " + accepted)
	case u.Scheme != "https":
		return "", "", errors.New("the URL of a vault begins with https://; " + accepted)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "":
		return "", "", errors.New("the URL of a vault has no path, query or user; " + accepted)
	}
	m := vaultHost.FindStringSubmatch(host)
	if m == nil {
		return "", "", errors.New("the host is not that of a vault; " + accepted)
	}
	return "https://" + host + "/", m[1], nil
}
