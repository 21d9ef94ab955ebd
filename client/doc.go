// Package client is how a Go program talks to the secrets broker: the Console
// API, the worker, operators' tools and instances themselves.
//
// # Connecting
//
// New takes the broker's address and the program's certificate, whose SPIFFE ID
// is the caller that the broker's policy knows. One Client serves a whole
// program: it is safe for concurrent use and connects when it is first used.
//
//	c, err := client.New("broker.example:7443", client.Config{
//		CertFile: "/etc/tls/worker.pem",
//		KeyFile:  "/etc/tls/worker-key.pem",
//		CAFile:   "/etc/tls/ca.pem",
//	})
//
// A secret is named by a secret.Key, which is made of an instance id and a kind
// (secret.NewKey) or of the name that a database stores (secret.ParseKey). Its
// value is a secret.Value, which no formatting verb, logger or encoder shows;
// Reveal gives it away.
//
// # Deadlines
//
// Every call blocks until it is answered or its context ends. A context without
// a deadline gets 30 s for a read (Get, Describe, each page of List) and 2 min
// for a write (Put, Rotate, Delete, Recover).
//
// # Reads
//
// Get answers from the broker's memory within the broker's own bound, by default
// 30 s. GetOptions.MaxStaleness sets another, and zero asks the vault. A write
// through the broker is seen by every read that starts after it returned. When
// the vault is down and no MaxStaleness was set, the broker may give an older
// value and says so: GetResult.Source is then StaleOnError.
//
// # Writes
//
// Every write has a request id, a UUID. The same write with the same id again
// happens once, also across a crash of the broker, and returns its result again.
// A write that ends with an error says in Error.CommitState whether it happened:
//
//   - secret.NotApplied: it did not and will not.
//   - secret.Applied: it happened, in spite of the error.
//   - secret.Unknown: it may have happened or may yet, as when the connection
//     broke or the deadline passed. To find out, make the same call with
//     Error.RequestID as the RequestID of its options.
//
// # Errors
//
// Every error of a call is an *Error with all that is known of it. For the cases
// that callers act on there are variables for errors.Is, such as ErrNotFound;
// context.DeadlineExceeded and context.Canceled match too, whichever side gave
// up. No error holds any part of a value.
package client
