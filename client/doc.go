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
// The files are read again when they change, and the Client goes over to the new
// certificate without failing a call. Of a name with several addresses, as in
// dns:///brokers.example:7443, those are called at which a broker says that it
// serves; while none does, calls wait. OpenTelemetry, interceptors and the like
// are grpc.DialOptions of New. Close the Client at the end.
//
// A secret is named by a secret.Key, which is made of an instance id and a kind
// (secret.NewKey) or of the name that a database stores (secret.ParseKey). Its
// value is a secret.Value, which no formatting verb, logger or encoder shows;
// Reveal gives it away.
//
// # Secrets that a program holds
//
// A Source holds one secret in memory and keeps it current, by a watch and, while
// that is down, by reading now and then:
//
//	token, err := client.NewSource(ctx, c, key, client.SourceOptions{})
//	held := token.Value() // never blocks
//
// It keeps the last value through an outage and says how old it is (Held.AsOf).
// When somebody refuses the value, Unauthorized reads it again, however many ask
// at once. NewInstance holds the three secrets of one instance.
//
// Package client/direct is for instances that have nothing but a managed identity: it
// gives a Getter that reads Key Vault itself, and Sources and Instances work over it
// too.
//
// # Tokens that others send
//
// Verify says whether a token is an instance's, without a right to read any. A
// Verifier does the same and may remember what matched until something changes.
//
// # Deadlines and retries
//
// Every call blocks until it is answered or its context ends. A context without
// deadline gets 30 s for a read (Get, Describe, Verify, each page of List) and
// 2 min for a write (Put, Rotate, Delete, Recover). Until then a call that the
// broker can't answer now is made again, as it advises or after pauses of random
// length, and writes only where that is safe: the table is in docs/client.md. All
// calls of a Client together are made again at most 10 times a second, so that
// many clients do not hold down a broker that comes back.
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
//     broke or the deadline passed. The Client makes the same call again until
//     the deadline. To go on after it, make it with Error.RequestID as the
//     RequestID of its options.
//
// DeleteInstance deletes the three secrets of an instance, and is safe to run
// again.
//
// # Errors
//
// Every error of a call is an *Error with all that is known of it. For the cases
// that callers act on there are variables for errors.Is, such as ErrNotFound;
// context.DeadlineExceeded and context.Canceled match too, whichever side gave
// up. No error holds any part of a value.
//
// # Tests
//
// Package client/brokertest runs a whole broker inside a program's test, with switches
// for what may go wrong.
package client
