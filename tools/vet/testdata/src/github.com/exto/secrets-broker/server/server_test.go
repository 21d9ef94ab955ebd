package server

import (
	"fmt"

	secretsv1 "github.com/exto/secrets-broker/gen/exto/secrets/v1"
)

func show2(in *secretsv1.PutSecretRequest) { fmt.Println(in, in.Value) }
