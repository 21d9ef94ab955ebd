package embedded

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"

	"github.com/exto/secrets-broker/secret"
)

// What the sealing is bound to. A sealed value opens only as the value of its
// own key and version, and never as anything else that is ever sealed.
const (
	purposeValue = "exto secrets-broker embedded 1 value"
	purposeCheck = "exto secrets-broker embedded 1 check"
)

// checkText is sealed into every store, to tell at open whether the key is the
// store's own.
const checkText = "the key opens this store"

func valueContext(key secret.Key, version string) []byte {
	return []byte(purposeValue + "\x00" + key.String() + "\x00" + version)
}

// loadKey reads a keyset. The error holds no part of the file: Tink's own may
// quote it.
func loadKey(path string, log *slog.Logger) (tink.AEAD, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	handle, err := insecurecleartextkeyset.Read(keyset.NewJSONReader(bytes.NewReader(data)))
	if err != nil {
		return nil, fmt.Errorf("%s is not a Tink keyset in JSON", path)
	}
	primitive, err := aead.New(handle)
	if err != nil {
		return nil, fmt.Errorf("%s holds no AEAD key", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		log.Warn("the key file of the secret store can be reached by other users",
			"path", path, "mode", info.Mode().Perm().String())
	}
	return primitive, nil
}

// makeKey writes a new keyset to path, 0600, unless path exists by then.
func makeKey(path string) error {
	handle, err := keyset.NewHandle(aead.AES256GCMKeyTemplate())
	if err != nil {
		return fmt.Errorf("making a key: %w", err)
	}
	var buf bytes.Buffer
	if err := insecurecleartextkeyset.Write(handle, keyset.NewJSONWriter(&buf)); err != nil {
		return fmt.Errorf("making a key: %w", err)
	}
	defer clear(buf.Bytes())
	temp, err := createTemp(path)
	if err != nil {
		return err
	}
	_, err = temp.Write(buf.Bytes())
	if err == nil {
		err = temp.Sync()
	}
	if err = errors.Join(err, temp.Close()); err != nil {
		return errors.Join(err, os.Remove(temp.Name()))
	}
	return publish(temp.Name(), path)
}

// exists reports whether there is something at path, a dangling link too.
func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
