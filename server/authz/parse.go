package authz

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"github.com/exto/secrets-broker/secret"
)

// ownInstance stands in a rule's identity for an instance id, and in its
// instances for that same one.
const ownInstance = "{instance_id}"

// ParsePolicy reads a policy in YAML: a trust_domain, and rules that each give
// an identity permissions (allow) for kinds and instances, all of them when the
// rule does not say. It refuses whatever it does not know, so that a slip of the
// pen can neither widen nor lose a rule: other keys, a key twice, other types,
// empty lists, several documents, anchors and aliases.
//
// The error names the line of the first mistake and what is accepted there. Of
// the file it repeats the offending word and nothing more.
func ParsePolicy(data []byte) (*Policy, error) {
	root, err := parseYAML(data)
	if err != nil {
		return nil, err
	}
	file, err := fields(root, "a policy", []string{"trust_domain", "rules"})
	if err != nil {
		return nil, err
	}
	domain, err := text(file["trust_domain"], "trust_domain is a name such as console.exto")
	if err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(domain)
	if err != nil || td.Name() != domain {
		return nil, errorAt(file["trust_domain"], "%.40q is no trust domain: accepted is a name such as console.exto, in lower case and without spiffe://", domain)
	}
	rules, err := list(file["rules"], "rules is a list, [] when nobody may call")
	if err != nil {
		return nil, err
	}
	p := &Policy{exact: map[spiffeid.ID][]rule{}}
	for _, n := range rules {
		if err := p.addRule(n, td); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *Policy) addRule(n *yaml.Node, td spiffeid.TrustDomain) error {
	f, err := fields(n, "a rule", []string{"identity", "allow"}, "kinds", "instances")
	if err != nil {
		return err
	}
	identity, err := text(f["identity"], "identity is a SPIFFE ID such as spiffe://"+td.Name()+"/worker")
	if err != nil {
		return err
	}
	before, after, isTemplate := strings.Cut(identity, ownInstance)
	whole := identity
	if isTemplate {
		// The X can stand for a segment of a path, and for no part of a trust domain.
		whole = before + "X" + after
		if !strings.HasSuffix(before, "/") || after != "" && after[0] != '/' {
			return errorAt(f["identity"], "%s in an identity is one whole segment of its path", ownInstance)
		}
	}
	id, err := spiffeid.FromString(whole)
	switch {
	case err != nil:
		return errorAt(f["identity"], "%.80q is no identity: accepted is a SPIFFE ID such as spiffe://%s/worker, with %s for at most one whole segment of its path", identity, td, ownInstance)
	case !id.MemberOf(td):
		return errorAt(f["identity"], "identity %.80q is outside the trust domain: accepted is what begins with spiffe://%s", identity, td)
	case len(whole) > maxCallerBytes:
		return errorAt(f["identity"], "identity is too long: accepted are %d bytes", maxCallerBytes)
	}

	var r rule
	if r.permissions, err = parseAllow(f["allow"]); err != nil {
		return err
	}
	if r.kinds, err = parseKinds(f["kinds"]); err != nil {
		return err
	}
	if !isTemplate {
		if r.instances, err = parseInstances(f["instances"]); err != nil {
			return err
		}
		p.exact[id] = append(p.exact[id], r)
		return nil
	}
	if err := checkOwnInstance(f["instances"]); err != nil {
		return err
	}
	i := slices.IndexFunc(p.templates, func(t template) bool { return t.before == before && t.after == after })
	if i < 0 {
		i = len(p.templates)
		p.templates = append(p.templates, template{before: before, after: after})
	}
	p.templates[i].rules = append(p.templates[i].rules, r)
	return nil
}

func parseAllow(n *yaml.Node) (bits, error) {
	var accepted []string
	for _, p := range permissions {
		accepted = append(accepted, string(p))
	}
	form := "allow is a list of one or more of " + strings.Join(accepted, ", ")
	var set bits
	err := eachWord(n, form, func(word string) error {
		bit := permissionBit(Permission(word))
		if bit == 0 {
			return errors.New(form)
		}
		set |= bit
		return nil
	})
	return set, err
}

func parseKinds(n *yaml.Node) (bits, error) {
	var all bits
	var accepted []string
	for _, k := range secret.Kinds() {
		all |= kindBit(k)
		accepted = append(accepted, k.String())
	}
	if n == nil {
		return all, nil
	}
	form := "kinds is a list of one or more of " + strings.Join(accepted, ", ") + ", or the same in lower case; without it all are meant"
	var set bits
	err := eachWord(n, form, func(word string) error {
		for _, k := range secret.Kinds() {
			if word == k.String() || word == strings.ToLower(k.String()) {
				set |= kindBit(k)
				return nil
			}
		}
		return errors.New(form)
	})
	return set, err
}

// parseInstances is for identities without {instance_id}; nil means all.
func parseInstances(n *yaml.Node) (map[secret.InstanceID]bool, error) {
	if n == nil {
		return nil, nil
	}
	set := map[secret.InstanceID]bool{}
	err := eachWord(n, "instances is a list of one or more instance ids, each a string, in quotes where it looks like a number; without it all are meant", func(word string) error {
		if word == ownInstance {
			return errors.New("accepted only where the identity has it too")
		}
		id, err := secret.ParseInstanceID(word)
		set[id] = true
		return err
	})
	return set, err
}

// checkOwnInstance judges the instances of an identity with {instance_id}. They
// need not be said, and there is only one thing to say.
func checkOwnInstance(n *yaml.Node) error {
	if n == nil {
		return nil
	}
	const form = `an identity with {instance_id} has instances: ["{instance_id}"], in quotes, and nothing else`
	words := 0
	return eachWord(n, form, func(word string) error {
		if words++; word != ownInstance || words > 1 {
			return errors.New(form)
		}
		return nil
	})
}

// The functions below walk yaml.Node by hand: decoding into structs gives no
// line for an unknown key's value, an empty list or a word that only we know to
// be wrong, and it takes a null for an absent key.

// fields are the values of a mapping that has all of the required keys, perhaps
// some of the optional ones, and no other.
func fields(n *yaml.Node, what string, required []string, optional ...string) (map[string]*yaml.Node, error) {
	accepted := strings.Join(append(slices.Clone(required), optional...), ", ")
	if n.Kind != yaml.MappingNode || n.ShortTag() != "!!map" {
		return nil, errorAt(n, "%s is a mapping with the keys %s", what, accepted)
	}
	f := map[string]*yaml.Node{}
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		name, err := text(key, "the keys of "+what+" are "+accepted)
		switch {
		case err != nil:
			return nil, err
		case !slices.Contains(required, name) && !slices.Contains(optional, name):
			return nil, errorAt(key, "unknown key %.40q: the keys of %s are %s", name, what, accepted)
		case f[name] != nil:
			return nil, errorAt(key, "key %q a second time: accepted is each key once", name)
		}
		f[name] = value
	}
	for _, name := range required {
		if f[name] == nil {
			return nil, errorAt(n, "%s is missing: the keys of %s are %s", name, what, accepted)
		}
	}
	return f, nil
}

// text is a string. form says what is accepted.
func text(n *yaml.Node, form string) (string, error) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		return "", errorAt(n, "not a string: %s", form)
	}
	return n.Value, nil
}

// list is the items of a list. form says what is accepted.
func list(n *yaml.Node, form string) ([]*yaml.Node, error) {
	if n.Kind != yaml.SequenceNode || n.ShortTag() != "!!seq" {
		return nil, errorAt(n, "not a list: %s", form)
	}
	return n.Content, nil
}

// eachWord calls f with each string of a list that is not empty. The error of f
// says what is accepted instead of the word.
func eachWord(n *yaml.Node, form string, f func(word string) error) error {
	items, err := list(n, form)
	if err != nil {
		return err
	}
	if len(items) == 0 {
		return errorAt(n, "an empty list: %s", form)
	}
	for _, item := range items {
		word, err := text(item, form)
		if err != nil {
			return err
		}
		if err := f(word); err != nil {
			return errorAt(item, "%.40q: %w", word, err)
		}
	}
	return nil
}

func errorAt(n *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("line %d: %w", n.Line, fmt.Errorf(format, args...))
}

// parseYAML is the root of the one document of the file.
func parseYAML(data []byte) (*yaml.Node, error) {
	in := &lineReader{rest: data}
	dec := yaml.NewDecoder(in)
	var doc, second yaml.Node
	err := dec.Decode(&doc)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, in.syntaxError(err)
	}
	if err := dec.Decode(&second); err == nil {
		return nil, errorAt(&second, "a second document: accepted is one")
	} else if !errors.Is(err, io.EOF) {
		return nil, in.syntaxError(err)
	}
	if errors.Is(err, io.EOF) || isNothing(doc.Content[0]) {
		return nil, errors.New("line 1: the file is empty: accepted is a policy with the keys trust_domain, rules")
	}
	return doc.Content[0], refuseAnchors(&doc)
}

// isNothing reports whether n is the content of a document that has none, such as
// ---. Its line is that of the end, which the file may not have.
func isNothing(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.Value == "" && n.Style == 0 && n.Anchor == ""
}

// refuseAnchors keeps to what stands where it is read: a rule that is written
// elsewhere in the file is hard to review.
func refuseAnchors(n *yaml.Node) error {
	if n.Anchor != "" || n.Kind == yaml.AliasNode {
		return errorAt(n, "anchors and aliases (& and *) are not accepted: write it out, in quotes where it is a word")
	}
	for _, child := range n.Content {
		if err := refuseAnchors(child); err != nil {
			return err
		}
	}
	return nil
}

// lineReader gives the parser one line at a time, to know how far it got: the
// lines in yaml's own errors are missing, one too low, or those where the
// surrounding block begins.
type lineReader struct {
	rest []byte
	line int // the last line read
	said int // the last line read that says something: the parser skips the others when it looks ahead
}

func (r *lineReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		return 0, io.EOF
	}
	line, _, _ := bytes.Cut(r.rest, []byte("\n"))
	n := copy(p, r.rest[:min(len(line)+1, len(r.rest))])
	if words := bytes.TrimSpace(line); len(words) > 0 && words[0] != '#' {
		r.said = r.line + 1
	}
	if r.rest[n-1] == '\n' {
		r.line++
	}
	r.rest = r.rest[n:]
	return n, nil
}

var yamlErrorStart = regexp.MustCompile(`^yaml: (?:line [0-9]+: )?`)

func (r *lineReader) syntaxError(err error) error {
	return fmt.Errorf("line %d: here, or just before, it is no YAML: %s", max(r.said, 1), yamlErrorStart.ReplaceAllString(err.Error(), ""))
}
