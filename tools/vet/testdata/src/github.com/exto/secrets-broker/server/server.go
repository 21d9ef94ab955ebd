package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strconv"

	"github.com/Azure/azsecrets"
	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
	"github.com/exto/secrets-broker/secret"
)

type call struct {
	requests []*secretsv1.PutSecretRequest
	caller   string
}

func messages(ctx context.Context, in *secretsv1.PutSecretRequest, log *slog.Logger, sdk azsecrets.Secret) {
	fmt.Println(in)                             // want `may hold secrets`
	fmt.Println(*in)                            // want `may hold secrets`
	_ = fmt.Errorf("bad: %v", in)               // want `may hold secrets`
	_ = fmt.Sprintf("%T", in)                   // its type
	log.Info("got", "request", in)              // want `may hold secrets`
	log.LogAttrs(ctx, 0, "", slog.Any("r", in)) // want `may hold secrets`
	slog.Debug("got", "call", call{})           // want `may hold secrets`
	slog.Debug("got", "calls", map[int]*call{}) // want `may hold secrets`
	slog.Debug("got", "caller", call{}.caller)
	slog.Debug("got", "kind", secretsv1.SecretKind(1))
	_, _ = json.Marshal(in) // want `may hold secrets`
	_ = in.String()         // want `may hold secrets`
	fmt.Println(sdk)        // want `may hold secrets`
	panic(in)               // want `may hold secrets`
}

func interceptor(ctx context.Context, log *slog.Logger) func(req any) {
	return func(req any) {
		log.Info("got", "request", req) // want `what this any holds is not known here`
		defer func() {
			p := recover()
			log.Error("panic", "type", fmt.Sprintf("%T", p))
			log.Error("panic", "value", p) // want `holds is not known here`
		}()
	}
}

func invalid(field, format string, args ...any) error { // want invalid:"formats"
	return again(field+": "+format, args...)
}

func again(format string, args ...any) error { return fmt.Errorf(format, args...) } // want again:"formats"

func show(v interface{ String() string }) { fmt.Println(v) } // want show:"formats"

func wrappers(in *secretsv1.PutSecretRequest, v secret.Value, err error) {
	_ = invalid("value", "%v", in) // want `may hold secrets`
	_ = invalid("value", "%v", v)
	_ = invalid("value", "%v", err)
	show(in) // want `may hold secrets`
	show(v)
}

func parsePut(in *secretsv1.PutSecretRequest) (string, string) {
	fmt.Println(in.GetValue())       // want `text of a secret must not be formatted`
	_ = strconv.Quote(in.Value + "") // want `text of a secret must not be formatted`
	return in.GetValue(), in.Value
}

func elsewhere(in *secretsv1.PutSecretRequest, v secret.Value, sdk azsecrets.Secret) {
	in.Value = "written"
	_ = in.Value      // want `touched in server.elsewhere`
	_ = in.GetValue() // want `touched in server.elsewhere`
	_ = v.Reveal()    // want `touched in server.elsewhere`
	_ = v.Reveal      // want `touched in server.elsewhere`
	_ = *sdk.Value    // want `touched in server.elsewhere`
}
