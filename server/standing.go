package server

import (
	"crypto/x509"
	"errors"
	"time"

	"github.com/exto/secrets-broker/server/authz"
)

// standing is what a connection's certificate is worth under a snapshot.
type standing struct {
	snapshot    uint64 // its number
	clientCA    string // its hash
	chains      [][]*x509.Certificate
	problem     error // why it is worth nothing
	from, until time.Time
}

// Why a caller is unknown: for the log, and the same to every caller.
var (
	errNoCertificate = errors.New("no client certificate")
	errOtherCA       = errors.New("the certificate is not of the present client CA")
	errRevoked       = errors.New("the certificate is revoked")
	errExpired       = errors.New("the certificate, or one between it and its CA, has expired or is not valid yet")
	errNoRule        = errors.New("no rule of the policy is about this caller")
)

// certified gives why a connection's certificate is worth nothing now, or nil. What
// lasts as long as the snapshot is judged once for each connection.
func (s *snapshot) certified(c *connection, now time.Time) error {
	st := c.standing.Load()
	if st == nil || st.snapshot != s.number {
		var chains [][]*x509.Certificate
		if st != nil && st.clientCA == s.hashes.ClientCA {
			chains = st.chains
		} else {
			var err error
			if chains, err = s.verify(c, now); err != nil {
				return err // which may have another end in a moment, so it is not kept
			}
		}
		st = s.judge(c, chains)
		c.standing.Store(st)
	}
	if st.problem != nil {
		return st.problem
	}
	if now.Before(st.from) || now.After(st.until) {
		return errExpired
	}
	return nil
}

// verify gives the chains from a connection's certificate to the client CA, as the
// handshake does; none when it is of another CA.
func (s *snapshot) verify(c *connection, now time.Time) ([][]*x509.Certificate, error) {
	certs := c.State.PeerCertificates
	if len(certs) == 0 {
		return nil, errNoCertificate
	}
	between := x509.NewCertPool()
	for _, cert := range certs[1:] {
		between.AddCert(cert)
	}
	chains, err := certs[0].Verify(x509.VerifyOptions{
		Roots: s.clientCAs, Intermediates: between, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if invalid := (x509.CertificateInvalidError{}); errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return nil, errExpired
	}
	return chains, nil
}

// judge judges a connection's certificate by the chains to the client CA. One that is
// whole and has nothing revoked in it is enough, and it is as good as its end is late.
func (s *snapshot) judge(c *connection, chains [][]*x509.Certificate) *standing {
	st := &standing{snapshot: s.number, clientCA: s.hashes.ClientCA, chains: chains}
	if len(chains) == 0 {
		st.problem = errOtherCA
		return st
	}
	st.problem = errRevoked
	if s.revoked.HasCaller(c.caller.id) {
		return st
	}
	for _, chain := range chains {
		from, until, revoked := s.life(chain)
		if !revoked && until.After(st.until) {
			st.problem, st.from, st.until = nil, from, until
		}
	}
	return st
}

// life is the time in which all certificates of a chain are valid, and whether one of
// them is revoked. The last one is of the client CA's file, and is revoked by taking
// it out of there: its number may well be that of somebody's certificate too.
func (s *snapshot) life(chain []*x509.Certificate) (from, until time.Time, revoked bool) {
	until = chain[0].NotAfter
	for i, cert := range chain {
		if cert.NotBefore.After(from) {
			from = cert.NotBefore
		}
		if cert.NotAfter.Before(until) {
			until = cert.NotAfter
		}
		revoked = revoked || i < len(chain)-1 && s.revoked.HasSerial(authz.Serial(cert.SerialNumber))
	}
	return from, until, revoked
}
