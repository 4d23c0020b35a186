package envoy

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
)

// unknown is returned of what is not evaluated here: nobody is told something that was guessed.
type unknown struct{ what string }

func (u unknown) Error() string { return u.what + " is not followed here" }

// matchString compares text with a StringMatcher.
func matchString(m Value, s string) (bool, error) {
	lower := func(t string) string { return t }
	if m.At("ignore_case").True() {
		lower, s = strings.ToLower, strings.ToLower(s)
	}
	switch {
	case m.At("exact").Is():
		return s == lower(m.At("exact").Text()), nil
	case m.At("prefix").Is():
		return strings.HasPrefix(s, lower(m.At("prefix").Text())), nil
	case m.At("suffix").Is():
		return strings.HasSuffix(s, lower(m.At("suffix").Text())), nil
	case m.At("contains").Is():
		return strings.Contains(s, lower(m.At("contains").Text())), nil
	case m.At("safe_regex").Is():
		return matchRegex(m.At("safe_regex", "regex").Text(), s)
	case len(m.Keys()) == 0: // the empty text, which is not written
		return s == "", nil
	}
	return false, unknown{"a comparison by " + strings.Join(m.Keys(), ", ")}
}

// matchRegex compares the whole text; Envoy's expressions are RE2's, as Go's are.
func matchRegex(expr, s string) (bool, error) {
	r, err := regexp.Compile("^(?:" + expr + ")$")
	if err != nil {
		return false, unknown{"the expression " + expr}
	}
	return r.MatchString(s), nil
}

func matchHeader(m Value, q *Request) (bool, error) {
	v, there := q.header(strings.ToLower(m.At("name").Text()))
	found, err := there, error(nil)
	switch {
	case m.At("string_match").Is():
		if !there && !m.At("treat_missing_header_as_empty").True() {
			return false, nil // and so it is where the match is inverted
		}
		found, err = matchString(m.At("string_match"), v)
	case m.At("present_match").Is():
		found = there == m.At("present_match").True()
	case m.At("range_match").Is(), m.At("exact_match").Is(), m.At("safe_regex_match").Is(), m.At("prefix_match").Is(), m.At("suffix_match").Is(), m.At("contains_match").Is():
		return false, unknown{"a match of the header " + m.At("name").Text()}
	}
	if m.At("invert_match").True() {
		found = !found
	}
	return found, err
}

func matchCIDR(m Value, a netip.Addr) (bool, error) {
	addr, err := netip.ParseAddr(m.At("address_prefix").Text())
	if err != nil {
		return false, unknown{"the range " + m.At("address_prefix").Text()}
	}
	p, err := addr.Prefix(m.At("prefix_len").Int())
	if err != nil {
		return false, unknown{"the range " + addr.String()}
	}
	return p.Contains(a.Unmap()), nil
}

// mayHaveToken reports whether the request has something in which a token may be.
func (q *Request) mayHaveToken() bool {
	_, auth := q.header("authorization")
	_, cookie := q.header("cookie")
	return q.tokens && (auth || cookie || strings.Contains(q.Path, "?"))
}

// anyOf and allOf look at everything that decides: something unknown that does not decide does no harm.
func anyOf(list []Value, f func(Value) (bool, error)) (bool, error) {
	var first error
	for _, v := range list {
		ok, err := f(v)
		if ok && err == nil {
			return true, nil
		}
		if err != nil && first == nil {
			first = err
		}
	}
	return false, first
}

func allOf(list []Value, f func(Value) (bool, error)) (bool, error) {
	var first error
	for _, v := range list {
		ok, err := f(v)
		if !ok && err == nil {
			return false, nil
		}
		if err != nil && first == nil {
			first = err
		}
	}
	return first == nil, first
}

func not(ok bool, err error) (bool, error) { return !ok && err == nil, err }

// permits compares what is asked for with a Permission.
func (q *Request) permits(p Value) (bool, error) {
	switch {
	case p.At("any").True():
		return true, nil
	case p.At("and_rules").Is():
		return allOf(p.At("and_rules", "rules").List(), q.permits)
	case p.At("or_rules").Is():
		return anyOf(p.At("or_rules", "rules").List(), q.permits)
	case p.At("not_rule").Is():
		return not(q.permits(p.At("not_rule")))
	case p.At("destination_port").Is():
		return int(q.Dst.Port()) == p.At("destination_port").Int(), nil
	case p.At("destination_ip").Is():
		return matchCIDR(p.At("destination_ip"), q.Dst.Addr())
	case p.At("header").Is():
		return matchHeader(p.At("header"), q)
	case p.At("url_path").Is():
		path, _, _ := strings.Cut(q.Path, "?")
		return matchString(p.At("url_path", "path"), path)
	}
	return false, unknown{"a rule about " + strings.Join(p.Keys(), ", ")}
}

// asks compares who asks with a Principal.
func (q *Request) asks(p Value) (bool, error) {
	switch {
	case p.At("any").True():
		return true, nil
	case p.At("and_ids").Is():
		return allOf(p.At("and_ids", "ids").List(), q.asks)
	case p.At("or_ids").Is():
		return anyOf(p.At("or_ids", "ids").List(), q.asks)
	case p.At("not_id").Is():
		return not(q.asks(p.At("not_id")))
	case p.At("direct_remote_ip").Is():
		return matchCIDR(p.At("direct_remote_ip"), q.Source)
	case p.At("remote_ip").Is():
		if _, there := q.header("x-forwarded-for"); there {
			return false, unknown{"an address by X-Forwarded-For"}
		}
		return matchCIDR(p.At("remote_ip"), q.Source)
	case p.At("filter_state", "key").Text() == peerPrincipal:
		return matchString(p.At("filter_state", "string_match"), q.Principal)
	case p.At("filter_state", "key").Text() == tokenPrincipal, p.At("sourced_metadata").Is() && !p.At("sourced_metadata", "metadata_matcher", "invert").True():
		if q.mayHaveToken() {
			return false, unknown{"what is in a token"}
		}
		return false, nil // nothing is said of a token that is not there
	}
	return false, unknown{"a rule about who asks by " + strings.Join(p.Keys(), ", ")}
}

// rbac says whether rules let the request pass, and which of them says so.
func (q *Request) rbac(rules Value) (allow bool, by string, err error) {
	deny := rules.At("action").Text() == "DENY"
	if a := rules.At("action").Text(); a != "" && a != "ALLOW" && a != "DENY" {
		return true, "", nil // it only logs
	}
	policies := rules.At("policies")
	var first error
	for _, name := range policies.Keys() {
		p := policies.At(name)
		if p.At("condition").Is() || p.At("checked_condition").Is() {
			first = unknown{"a condition of " + name}
			continue
		}
		what, err := anyOf(p.At("permissions").List(), q.permits)
		who, err2 := anyOf(p.At("principals").List(), q.asks)
		switch {
		case what && who:
			return !deny, name, nil
		case err != nil && (who || err2 != nil) || err2 != nil && what:
			if first == nil {
				first = fmt.Errorf("%s: %w", name, cmpErr(err, err2))
			}
		}
	}
	return deny, "", first
}

func cmpErr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}
