package envoy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
)

// Value is a piece of JSON. What is not there is the zero Value, of which everything can be asked.
type Value struct{ v any }

// Parse reads JSON.
func Parse(b []byte) (Value, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return Value{}, fmt.Errorf("reading what Envoy says: %w", err)
	}
	return Value{v}, nil
}

// At goes down a path of fields.
func (v Value) At(path ...string) Value {
	for _, k := range path {
		m, _ := v.v.(map[string]any)
		v = Value{m[k]}
	}
	return v
}

// Is reports whether something is there.
func (v Value) Is() bool { return v.v != nil }

// Text is a string, or a number or a truth as JSON writes them.
func (v Value) Text() string {
	switch x := v.v.(type) {
	case string:
		return x
	case json.Number:
		return x.String()
	case bool:
		return strconv.FormatBool(x)
	}
	return ""
}

// Int is a number, written as one or as text.
func (v Value) Int() int {
	n, _ := strconv.Atoi(v.Text())
	return n
}

// True reports whether it is the truth value true.
func (v Value) True() bool { b, _ := v.v.(bool); return b }

// List is the items of a list.
func (v Value) List() []Value {
	l, _ := v.v.([]any)
	out := make([]Value, len(l))
	for i, x := range l {
		out[i] = Value{x}
	}
	return out
}

// Keys are the names of the fields, in order.
func (v Value) Keys() []string {
	m, _ := v.v.(map[string]any)
	return slices.Sorted(maps.Keys(m))
}

// MarshalJSON writes the piece again.
func (v Value) MarshalJSON() ([]byte, error) { return json.Marshal(v.v) }

// Without is the piece with all fields of these names left out, however deep.
func (v Value) Without(names ...string) Value {
	switch x := v.v.(type) {
	case map[string]any:
		out := make(map[string]any, len(x))
		for k, y := range x {
			if !slices.Contains(names, k) {
				out[k] = Value{y}.Without(names...).v
			}
		}
		return Value{out}
	case []any:
		out := make([]any, len(x))
		for i, y := range x {
			out[i] = Value{y}.Without(names...).v
		}
		return Value{out}
	}
	return v
}
