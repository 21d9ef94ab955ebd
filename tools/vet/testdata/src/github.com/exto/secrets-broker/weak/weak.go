package weak

import (
	"crypto/md5" // want `broken`
	"crypto/tls"
	"math/rand/v2" // want `guessable`
)

var _ = md5.New

var _ = rand.Int

var _ = tls.Config{InsecureSkipVerify: true} // want `TLS with anybody`
