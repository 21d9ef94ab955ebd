package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

// target is a server that loads call.
type target struct {
	*child
	dir              string // of its callers' certificates
	address, metrics string
	started          time.Duration // from the start of the process until it took calls
}

// listen waits until a server that began at that time takes calls.
func listen(c *child, dir string, begun time.Time) (*target, error) {
	select {
	case at := <-c.log.listening:
		return &target{c, dir, at[0], at[1], time.Since(begun)}, nil
	case <-c.exited:
		return nil, c.died()
	}
}

// startFloor runs the empty server.
func startFloor(ctx context.Context, dir string) (*target, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	begun := time.Now()
	c, err := startServer(ctx, "bench floor", nil, program, "floor", dir)
	if err != nil {
		return nil, err
	}
	return listen(c, dir, begun)
}

// startBroker runs a broker as in production, with the certificates and the policy
// of dir.
func startBroker(ctx context.Context, program, dir string, env ...string) (*target, error) {
	in := func(name string) string { return filepath.Join(dir, name) }
	audit, err := os.MkdirTemp(dir, "audit-")
	if err != nil {
		return nil, err
	}
	env = append(env,
		"BROKER_AUDIT_FILE="+filepath.Join(audit, "audit.log"),
		// Some 30 MB a second come together here, which are nothing to look at later.
		"BROKER_AUDIT_MAX_BYTES=268435456",
		"BROKER_AUDIT_KEEP=1",
		"BROKER_TLS_CERT_FILE="+in("server.pem"),
		"BROKER_TLS_KEY_FILE="+in("server-key.pem"),
		"BROKER_TLS_CLIENT_CA_FILE="+in("ca.pem"),
		"BROKER_POLICY_FILE="+in("policy.yaml"),
		"BROKER_LISTEN_ADDRESS=127.0.0.1:0",
		"BROKER_METRICS_ADDRESS=127.0.0.1:0",
	)
	begun := time.Now()
	c, err := startServer(ctx, "broker serve", env, program, "serve")
	if err != nil {
		return nil, err
	}
	return listen(c, dir, begun)
}

// embeddedStore are the settings of a broker on the store in that folder.
func embeddedStore(folder string) []string {
	return []string{"SECRET_STORE_PROVIDER=embedded", "BROKER_DATA_DIR=" + folder}
}

// startFake runs a Key Vault in memory; the settings are those of a broker on it.
// The budget is beyond what this machine can ask.
func startFake(ctx context.Context, dir string) (*child, []string, error) {
	c, err := startSelf(ctx, "fake")
	if err != nil {
		return nil, nil, err
	}
	var found fakeVault
	if err := c.readJSON(&found); err != nil {
		c.stop()
		return nil, nil, err
	}
	ca := filepath.Join(dir, "vault-ca.pem")
	if err := os.WriteFile(ca, found.CA, 0o600); err != nil {
		c.stop()
		return nil, nil, err
	}
	return c, append(found.Env, "SSL_CERT_FILE="+ca, "BROKER_VAULT_READS_PER_SECOND=4000", "BROKER_VAULT_WRITES_PER_SECOND=4000"), nil
}

// load has callers make calls of one kind for a window, and measures.
func (t *target) load(ctx context.Context, r request, callers int, warm, window time.Duration) (sample, error) {
	// Longer than any of its calls may take.
	ctx, cancel := context.WithTimeout(ctx, warm+window+2*time.Minute)
	defer cancel()
	c, err := t.startLoad(ctx, r, callers, warm, window)
	if err != nil {
		return sample{}, err
	}
	defer c.stop()
	var s sample
	if err := c.readJSON(&s); err != nil {
		return sample{}, cmp.Or(ctx.Err(), err)
	}
	return s, nil
}

// startLoad starts a load and waits until it is warm. A window of 0 lasts until
// finishLoad.
func (t *target) startLoad(ctx context.Context, r request, callers int, warm, window time.Duration) (*child, error) {
	line, err := json.Marshal(order{t.address, t.dir, r, callers, warm, window, t.cmd.Process.Pid, t.metrics})
	if err != nil {
		return nil, err
	}
	c, err := startSelf(ctx, "load")
	if err != nil {
		return nil, err
	}
	if _, err = c.stdin.Write(append(line, '\n')); err == nil {
		_, err = c.read()
	}
	if err != nil {
		c.stop()
		return nil, cmp.Or(ctx.Err(), err)
	}
	return c, nil
}

// finishLoad ends a load without a window. All must have gone well up to its end;
// the sample has its rate alone.
func finishLoad(c *child) (s sample, err error) {
	_ = c.stdin.Close()
	err = c.readJSON(&s)
	c.stop()
	return s, err
}

// client is for the calls that are not measured.
func (t *target) client() (secretsv1.SecretsBrokerServiceClient, func(), error) {
	config, err := clientTLS(t.dir)
	if err != nil {
		return nil, nil, err
	}
	conn, err := grpc.NewClient(t.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		return nil, nil, err
	}
	return secretsv1.NewSecretsBrokerServiceClient(conn), func() { _ = conn.Close() }, nil
}

// fill puts a token and a database URI of so many instances.
func (t *target) fill(ctx context.Context, instances int) error {
	client, done, err := t.client()
	if err != nil {
		return err
	}
	defer done()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(64)
	for n := range instances {
		group.Go(func() error {
			for kind, value := range map[secretsv1.SecretKind]string{
				secretsv1.SecretKind_SECRET_KIND_REGISTRATION_TOKEN: token(digits(n)),
				secretsv1.SecretKind_SECRET_KIND_DATABASE_URI:       databaseURI(digits(n)),
			} {
				ref := &secretsv1.SecretRef{InstanceId: instance(digits(n)), Kind: kind}
				if _, err := client.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref, Value: value}); err != nil {
					return fmt.Errorf("filling %s: %w", t.name, err)
				}
			}
			return nil
		})
	}
	return group.Wait()
}
