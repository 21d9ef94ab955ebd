package keyvault

// Probed is the name that the vault is asked for when it is probed.
const Probed = probed

// NewTransport is what a Config without Transport gets.
var NewTransport = newTransport
