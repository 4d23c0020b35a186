package hbone

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"syscall"
)

var (
	// ErrClosed is returned by operations on a stream or connection that this side has closed.
	ErrClosed = errors.New("hbone: use of closed stream")
	// ErrDraining is returned by Client.Open once the connection takes no new streams.
	ErrDraining = errors.New("hbone: connection takes no new streams")
	// ErrPeerDead says that the peer answered neither data nor a PING in time.
	ErrPeerDead = errors.New("hbone: peer does not answer")
)

// Code is an HTTP/2 error code (RFC 9113, section 7).
type Code uint32

const (
	CodeNo                 Code = 0x0
	CodeProtocol           Code = 0x1
	CodeInternal           Code = 0x2
	CodeFlowControl        Code = 0x3
	CodeSettingsTimeout    Code = 0x4
	CodeStreamClosed       Code = 0x5
	CodeFrameSize          Code = 0x6
	CodeRefusedStream      Code = 0x7
	CodeCancel             Code = 0x8
	CodeCompression        Code = 0x9
	CodeConnect            Code = 0xa
	CodeEnhanceYourCalm    Code = 0xb
	CodeInadequateSecurity Code = 0xc
	CodeHTTP11Required     Code = 0xd
)

var codeNames = [...]string{"NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT",
	"STREAM_CLOSED", "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR",
	"ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED"}

func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return "code " + strconv.FormatUint(uint64(c), 10)
}

// ResetError says that a stream ended by RST_STREAM before it was complete. It is an ECONNRESET to
// errors.Is, because that is what the application at the other end of the tunnel did or must see.
type ResetError struct {
	Code   Code
	Remote bool // the peer sent it
}

func (e *ResetError) Error() string {
	if e.Remote {
		return "hbone: stream reset by peer: " + e.Code.String()
	}
	return "hbone: stream reset: " + e.Code.String()
}

// Is makes errors.Is(err, syscall.ECONNRESET) true.
func (e *ResetError) Is(target error) bool { return target == syscall.ECONNRESET }

// ConnError says that a tunnel connection failed as a whole.
type ConnError struct {
	Code   Code
	Remote bool // the peer said so in a GOAWAY
	Reason string
}

func (e *ConnError) Error() string {
	by := "connection error"
	if e.Remote {
		by = "peer sent GOAWAY"
	}
	if e.Reason == "" {
		return fmt.Sprintf("hbone: %s: %s", by, e.Code)
	}
	return fmt.Sprintf("hbone: %s: %s: %s", by, e.Code, e.Reason)
}

// Flooded reports whether err is the end of a connection whose peer sent too much of what costs it nothing.
func Flooded(err error) bool {
	var ce *ConnError
	return errors.As(err, &ce) && !ce.Remote && ce.Code == CodeEnhanceYourCalm
}

// OpenError says why a stream could not be opened.
type OpenError struct {
	// Sent reports that the CONNECT may have reached the peer, so that the application may have seen a
	// connection come and go. No byte of the stream was sent in either case: the client sends none before the 200.
	Sent bool
	// Status is the peer's answer, 0 when it gave none.
	Status int
	// Header is what came with Status.
	Header Header
	Err    error // nil when Status says it all
}

func (e *OpenError) Error() string {
	if e.Status != 0 {
		return "hbone: peer refused the connection: " + strconv.Itoa(e.Status) + " " + http.StatusText(e.Status)
	}
	return "hbone: open stream: " + e.Err.Error()
}

func (e *OpenError) Unwrap() error { return e.Err }

// Retryable reports whether another endpoint may be tried: the peer could not be reached, went away, or
// could not reach the application (503). A refusal by policy (401) or of the request itself (400) is final.
func (e *OpenError) Retryable() bool { return e.Status == 0 || e.Status >= 500 }
