package secret_test

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/exto/secrets-broker/secret"
)

const hidden = "qzjx-vwky-hmplt-zq"

type (
	inUnexported struct {
		name string
		v    secret.Value
	}
	inExported struct {
		Name string
		V    secret.Value
		P    *secret.Value
	}
	embedding struct{ secret.Value }
	holder    interface{ Reveal() string }
	inField   struct{ h holder }
	valueErr  struct{ v secret.Value }
)

func (e valueErr) Error() string { return fmt.Sprint("refused: ", e.v) }

// holders are all the ways in which a value gets into a print by accident.
func holders() map[string]any {
	v := secret.NewValue(hidden)
	return map[string]any{
		"itself":              v,
		"pointer":             &v,
		"unexported field":    inUnexported{"n", v},
		"pointer to struct":   &inUnexported{"n", v},
		"exported field":      inExported{"n", v, &v},
		"pointer to exported": &inExported{"n", v, &v},
		"embedded":            embedding{v},
		"interface":           inField{v},
		"interface, pointer":  inField{&v},
		"nested":              []any{map[string]any{"x": &inField{&v}}, inUnexported{"n", v}},
		"slice":               []secret.Value{v},
		"array":               [2]secret.Value{v, v},
		"map":                 map[string]secret.Value{"k": v},
		"map of structs":      map[string]inUnexported{"k": {"n", v}},
		"map in a field":      struct{ m map[string]secret.Value }{map[string]secret.Value{"k": v}},
		"slice in a field":    struct{ s []secret.Value }{[]secret.Value{v}},
		"func":                func() secret.Value { return v },
		"error":               valueErr{v},
		"wrapped error":       fmt.Errorf("put: %w", errors.Join(valueErr{v}, errors.New("x"))),
	}
}

// shows reports whether text holds a part of the hidden value, as it is or in
// hexadecimal.
func shows(text string) bool {
	text = strings.ToLower(text)
	for i := range len(hidden) - 3 {
		part := hidden[i : i+4]
		if strings.Contains(text, part) || strings.Contains(text, fmt.Sprintf("%x", part)) || strings.Contains(text, fmt.Sprintf("% x", part)) {
			return true
		}
	}
	return strings.Contains(text, strings.Trim(fmt.Sprint([]byte(hidden[:4])), "[]"))
}

func TestShowsFindsIt(t *testing.T) {
	t.Parallel()
	for _, verb := range []string{"%v", "%s", "%q", "%x", "% x", "%X", "%#v", "%d"} {
		if text := fmt.Sprintf(verb, []byte(hidden)); verb != "%#v" && !shows(text) {
			t.Errorf("%s: %s goes unnoticed", verb, text)
		}
	}
}

func TestValueIsNeverPrinted(t *testing.T) {
	t.Parallel()
	// %w and %z are no verbs for a Value: fmt then prints without asking it.
	verbs := []string{"%v", "%+v", "%#v", "%s", "%q", "%#q", "%x", "%X", "% x", "%#x", "%d", "%b", "%o", "%c", "%U", "%e", "%t", "%p", "%T", "%w", "%z", "%100v", "%.4s", "%-10s|", "%[2]v"}
	for name, h := range holders() {
		for _, verb := range verbs {
			if text := fmt.Sprintf(verb, h); shows(text) {
				t.Errorf("%s with %s: %s", name, verb, text)
			}
			if text := fmt.Errorf(verb, h).Error(); shows(text) {
				t.Errorf("%s in an error with %s: %s", name, verb, text)
			}
		}
		for _, text := range []string{fmt.Sprint(h), fmt.Sprintln("x", h)} {
			if shows(text) {
				t.Errorf("%s: %s", name, text)
			}
		}
	}
	for _, verb := range verbs {
		if strings.ContainsAny(verb, "Tpwz[") {
			continue
		}
		if got := fmt.Sprintf(verb, secret.NewValue(hidden)); strings.TrimRight(got, "|") != "***" {
			t.Errorf("%s: got %q, want ***", verb, got)
		}
	}
	if got := secret.NewValue(hidden).String(); got != "***" {
		t.Errorf("String: got %q, want ***", got)
	}
}

func TestValueIsNeverLogged(t *testing.T) {
	t.Parallel()
	for name, h := range holders() {
		var out bytes.Buffer
		for _, handler := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			log := slog.New(handler)
			log.Info("put", "h", h)
			log.Info("put", slog.Any("h", h), slog.Group("g", "h", h))
			log.With("h", h).WithGroup("g").Info("put")
			log.Info(fmt.Sprint("put ", h))
		}
		if shows(out.String()) {
			t.Errorf("%s: %s", name, &out)
		}
		if got := strings.Count(out.String(), "\n"); got != 8 {
			t.Errorf("%s: got %d lines, want 8", name, got)
		}
	}
}

func TestValueIsNeverEncoded(t *testing.T) {
	t.Parallel()
	for name, h := range holders() {
		// Some cannot be encoded; then the error must not show it either.
		asJSON, err := json.Marshal(h)
		if text := fmt.Sprint(string(asJSON), err); shows(text) {
			t.Errorf("%s as JSON: %s", name, text)
		}
		asXML, err := xml.Marshal(h)
		if text := fmt.Sprint(string(asXML), err); shows(text) {
			t.Errorf("%s as XML: %s", name, text)
		}
	}
	got, err := json.Marshal(map[string]any{"v": secret.NewValue(hidden)})
	if string(got) != `{"v":"***"}` || err != nil {
		t.Errorf("got %s, %v, want ***", got, err)
	}
}

func TestValueGivesItself(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", "x", hidden, "\x00\xff", strings.Repeat("é", 100)} {
		v := secret.NewValue(s)
		if v.Reveal() != s || v.IsEmpty() != (s == "") {
			t.Errorf("%q: got %q, empty %v", s, v.Reveal(), v.IsEmpty())
		}
	}
}

func TestValueEqual(t *testing.T) {
	t.Parallel()
	values := []string{"", "a", "b", "aa", "ab", hidden, hidden + "x", hidden[:len(hidden)-1] + "x"}
	for _, a := range values {
		for _, b := range values {
			if got := secret.NewValue(a).Equal(secret.NewValue(b)); got != (a == b) {
				t.Errorf("%q and %q: got %v", a, b, got)
			}
		}
	}
}

func TestZeroValue(t *testing.T) {
	t.Parallel()
	var v secret.Value
	if v.Reveal() != "" || !v.IsEmpty() || !v.Equal(secret.NewValue("")) || v.Equal(secret.NewValue("x")) {
		t.Error("the zero Value is not the empty one")
	}
	if got := fmt.Sprintf("%v %s %q", v, v, v); got != "*** *** ***" {
		t.Errorf("got %q, want it to look like every other", got)
	}
	if err := secret.CheckValue(secret.DatabaseURI, v); err == nil {
		t.Error("the zero Value may be stored")
	}
}
