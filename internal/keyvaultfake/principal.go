package keyvaultfake

import "github.com/google/uuid"

// Principal is an application that the token service knows, with the ways in which it
// can show who it is.
type Principal struct {
	TenantID, ClientID, ClientSecret string
	FederatedToken                   string // of workload identity: what the token file holds
	ObjectID                         string
}

func newPrincipal() Principal {
	return Principal{
		ClientID:       uuid.NewString(),
		ClientSecret:   randomHex(),
		FederatedToken: randomHex() + "." + randomHex() + "." + randomHex(),
		ObjectID:       uuid.NewString(),
	}
}

// Env is the principal as a client secret in the form of os.Environ.
func (p Principal) Env() []string {
	return []string{
		"AZURE_TENANT_ID=" + p.TenantID,
		"AZURE_CLIENT_ID=" + p.ClientID,
		"AZURE_CLIENT_SECRET=" + p.ClientSecret,
	}
}

// Broker is a principal that may do all with secrets, except purge.
func (f *Fake) Broker() Principal { return f.broker }

// Person is a principal with every right.
func (f *Fake) Person() Principal { return f.person }

// IdentityEnv makes the process that has it, in the form of os.Environ, have a managed
// identity: the Broker principal. It is that of an App Service, the one kind whose
// endpoint can be anywhere.
func (f *Fake) IdentityEnv() []string {
	return []string{
		"IDENTITY_ENDPOINT=http://" + f.identityServer.address() + identityPath,
		"IDENTITY_HEADER=" + f.identityHeader,
	}
}

// Grant gives rights; all of them if none is named.
func (f *Fake) Grant(p Principal, ops ...Op) { f.setRights(p, ops, true) }

// Revoke takes rights away; all of them if none is named. Real role assignments take
// minutes; this is at once.
func (f *Fake) Revoke(p Principal, ops ...Op) { f.setRights(p, ops, false) }

func (f *Fake) setRights(p Principal, ops []Op, may bool) {
	if len(ops) == 0 {
		ops = vaultOps
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, op := range ops {
		f.rights[p.ClientID][op] = may
	}
}
