package hbone

import (
	"bytes"
	"strconv"

	"golang.org/x/net/http2/hpack"
)

// fieldDecoder turns header blocks into validated messages. The dynamic table lives as long as the
// connection, so that a block must be decoded even when its stream is gone.
type fieldDecoder struct {
	hpack *hpack.Decoder
	limit int

	// the block being decoded
	method, scheme, path, authority, status string
	seen                                    pseudo
	header                                  Header
	size                                    int
	regular                                 bool // a regular field was seen; no pseudo field may follow
	bad                                     string
	tooLarge                                bool
}

type pseudo uint8

const (
	sawMethod pseudo = 1 << iota
	sawScheme
	sawPath
	sawAuthority
	sawStatus
)

func newFieldDecoder(limit int) *fieldDecoder {
	d := &fieldDecoder{limit: limit}
	d.hpack = hpack.NewDecoder(hpackTableSize, d.emit)
	d.hpack.SetMaxStringLength(limit)
	return d
}

// decode reads one complete block. An error is a connection error: the tables are out of step.
func (d *fieldDecoder) decode(block []byte) error {
	*d = fieldDecoder{hpack: d.hpack, limit: d.limit}
	d.hpack.SetEmitEnabled(true)
	if _, err := d.hpack.Write(block); err != nil {
		return err
	}
	return d.hpack.Close()
}

func (d *fieldDecoder) emit(f hpack.HeaderField) {
	d.size += len(f.Name) + len(f.Value) + headerFieldExtra
	if d.size > d.limit {
		d.tooLarge = true
		d.hpack.SetEmitEnabled(false) // the rest is decoded for the table's sake, at its encoded length's cost
		return
	}
	if d.bad != "" {
		return
	}
	if len(f.Name) > 0 && f.Name[0] == ':' {
		d.emitPseudo(f)
		return
	}
	d.regular = true
	if !validName(f.Name) {
		d.bad = "malformed field name"
		return
	}
	if !validValue(f.Value) {
		d.bad = "malformed field value"
		return
	}
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		d.bad = "connection-specific field"
		return
	case "te":
		if f.Value != "trailers" {
			d.bad = "connection-specific field"
			return
		}
	}
	d.header = append(d.header, Field{f.Name, f.Value})
}

func (d *fieldDecoder) emitPseudo(f hpack.HeaderField) {
	var bit pseudo
	var dst *string
	switch f.Name {
	case ":method":
		bit, dst = sawMethod, &d.method
	case ":scheme":
		bit, dst = sawScheme, &d.scheme
	case ":path":
		bit, dst = sawPath, &d.path
	case ":authority":
		bit, dst = sawAuthority, &d.authority
	case ":status":
		bit, dst = sawStatus, &d.status
	}
	switch {
	case bit == 0:
		d.bad = "unknown pseudo field"
	case d.regular:
		d.bad = "pseudo field after a regular one"
	case d.seen&bit != 0:
		d.bad = "repeated pseudo field"
	case !validValue(f.Value):
		d.bad = "malformed pseudo field"
	default:
		d.seen |= bit
		*dst = f.Value
	}
}

// maxAuthority is a DNS name, or an address in brackets, and a port.
const maxAuthority = 253 + len(":65535")

// request returns the block as a request, or why it is none.
func (d *fieldDecoder) request() (Request, string) {
	r := Request{Method: d.method, Authority: d.authority, Scheme: d.scheme, Path: d.path, Header: d.header}
	switch {
	case d.bad != "":
		return r, d.bad
	case d.seen&sawStatus != 0:
		return r, "request with :status"
	case d.method == "":
		return r, "request without :method"
	case d.method == "CONNECT":
		if d.seen&(sawScheme|sawPath) != 0 {
			return r, "CONNECT with :scheme or :path"
		}
		if d.authority == "" {
			return r, "CONNECT without :authority"
		}
		if len(d.authority) > maxAuthority {
			return r, "CONNECT with an :authority that no host and port is as long as"
		}
	case d.scheme == "" || d.path == "":
		return r, "request without :scheme or :path"
	}
	return r, ""
}

// response returns the block as a response, or why it is none.
func (d *fieldDecoder) response() (Response, string) {
	switch {
	case d.bad != "":
		return Response{}, d.bad
	case d.seen != sawStatus:
		return Response{}, "response without :status or with request fields"
	}
	n, err := strconv.Atoi(d.status)
	if err != nil || len(d.status) != 3 || n < 100 {
		return Response{}, "malformed :status"
	}
	return Response{Status: n, Header: d.header}, ""
}

// trailers reports why the block is no trailer section.
func (d *fieldDecoder) trailers() string {
	if d.bad == "" && d.seen != 0 {
		return "pseudo field in trailers"
	}
	return d.bad
}

func validName(s string) bool {
	for i := range len(s) {
		if !nameByte[s[i]] {
			return false
		}
	}
	return s != ""
}

// nameByte is RFC 9110's token without upper case.
var nameByte = func() (t [256]bool) {
	for c := '0'; c <= '9'; c++ {
		t[c] = true
	}
	for c := 'a'; c <= 'z'; c++ {
		t[c] = true
	}
	for _, c := range "!#$%&'*+-.^_`|~" {
		t[c] = true
	}
	return t
}()

func validValue(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return s == "" || s[0] != ' ' && s[0] != '\t' && s[len(s)-1] != ' ' && s[len(s)-1] != '\t'
}

// fieldEncoder writes header blocks. One per connection, used in the order in which blocks are sent.
type fieldEncoder struct {
	buf   bytes.Buffer
	hpack *hpack.Encoder
}

func newFieldEncoder() *fieldEncoder {
	e := &fieldEncoder{}
	e.hpack = hpack.NewEncoder(&e.buf)
	e.hpack.SetMaxDynamicTableSizeLimit(hpackTableSize)
	return e
}

// put adds one field. Those that differ on nearly every stream stay out of the dynamic table.
func (e *fieldEncoder) put(name, value string) {
	f := hpack.HeaderField{Name: name, Value: value}
	f.Sensitive = name == HeaderForwarded || name == HeaderTraceparent
	_ = e.hpack.WriteField(f) // writes to a bytes.Buffer
}

// take returns the block and starts the next; it is valid until then.
func (e *fieldEncoder) take() []byte {
	b := e.buf.Bytes()
	e.buf.Reset()
	return b
}

// appendHeaders splits a block into HEADERS and CONTINUATION frames.
func appendHeaders(b []byte, id uint32, block []byte, end bool, maxFrame int) []byte {
	typ, flags := byte(frameHeaders), byte(0)
	if end {
		flags = flagEndStream
	}
	for {
		n := min(len(block), maxFrame)
		if n == len(block) {
			flags |= flagEndHeaders
		}
		b = appendFrameHeader(b, n, typ, flags, id)
		b = append(b, block[:n]...)
		if block = block[n:]; len(block) == 0 {
			return b
		}
		typ, flags = frameContinuation, 0
	}
}
