package hbone

import "encoding/binary"

// Frame types and flags (RFC 9113, section 6).
const (
	frameData         = 0x0
	frameHeaders      = 0x1
	framePriority     = 0x2
	frameRSTStream    = 0x3
	frameSettings     = 0x4
	framePushPromise  = 0x5
	framePing         = 0x6
	frameGoAway       = 0x7
	frameWindowUpdate = 0x8
	frameContinuation = 0x9

	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

// Settings identifiers (RFC 9113, section 6.5.2).
const (
	settingHeaderTableSize   = 0x1
	settingEnablePush        = 0x2
	settingMaxStreams        = 0x3
	settingInitialWindowSize = 0x4
	settingMaxFrameSize      = 0x5
	settingMaxHeaderListSize = 0x6
)

const (
	frameHeaderLen   = 9
	minMaxFrame      = 16 << 10
	maxMaxFrame      = 1<<24 - 1
	maxWindow        = 1<<31 - 1
	defaultWindow    = 65535
	maxStreamID      = 1<<31 - 1
	clientPreface    = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	hpackTableSize   = 4096
	headerFieldExtra = 32 // what RFC 9113 adds to each field when it counts a header list
)

// Sizes that this implementation announces; they are ztunnel's. The connection window exceeds a stream's, or
// one stalled stream would stop the others.
const (
	ownStreamWindow     = 4 << 20
	ownConnWindow       = 16 << 20
	ownMaxFrame         = 1 << 20
	ownMaxStreams       = 200
	ownClientHeaderList = 16 << 10
	ownServerHeaderList = 64 << 10
)

type frameHeader struct {
	length int
	typ    byte
	flags  byte
	id     uint32
}

func parseFrameHeader(p []byte) frameHeader {
	return frameHeader{
		length: int(p[0])<<16 | int(p[1])<<8 | int(p[2]),
		typ:    p[3],
		flags:  p[4],
		id:     binary.BigEndian.Uint32(p[5:9]) & maxStreamID,
	}
}

func putFrameHeader(b []byte, length int, typ, flags byte, id uint32) {
	b[0], b[1], b[2], b[3], b[4] = byte(length>>16), byte(length>>8), byte(length), typ, flags
	binary.BigEndian.PutUint32(b[5:9], id)
}

func appendFrameHeader(b []byte, length int, typ, flags byte, id uint32) []byte {
	b = append(b, byte(length>>16), byte(length>>8), byte(length), typ, flags)
	return binary.BigEndian.AppendUint32(b, id)
}

func appendRST(b []byte, id uint32, code Code) []byte {
	b = appendFrameHeader(b, 4, frameRSTStream, 0, id)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

func appendWindowUpdate(b []byte, id uint32, n int) []byte {
	b = appendFrameHeader(b, 4, frameWindowUpdate, 0, id)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func appendPing(b []byte, ack bool, data [8]byte) []byte {
	var flags byte
	if ack {
		flags = flagAck
	}
	b = appendFrameHeader(b, 8, framePing, flags, 0)
	return append(b, data[:]...)
}

func appendGoAway(b []byte, last uint32, code Code, debug string) []byte {
	b = appendFrameHeader(b, 8+len(debug), frameGoAway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, last)
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	return append(b, debug...)
}

func appendSetting(b []byte, id uint16, v uint32) []byte {
	b = binary.BigEndian.AppendUint16(b, id)
	return binary.BigEndian.AppendUint32(b, v)
}

// appendHello writes what a side sends first: the preface (client), SETTINGS, and the connection window.
func appendHello(b []byte, client bool, maxFrame int) []byte {
	if client {
		b = append(b, clientPreface...)
		b = appendFrameHeader(b, 4*6, frameSettings, 0, 0)
		b = appendSetting(b, settingEnablePush, 0)
		b = appendSetting(b, settingInitialWindowSize, ownStreamWindow)
		b = appendSetting(b, settingMaxFrameSize, uint32(maxFrame))
		b = appendSetting(b, settingMaxHeaderListSize, ownClientHeaderList)
	} else {
		b = appendFrameHeader(b, 4*6, frameSettings, 0, 0)
		b = appendSetting(b, settingMaxStreams, ownMaxStreams)
		b = appendSetting(b, settingInitialWindowSize, ownStreamWindow)
		b = appendSetting(b, settingMaxFrameSize, uint32(maxFrame))
		b = appendSetting(b, settingMaxHeaderListSize, ownServerHeaderList)
	}
	return appendWindowUpdate(b, 0, ownConnWindow-defaultWindow)
}
