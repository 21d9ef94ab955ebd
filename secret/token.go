package secret

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
)

// The form of a token that the broker makes: tokenPrefix, 32 random bytes in
// base64url, _ and a checksum of all before it. Leak scanners find it by this
// form, and a typo is seen without a look-up.
const (
	tokenPrefix   = "exto_rt_"
	tokenRandom   = 32
	tokenBody     = 43 // base64url characters of tokenRandom bytes
	tokenChecksum = 6  // base-62 digits that hold 32 bits
	tokenLen      = len(tokenPrefix) + tokenBody + 1 + tokenChecksum
	base62        = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)

// MintToken makes a registration token with 256 random bits.
func MintToken() Value {
	var random [tokenRandom]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand ends the process instead
	body := tokenPrefix + base64.RawURLEncoding.EncodeToString(random[:])
	return NewValue(body + "_" + checksum(body))
}

// checksum is the CRC-32 (IEEE) of s in base 62, most significant digit first.
func checksum(s string) string {
	sum := crc32.ChecksumIEEE([]byte(s))
	var digits [tokenChecksum]byte
	for i := tokenChecksum - 1; i >= 0; i-- {
		digits[i] = base62[sum%62]
		sum /= 62
	}
	return string(digits[:])
}

// checkToken accepts RFC 6750 b64token, since the token travels in a Bearer
// header, and of tokens in the broker's own form only those whose checksum
// holds.
func checkToken(s string) error {
	if len(s) > maxChars {
		return fmt.Errorf("a registration token has at most %d characters", maxChars)
	}
	stem := strings.TrimRight(s, "=")
	if stem == "" || strings.IndexFunc(stem, func(r rune) bool { return !isAlnum(r) && !strings.ContainsRune("-._~+/", r) }) >= 0 {
		return errors.New("a registration token is a b64token of RFC 6750: letters, digits and -._~+/, with = at the end only")
	}
	if strings.HasPrefix(s, tokenPrefix) && !isMinted(s) {
		return fmt.Errorf("a registration token that begins with %s has %d base64url characters, _ and a checksum of %d characters after it: this one is mistyped or cut off", tokenPrefix, tokenBody, tokenChecksum)
	}
	return nil
}

func isMinted(s string) bool {
	if len(s) != tokenLen {
		return false
	}
	body, sum := s[:tokenLen-tokenChecksum-1], s[tokenLen-tokenChecksum:]
	if s[len(body)] != '_' || checksum(body) != sum {
		return false
	}
	return strings.IndexFunc(body[len(tokenPrefix):], func(r rune) bool { return !isAlnum(r) && r != '-' && r != '_' }) < 0
}

func isAlnum(r rune) bool {
	return r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z'
}
