package audit_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/exto/secrets-broker/server/audit"
)

// flip changes one digit or letter.
func flip(s string, at int) string {
	c := byte('0')
	if s[at] == c {
		c = '1'
	}
	return s[:at] + string(c) + s[at+1:]
}

// field is the position of the value of a field.
func field(line, name string) int { return strings.Index(line, `"`+name+`":`) + len(name) + 4 }

// TestTampering does everything to every line, and wants that line named.
func TestTampering(t *testing.T) {
	t.Parallel()
	const n = 9
	good := sample(t, n)
	edit := func(i int, change func(string) string) []string {
		all := slices.Clone(good)
		all[i] = change(all[i])
		return all
	}
	type tampered struct {
		name  string
		lines []string
		want  int // 0: it does not show
	}
	var all []tampered
	for i := range n {
		at := func(name string, want int, lines []string) {
			all = append(all, tampered{fmt.Sprintf("%s of line %d", name, i+1), lines, want})
		}
		for _, name := range []string{"format", "seq", "time", "type", "action", "prev", "crc"} {
			at("edit in "+name, i+1, edit(i, func(s string) string { return flip(s, field(s, name)) }))
		}
		at("cut end", i+1, edit(i, func(s string) string { return s[:len(s)-1] }))
		at("added end", i+1, edit(i, func(s string) string { return s + " " }))
		at("upper-case checksum", i+1, edit(i, func(s string) string {
			head, crc := s[:len(s)-10], s[len(s)-10:]
			if up := strings.ToUpper(crc); up != crc {
				return head + up
			}
			return s + " "
		}))
		at("split", i+1, edit(i, func(s string) string { return s[:60] + "\n" + s[60:] }))
		at("blank line before", i+1, edit(i, func(s string) string { return "\n" + s }))
		at("line of another program before", i+1, edit(i, func(s string) string { return "hello\n" + s }))
		// With a checksum that fits.
		last := i == n-1
		want := i + 1
		if last {
			want = 0 // that is what the heads in the log are for
		}
		at("edit with checksum", want, edit(i, func(s string) string { return resum(flip(s, field(s, "time")+3)) }))
		at("edit with checksum in seq", i+1, edit(i, func(s string) string { return resum(strings.Replace(s, `"seq":`, `"seq":1`, 1)) }))
		at("edit with checksum in prev", i+1, edit(i, func(s string) string { return resum(flip(s, field(s, "prev")+7)) }))
		if !last {
			at("another prev", i+1, edit(i, func(s string) string {
				p := field(s, "prev")
				return resum(s[:p] + strings.Repeat("5a", 32) + s[p+64:])
			}))
		}
		if !last { // nothing tells then which of the two was there
			at("forged line before", i+1, edit(i, func(s string) string { return resum(strings.Replace(s, "c", "d", 1)) + "\n" + s }))
		}
		// Dropped, doubled, moved.
		want = i + 1
		if last {
			want = 0
		}
		at("drop", want, slices.Delete(slices.Clone(good), i, i+1))
		at("cut off after", 0, good[:i+1])
		at("double", i+2, slices.Insert(slices.Clone(good), i, good[i]))
		for j := range n + 1 {
			if j == i || j == i+1 {
				continue
			}
			copied := slices.Insert(slices.Clone(good), j, good[i])
			at(fmt.Sprintf("copy to before line %d", j+1), j+1, copied)
			from := i
			if j < i {
				from++
			}
			at(fmt.Sprintf("move to before line %d", j+1), min(i, j)+1, slices.Delete(slices.Clone(copied), from, from+1))
		}
		for j := i + 1; j < n; j++ {
			swapped := slices.Clone(good)
			swapped[i], swapped[j] = swapped[j], swapped[i]
			at(fmt.Sprintf("swap with line %d", j+1), i+1, swapped)
		}
	}
	dir := t.TempDir()
	head := holds(t, put(t, dir, "good", join(good))).Head
	for _, test := range all {
		if slices.Equal(test.lines, good) {
			continue
		}
		path := put(t, dir, "tampered", join(test.lines))
		_, err := audit.Verify([]string{path}, "")
		var found *audit.Tampered
		errors.As(err, &found)
		switch {
		case test.want == 0 && err != nil:
			t.Errorf("%s: got %v, want nothing", test.name, err)
		case test.want != 0 && (found == nil || found.File != path || found.Line != int64(test.want)):
			t.Errorf("%s: got %v, want line %d", test.name, err, test.want)
		}
		if _, err := audit.Verify([]string{path}, head); err == nil {
			t.Errorf("%s: it does not show with the head either", test.name)
		}
	}
	t.Logf("%d ways to tamper", len(all))
}

func TestVerifyOdd(t *testing.T) {
	t.Parallel()
	good, dir := sample(t, 4), t.TempDir()
	for _, test := range []struct{ name, content, want string }{
		{"empty", "", "line 1: is missing"},
		{"no newline", "hello", "line 1: is cut off"},
		{"another file", "hello\nworld\n", "line 1: is no line of an audit log"},
		{"newline only", "\n", "line 1: is no line of an audit log"},
		{"a later format", resum(strings.Replace(good[0], `"format":1`, `"format":2`, 1)) + "\n", "line 1: has format 2"},
		{"a huge line", good[0] + "\n" + strings.Repeat("x", 3<<20) + "\n" + good[1] + "\n", "line 2: is no line"},
	} {
		if _, err := audit.Verify([]string{put(t, dir, "odd", test.content)}, ""); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %s", test.name, err, test.want)
		}
	}
	if _, err := audit.Verify([]string{dir + "/none"}, ""); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want that there is no file", err)
	}
	path := put(t, dir, "good", join(good))
	if _, err := audit.Verify([]string{path}, "abc"); err == nil || !strings.Contains(err.Error(), "64 hex digits") {
		t.Errorf("got %v, want what a head is", err)
	}
}

// TestHead: each line has a head, and the head is found where it stands.
func TestHead(t *testing.T) {
	t.Parallel()
	good, dir := sample(t, 5), t.TempDir()
	whole := put(t, dir, "whole", join(good))
	for i := range good {
		cut := put(t, dir, "cut", join(good[:i+1]))
		head := holds(t, cut).Head
		report, err := audit.Verify([]string{whole}, head)
		if want := fmt.Sprintf("%s: line %d (sequence %d)", whole, i+1, i+1); err != nil || report.HeadAt != want {
			t.Errorf("got %q, %v, want %q", report.HeadAt, err, want)
		}
		if i < len(good)-1 {
			if _, err := audit.Verify([]string{cut}, holds(t, whole).Head); err == nil || !strings.Contains(err.Error(), "cut off") {
				t.Errorf("cut off after line %d: got %v, want that it shows", i+1, err)
			}
		}
	}
}

// TestTornAtEveryByte cuts the last line off everywhere: verify says so and exits
// well, the next start cuts it off and records it.
func TestTornAtEveryByte(t *testing.T) {
	t.Parallel()
	good, dir := sample(t, 3), t.TempDir()
	before, last := join(good[:2]), good[2]
	for n := 1; n < len(last); n++ {
		path := put(t, dir, "audit.log", before+last[:n])
		if c := holds(t, path); c.Lines != 2 || c.Torn != path+": line 3" {
			t.Fatalf("cut to %d bytes: got %d lines and torn %q, want 2 and line 3", n, c.Lines, c.Torn)
		}
		shut(t, open(t, audit.Config{Path: path}))
		all := records(t, path)
		if r := all[len(all)-1]; len(all) != 3 || r.Type != audit.TypeSystem || r.Action != "torn" || r.Bytes != int64(n) || !isHash(r.SHA256) {
			t.Fatalf("cut to %d bytes: got %d lines and %+v, want the torn line recorded", n, len(all), r.Record)
		}
		if c := holds(t, path); c.Lines != 3 || c.Torn != "" {
			t.Fatalf("cut to %d bytes, after a start: got %+v", n, c)
		}
	}
	// Without its newline a line is whole, and stays.
	path := put(t, dir, "audit.log", before+last)
	c := holds(t, path)
	l := open(t, audit.Config{Path: path})
	ok(t, l.Write(callContext(t), call("next")))
	shut(t, l)
	if c.Lines != 3 || c.Torn != "" || holds(t, path).Lines != 4 {
		t.Errorf("the newline alone is missing: got %+v, then %+v", c, holds(t, path))
	}
	// What is no beginning of the next line is no torn line.
	for _, end := range []string{"x", "{\"format\":1,\"seq\":4", last + "x"} {
		if _, err := audit.Verify([]string{put(t, dir, "other", before+end)}, ""); err == nil || !strings.Contains(err.Error(), "line 3:") {
			t.Errorf("%q: got %v, want line 3 named", end, err)
		}
	}
}

// FuzzVerify: whatever it is given, with checksums that fit or not, it ends and does
// not break, and never says that nothing holds.
func FuzzVerify(f *testing.F) {
	good, dir := sample(f, 3), f.TempDir()
	f.Add(join(good), false)
	f.Add(join(good[1:]), true)
	f.Add(join(good)+"piece\n"+strings.Replace(good[1], "call", "torn", 1), true)
	f.Add(join(good)+join(good), true)
	f.Add(strings.ReplaceAll(join(good), `"prev":"`, `"prev":"0`), true)
	f.Fuzz(func(t *testing.T, data string, sums bool) {
		if sums {
			all := strings.Split(data, "\n")
			for i, line := range all {
				if strings.Contains(line, `,"crc":"`) {
					all[i] = resum(line)
				}
			}
			data = strings.Join(all, "\n")
		}
		report, err := audit.Verify([]string{put(t, dir, "audit.log", data)}, "")
		var lines int64
		for _, c := range report.Chains {
			lines += c.Lines
		}
		if err == nil && lines < 1 {
			t.Errorf("%d lines hold in %q", lines, data)
		}
	})
}

// FuzzFlippedByte: a byte that was changed is found, and its line named.
func FuzzFlippedByte(f *testing.F) {
	good, dir := join(sample(f, 6)), f.TempDir()
	for at := 0; at < len(good); at += 7 {
		f.Add(uint(at), byte(1))
	}
	f.Add(uint(len(good)-1), byte(0xff))
	f.Fuzz(func(t *testing.T, at uint, mask byte) {
		if at %= uint(len(good)); mask == 0 {
			return
		}
		bad := []byte(good)
		bad[at] ^= mask
		want := int64(strings.Count(good[:at], "\n") + 1)
		_, err := audit.Verify([]string{put(t, dir, "audit.log", string(bad))}, "")
		var found *audit.Tampered
		if !errors.As(err, &found) || found.Line != want {
			t.Errorf("byte %d with %#x: got %v, want line %d", at, mask, err, want)
		}
	})
}
