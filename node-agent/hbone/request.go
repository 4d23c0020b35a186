package hbone

// Field is one header field; names are lower case.
type Field struct{ Name, Value string }

// Header is the regular fields of a request or response in the order in which they came.
type Header []Field

// Get returns the value of the first field called name, which must be lower case.
func (h Header) Get(name string) string {
	for i := range h {
		if h[i].Name == name {
			return h[i].Value
		}
	}
	return ""
}

// Values returns the values of all fields called name.
func (h Header) Values(name string) []string {
	var v []string
	for i := range h {
		if h[i].Name == name {
			v = append(v, h[i].Value)
		}
	}
	return v
}

// Request is what a client asks for. A CONNECT has only Method and Authority; Scheme and Path are filled
// for other methods, which a handler would normally reject.
type Request struct {
	Method    string // "CONNECT" when empty
	Authority string
	Scheme    string
	Path      string
	Header    Header
}

// Response is the peer's answer to a Request.
type Response struct {
	Status int
	Header Header
}
