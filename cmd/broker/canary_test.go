package main

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/internal/keyvaultfake"
)

// forms are the ways in which a value could stand somewhere.
func forms(value string) []string {
	all := []string{value, url.QueryEscape(value), hex.EncodeToString([]byte(value)), strings.ToUpper(hex.EncodeToString([]byte(value)))}
	for pad := range 3 { // wherever in the encoded text it begins
		encoded := base64.RawStdEncoding.EncodeToString([]byte(strings.Repeat("x", pad) + value))
		inner := encoded[4 : len(encoded)-4]
		all = append(all, inner, strings.NewReplacer("+", "-", "/", "_").Replace(inner))
	}
	return all
}

// canaries are values that must show nowhere, and all that was answered to those
// who sent them.
type canaries struct {
	mu     sync.Mutex
	hidden map[string]string // by what it was
	said   strings.Builder
}

func (c *canaries) hide(what, value string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hidden[what] = value
}

func (c *canaries) make(what string) string {
	v := "canary" + strings.ReplaceAll(uuid.NewString(), "-", "")
	c.hide(what, v)
	return v
}

// value is a good value of a kind.
func (c *canaries) value(kind secretsv1.SecretKind, what string) string {
	v := c.make(what)
	if kind != uriKind {
		return v
	}
	encoded := c.make(what+", percent-encoded") + "/x"
	var password strings.Builder
	for _, b := range []byte(encoded) {
		fmt.Fprintf(&password, "%%%02X", b)
	}
	c.hide(what+", as encoded", password.String())
	return "mongodb://app:" + password.String() + "@db-1,db-2:27018/orders?password=" + v
}

func (c *canaries) say(shown ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Fprintln(&c.said, shown...)
}

// wantNowhere looks for what is hidden in texts, by place.
func (c *canaries) wantNowhere(t *testing.T, places map[string]string) {
	t.Helper()
	for place, text := range places {
		for what, secret := range c.hidden {
			if place == "the environment" && what == clientSecret {
				continue // DefaultAzureCredential reads it there
			}
			for _, form := range forms(secret) {
				if strings.Contains(text, form) {
					t.Errorf("%s stands in %s", what, place)
				}
			}
		}
	}
}

const clientSecret = "the client secret"

// life goes through all that can be done with a secret, and counts what failed.
func (c *canaries) life(ctx context.Context, t *testing.T, p *process, id string, kind secretsv1.SecretKind, what string) (failures int) {
	t.Helper()
	api, operator := p.as("console-api"), p.as("operator")
	what = fmt.Sprint(what, ", ", kind)
	try := func(shown any, err error) {
		if err != nil {
			failures++
		}
		c.say(shown, err, status.Convert(err).Proto())
	}
	put, err := api.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref(id, kind), Value: c.value(kind, what+", put")})
	try(put.GetMetadata(), err)
	rotate := &secretsv1.RotateSecretRequest{Ref: ref(id, kind)}
	if kind != tokenKind {
		rotate.NewValue = c.value(kind, what+", rotated to")
	}
	rotated, err := api.RotateSecret(ctx, rotate)
	try(rotated.GetMetadata(), err)
	if rotated.GetValue() != "" {
		c.hide(what+", the token made", rotated.GetValue())
	}
	got, err := api.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref(id, kind)})
	try(got.GetMetadata(), err)
	old, err := api.GetSecret(ctx, &secretsv1.GetSecretRequest{Ref: ref(id, kind), Version: put.GetMetadata().GetVersion()})
	c.say(old.GetMetadata(), err, status.Convert(err).Proto()) // it has expired
	verified, err := api.VerifyToken(ctx, &secretsv1.VerifyTokenRequest{InstanceId: id, Token: c.make(what + ", a wrong token")})
	try(verified, err)
	watching, end := context.WithCancel(ctx)
	watch, err := api.WatchSecrets(watching, &secretsv1.WatchSecretsRequest{Refs: []*secretsv1.SecretRef{ref(id, kind)}})
	if err == nil {
		event, recvErr := watch.Recv()
		try(event, recvErr)
	}
	end()
	described, err := operator.DescribeSecret(ctx, &secretsv1.DescribeSecretRequest{Ref: ref(id, kind)})
	try(described, err)
	listed, err := operator.ListSecrets(ctx, &secretsv1.ListSecretsRequest{InstanceId: id, ShowDeleted: true})
	try(listed, err)
	deleted, err := api.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: ref(id, kind), AllowMissing: true})
	try(deleted, err)
	recovered, err := api.RecoverSecret(ctx, &secretsv1.RecoverSecretRequest{Ref: ref(id, kind)})
	try(recovered, err)
	deleted, err = api.DeleteSecret(ctx, &secretsv1.DeleteSecretRequest{Ref: ref(id, kind), AllowMissing: true})
	try(deleted, err)
	put, err = api.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref(id, kind), Value: c.value(kind, what+", put over")})
	try(put.GetMetadata(), err)
	return failures
}

// refusals sends what is refused, each with a canary in it.
func (c *canaries) refusals(t *testing.T, p *process) {
	t.Helper()
	api, ctx, used := p.as("console-api"), callContext(t), uuid.NewString()
	if _, err := api.PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("used", oidcKind), Value: c.make("a first use of a request id"), RequestId: used}); err != nil {
		t.Fatal(err)
	}
	// What protobuf would not marshal goes as a field that it does not know.
	raw := func(number protowire.Number, value string) *secretsv1.PutSecretRequest {
		in := &secretsv1.PutSecretRequest{Ref: ref("bad", oidcKind)}
		in.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, number, protowire.BytesType), value))
		return in
	}
	for what, bad := range map[string]*secretsv1.PutSecretRequest{
		"a token of no good form":   {Ref: ref("bad", tokenKind), Value: "exto_rt_" + c.make("bad token")},
		"a token with a space":      {Ref: ref("bad", tokenKind), Value: c.make("spaced token") + " x"},
		"a URI as a token":          {Ref: ref("bad", tokenKind), Value: c.value(uriKind, "URI of the wrong kind")},
		"a token as a URI":          {Ref: ref("bad", uriKind), Value: c.value(tokenKind, "token of the wrong kind")},
		"another scheme":            {Ref: ref("bad", uriKind), Value: "mysql://app:" + c.make("URI of MySQL") + "@db/orders"},
		"a host that cannot be":     {Ref: ref("bad", uriKind), Value: "postgres://app:" + c.make("URI without host") + "@/orders"},
		"a bad percent-encoding":    {Ref: ref("bad", uriKind), Value: "postgres://app:" + c.make("URI that does not parse") + "%zz@[::1"},
		"two lines":                 {Ref: ref("bad", oidcKind), Value: c.make("lines") + "\n"},
		"too long":                  {Ref: ref("bad", oidcKind), Value: strings.Repeat(c.make("too long"), 1000)},
		"too long for gRPC":         {Ref: ref("bad", oidcKind), Value: strings.Repeat(c.make("much too long"), 2000)},
		"not UTF-8":                 raw(2, "\xff"+c.make("not UTF-8")),
		"not UTF-8, another field":  raw(5, "\xff"+c.make("not UTF-8 in another field")),
		"no kind":                   {Ref: ref("bad", 0), Value: c.make("of no kind")},
		"as instance id":            {Ref: ref(c.make("instance id")+"-dburi", tokenKind), Value: "abc"},
		"as request id":             {Ref: ref("bad", oidcKind), Value: "x", RequestId: c.make("request id")},
		"a request id again":        {Ref: ref("used", oidcKind), Value: c.make("a second use of a request id"), RequestId: used},
		"a secret that must not be": {Ref: ref("used", oidcKind), Value: c.make("refused"), Precondition: &secretsv1.PutSecretRequest_MustNotExist{MustNotExist: true}},
		"as another version":        {Ref: ref("used", oidcKind), Value: "x", Precondition: &secretsv1.PutSecretRequest_MustMatchVersion{MustMatchVersion: c.make("version")}},
	} {
		_, err := api.PutSecret(ctx, bad)
		if c.say(err, status.Convert(err).Proto()); err == nil {
			t.Errorf("%s: got success, want a refusal", what)
		}
	}
	_, err := api.ListSecrets(ctx, &secretsv1.ListSecretsRequest{PageToken: c.make("page token")})
	c.say(err, status.Convert(err).Proto())
	_, err = p.as("operator").PutSecret(ctx, &secretsv1.PutSecretRequest{Ref: ref("used", oidcKind), Value: c.make("by somebody who may not")})
	c.say(err, status.Convert(err).Proto())
	_, err = api.RotateSecret(ctx, &secretsv1.RotateSecretRequest{Ref: ref("bad", tokenKind), NewValue: c.make("token given to rotate")})
	c.say(err, status.Convert(err).Proto())
}

// faults has each way in which a vault fails met by all three kinds. The vault
// repeats in its errors what it was sent.
func (c *canaries) faults(t *testing.T, p *process, vault *keyvaultfake.Fake) {
	t.Helper()
	faults := map[string]keyvaultfake.Fault{
		"fault-400": {Status: http.StatusBadRequest}, "fault-401": {Status: http.StatusUnauthorized},
		"fault-403": {Status: http.StatusForbidden, Inner: "ForbiddenByRbac"}, "fault-409": {Status: http.StatusConflict},
		"fault-500": {Status: http.StatusInternalServerError}, "fault-cut": {Cut: true}, "fault-after": {CutAfter: true},
		"fault-429": {Status: http.StatusTooManyRequests},
	}
	vault.OnRequest(func(r *keyvaultfake.Request) keyvaultfake.Fault {
		for id, fault := range faults {
			if changes(r.Op) && strings.Contains(r.Name, id) {
				return fault
			}
		}
		return keyvaultfake.Fault{}
	})
	fail := func(ids ...string) {
		var wg sync.WaitGroup
		for _, id := range ids {
			for _, kind := range kinds {
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(callContext(t), 2*time.Second)
					defer cancel()
					if c.life(ctx, t, p, id, kind, id) == 0 && id != "fault-after" {
						t.Errorf("%s: got no error", id)
					}
				})
			}
		}
		wg.Wait()
	}
	fail("fault-400", "fault-401", "fault-403", "fault-409", "fault-500", "fault-cut", "fault-after")
	fail("fault-429") // alone: it slows all others down
}

var kinds = []secretsv1.SecretKind{tokenKind, uriKind, oidcKind}

// loud has a broker and its libraries log all they can, and crash as loudly.
func loud(temp string) []string {
	return []string{
		"AZURE_SDK_GO_LOGGING=all", "BROKER_LOG_LEVEL=debug", "GOTRACEBACK=crash", "TMPDIR=" + temp,
		"GRPC_GO_LOG_SEVERITY_LEVEL=info", "GRPC_GO_LOG_VERBOSITY_LEVEL=99", "GRPC_BINARY_LOG_FILTER=*",
	}
}

// TestNoValueShows looks everywhere for values that went through a broker which was
// asked to log all it can, and crashes in the end.
func TestNoValueShows(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T, string) (*process, *keyvaultfake.Fake){
		"embedded": func(t *testing.T, temp string) (*process, *keyvaultfake.Fake) {
			p := launch(t, t.TempDir(), loud(temp), binary, "dev", "--listen-address=127.0.0.1:0", "--metrics-address=127.0.0.1:0")
			p.listen()
			return p, nil
		},
		"key vault": func(t *testing.T, temp string) (*process, *keyvaultfake.Fake) {
			c := secretCloud(t, devFolder(t), keyvaultfake.Config{})
			c.set(loud(temp))
			return c.start(), c.Fake
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			temp, c := t.TempDir(), &canaries{hidden: map[string]string{}}
			p, vault := start(t, temp)
			for _, kind := range kinds {
				if failures := c.life(callContext(t), t, p, "demo", kind, "as it should be"); failures > 0 {
					t.Fatalf("got %d errors without a fault: %s", failures, &c.said)
				}
			}
			c.refusals(t, p)
			if vault != nil {
				c.hide(clientSecret, vault.Broker().ClientSecret)
				c.faults(t, p, vault)
			}
			places := map[string]string{"the metrics": p.scrape()}
			for place, file := range map[string]string{"the command line": "cmdline", "the environment": "environ"} {
				data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.cmd.Process.Pid, file)) // where it can be read
				places[place] = string(data)
			}
			p.end(syscall.SIGQUIT)
			places["standard output"], places["the log"], places["answers and errors"] = p.out.String(), p.err.String(), c.said.String()
			if !strings.Contains(places["the log"], "goroutine ") {
				t.Error("the crash shows no goroutines; want them in what is searched")
			}
			if vault != nil && !strings.Contains(places["the log"], "==> OUTGOING REQUEST") {
				t.Error("the SDK logged nothing; want its requests in what is searched")
			}
			for _, dir := range []string{p.dir, temp} {
				filesIn(t, dir, places)
			}
			c.wantNowhere(t, places)
		})
	}
}

// filesIn adds the content of all files in dir to places.
func filesIn(t *testing.T, dir string, places map[string]string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		places[path] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (p *process) scrape() string {
	p.t.Helper()
	resp := must2(http.Get("http://" + p.metrics + "/metrics"))(p.t)
	defer func() { _ = resp.Body.Close() }()
	return string(must2(io.ReadAll(resp.Body))(p.t))
}
