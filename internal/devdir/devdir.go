// Package devdir makes the folder of a broker on a developer's machine:
// certificates, a policy, and calls to try. What runs in production gets these
// from elsewhere.
package devdir

import (
	"bytes"
	_ "embed"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"text/template"
	"time"
)

// Name of the folder, in the one that the broker is started from.
const Name = ".broker-dev"

var (
	// Policy is what a new folder gets.
	//
	//go:embed policy.yaml
	Policy []byte
	//go:embed calls.tmpl
	callsText string
	calls     = template.Must(template.New("calls").Parse(callsText))
)

// Prepare makes the folder and what is missing in it. A policy that is there
// stays as it is; certificates that end within a day are renewed.
func Prepare(dir string, now time.Time) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, content := range map[string][]byte{".gitignore": []byte("*\n"), "policy.yaml": Policy} {
		file := filepath.Join(dir, name)
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			if err := WriteFile(file, content, 0o644); err != nil {
				return err
			}
		}
	}
	return ensureCertificates(dir, now)
}

// PrintCalls writes calls to paste into a shell, for a broker at that address
// that serves from dir.
func PrintCalls(w io.Writer, dir, address string) error {
	var text bytes.Buffer // so that they come out whole, between the lines of a log
	if err := calls.Execute(&text, map[string]string{"Dir": dir, "Address": address}); err != nil {
		return err
	}
	_, err := w.Write(text.Bytes())
	return err
}

// WriteFile puts a whole file in place or none.
func WriteFile(name string, content []byte, mode fs.FileMode) error {
	temp, err := os.CreateTemp(filepath.Dir(name), ".new-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(temp.Name()) }()
	_, err = temp.Write(content)
	if err = errors.Join(err, temp.Chmod(mode), temp.Sync(), temp.Close()); err != nil {
		return err
	}
	return os.Rename(temp.Name(), name)
}
