package direct_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/client/direct"
	"github.com/exto/secrets-broker/secret"
)

// An instance that has nothing but its managed identity.
func Example() {
	ctx := context.Background()
	id, err := secret.ParseInstanceID("demo")
	if err != nil {
		log.Fatal(err)
	}
	vault, err := direct.New("https://NAME.vault.azure.net/", direct.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer vault.Close()
	instance, err := client.NewInstance(ctx, vault, id, client.InstanceOptions{
		SourceOptions: client.SourceOptions{Interval: 5 * time.Minute},
		Optional:      []secret.Kind{secret.OIDCClientSecret},
	})
	if err != nil {
		log.Fatal(err)
	}
	held := instance.Token.Value()
	fmt.Println("the token is of generation", held.Generation)
}
