package keyvault

// Probed is the name that the vault is asked for when it is probed.
const Probed = probed

// Rates are how many requests a second may be sent now.
func (v *Vault) Rates() (reads, writes float64) {
	return float64(v.reads.limiter.Limit()), float64(v.writes.limiter.Limit())
}
