package hbone

import (
	"encoding/binary"
	"math"
	"strconv"
	"time"
)

// session is the protocol state of one connection: bytes in become events ([session.next]), what is to be
// sent becomes bytes in out. It does no I/O, blocks on nothing and knows no goroutine; whoever drives it
// serializes the calls. Streams are registered and removed by the driver through add and drop.
type session struct {
	client   bool
	maxFrame int    // the peer may send
	out      []byte // frames that wait to be written

	enc *fieldEncoder
	dec *fieldDecoder

	streams map[uint32]*Stream
	nextID  uint32 // client: id of the next stream
	lastID  uint32 // server: highest id that the peer used
	accept  uint32 // server: highest id that is still taken; lowered by GOAWAY
	refused uint32 // client: streams from here on were refused by GOAWAY
	recent  [64]uint32
	recentN int

	// What the peer allows us.
	sendWin        int64
	peerWindow     int64 // its SETTINGS_INITIAL_WINDOW_SIZE
	peerMaxFrame   int
	peerMaxStreams uint32

	// What we allow the peer.
	recvWin    int64
	recvCredit int     // received, not yet given back
	buffered   int     // bytes in stream queues
	memory     *Memory // what buffered counts against, beside other connections
	window     int64   // stream window announced last
	granted    int64   // stream window that the peer may be using: lowered only once it has acknowledged
	unacked    []int64 // by SETTINGS frame sent: by how much its acknowledgement lowers granted
	windowedAt int64   // when window was announced

	// The input that is being read.
	preface  string // bytes of the client's preface still to come
	settings bool   // the peer's first SETTINGS came
	data     dataFrame
	skip     int // bytes of a frame that is ignored
	need     int // bytes next must be called with at least
	block    []byte
	blockID  uint32 // stream whose header block is open, 0 for none
	blockEnd bool   // its HEADERS had END_STREAM
	blockBad bool   // its HEADERS depended on itself
	blockLen int    // frames of it

	resp Response // of evResponse
	req  Request  // of evRequest

	flood
}

// dataFrame is the DATA frame whose payload is passing through.
type dataFrame struct {
	on   bool
	st   *Stream // nil when the payload is dropped
	left int
	pad  int
	end  bool
}

type eventKind uint8

const (
	evNone      eventKind = iota
	evMore                // need more input
	evData                // data for st, end with the last
	evRequest             // new stream id with req; end when no body follows
	evResponse            // resp for st
	evEnd                 // st got trailers
	evReset               // the peer reset st with code
	evBroken              // st violated the protocol and was reset with code; it is still registered
	evWritable            // st (nil: the connection) may send more
	evPong                // answer to our PING
	evGoAway              // the peer takes no streams after id
	evTooLarge            // request on id with a header list over the limit
	evMalformed           // request on id was malformed and was reset
)

type event struct {
	kind eventKind
	end  bool
	id   uint32
	code Code
	st   *Stream
	data []byte
}

// newSession starts a session. maxFrame is the longest frame that the peer is told to send, 0 for the most.
func newSession(client bool, maxFrame int, memory *Memory) *session {
	if memory == nil {
		memory = NewMemory(0)
	}
	if maxFrame == 0 {
		maxFrame = ownMaxFrame
	}
	s := &session{
		client:         client,
		maxFrame:       maxFrame,
		enc:            newFieldEncoder(),
		streams:        map[uint32]*Stream{},
		nextID:         1,
		accept:         maxStreamID,
		refused:        math.MaxUint32,
		sendWin:        defaultWindow,
		peerWindow:     defaultWindow,
		peerMaxFrame:   minMaxFrame,
		peerMaxStreams: math.MaxUint32,
		recvWin:        ownConnWindow,
		memory:         memory,
		window:         ownStreamWindow,
		granted:        ownStreamWindow,
		unacked:        []int64{0},
	}
	limit := ownClientHeaderList
	if !client {
		s.preface = clientPreface
		limit = ownServerHeaderList
	}
	s.dec = newFieldDecoder(limit)
	s.out = appendHello(nil, client, maxFrame)
	return s
}

func protocolError(reason string) *ConnError { return &ConnError{Code: CodeProtocol, Reason: reason} }

// next reads from p as much as one step takes and says what it means. Data in the event is part of p.
// A returned error ends the connection with the GOAWAY it names.
func (s *session) next(p []byte) (int, event, *ConnError) {
	switch {
	case s.preface != "":
		n := min(len(p), len(s.preface))
		if string(p[:n]) != s.preface[:n] {
			return 0, event{}, protocolError("not an HTTP/2 preface")
		}
		s.preface = s.preface[n:]
		return n, s.moreUnless(n > 0, 1), nil
	case s.data.on:
		return s.nextData(p)
	case s.skip > 0:
		n := min(len(p), s.skip)
		s.skip -= n
		return n, s.moreUnless(n > 0, 1), nil
	case len(p) < frameHeaderLen:
		return 0, s.more(frameHeaderLen), nil
	}
	h := parseFrameHeader(p)
	if h.length > s.maxFrame {
		return 0, event{}, &ConnError{Code: CodeFrameSize, Reason: "frame of " + strconv.Itoa(h.length) + " bytes"}
	}
	if s.blockID != 0 && (h.typ != frameContinuation || h.id != s.blockID) {
		return 0, event{}, protocolError("header block was interrupted")
	}
	if !s.settings && (h.typ != frameSettings || h.flags&flagAck != 0) {
		return 0, event{}, protocolError("first frame is not SETTINGS")
	}
	if h.typ == frameData {
		return s.beginData(h, p)
	}
	if h.typ > frameContinuation {
		s.skip = h.length
		err := s.glitch(costUnknownFrame)
		return frameHeaderLen, event{}, err
	}
	if h.typ == frameGoAway && h.length > maxControlFrame { // only debug data can be that long
		if len(p) < frameHeaderLen+8 {
			return 0, s.more(frameHeaderLen + 8), nil
		}
		s.skip = h.length - 8
		h.length = 8
	}
	if h.length > maxControlFrame {
		return 0, event{}, &ConnError{Code: CodeEnhanceYourCalm, Reason: "control frame of " + strconv.Itoa(h.length) + " bytes"}
	}
	total := frameHeaderLen + h.length
	if len(p) < total {
		return 0, s.more(total), nil
	}
	ev, err := s.frame(h, p[frameHeaderLen:total])
	return total, ev, err
}

// maxControlFrame is the longest frame other than DATA that is read at all.
const maxControlFrame = ownServerHeaderList

func (s *session) more(need int) event {
	s.need = need
	return event{kind: evMore}
}

func (s *session) moreUnless(ok bool, need int) event {
	if ok {
		return event{}
	}
	return s.more(need)
}

func (s *session) frame(h frameHeader, p []byte) (event, *ConnError) {
	switch h.typ {
	case frameHeaders:
		return s.headersFrame(h, p)
	case frameContinuation:
		if s.blockID == 0 {
			return event{}, protocolError("CONTINUATION without HEADERS")
		}
		return s.blockFragment(p, h.flags&flagEndHeaders != 0)
	case framePriority:
		if h.id == 0 {
			return event{}, protocolError("PRIORITY on stream 0")
		}
		if err := s.glitch(costPriority); err != nil {
			return event{}, err
		}
		if len(p) != 5 {
			return s.streamError(h.id, CodeFrameSize)
		}
		if binary.BigEndian.Uint32(p)&maxStreamID == h.id {
			return s.streamError(h.id, CodeProtocol)
		}
		return event{}, nil
	case frameRSTStream:
		return s.rstFrame(h, p)
	case frameSettings:
		return s.settingsFrame(h, p)
	case framePushPromise:
		return event{}, protocolError("PUSH_PROMISE")
	case framePing:
		if h.id != 0 {
			return event{}, protocolError("PING on a stream")
		}
		if len(p) != 8 {
			return event{}, &ConnError{Code: CodeFrameSize, Reason: "PING"}
		}
		if h.flags&flagAck != 0 {
			return event{kind: evPong}, s.glitch(costUnknownFrame)
		}
		s.out = appendPing(s.out, true, [8]byte(p))
		return event{}, s.glitch(costPing)
	case frameGoAway:
		if h.id != 0 {
			return event{}, protocolError("GOAWAY on a stream")
		}
		if len(p) < 8 {
			return event{}, &ConnError{Code: CodeFrameSize, Reason: "GOAWAY"}
		}
		last := binary.BigEndian.Uint32(p) & maxStreamID
		s.refused = min(s.refused, last+1)
		return event{kind: evGoAway, id: last, code: Code(binary.BigEndian.Uint32(p[4:]))}, s.glitch(costPing)
	default:
		return s.windowUpdateFrame(h, p)
	}
}

// idle reports whether stream id was never opened.
func (s *session) idle(id uint32) bool {
	if s.client {
		return id&1 == 0 || id >= s.nextID
	}
	return id&1 == 0 || id > s.lastID
}

func (s *session) add(st *Stream) { s.streams[st.id] = st }

// drop forgets a stream. ours says that this side reset it, so that frames of it are still under way.
func (s *session) drop(st *Stream, ours bool) {
	if s.data.st == st {
		s.data.st = nil
	}
	delete(s.streams, st.id)
	if ours {
		s.recent[s.recentN%len(s.recent)] = st.id
		s.recentN++
	}
}

func (s *session) recentlyReset(id uint32) bool {
	for _, r := range s.recent {
		if r == id {
			return true
		}
	}
	return false
}

// streamError resets one stream for what the peer did. The driver learns of it where the stream is registered.
func (s *session) streamError(id uint32, code Code) (event, *ConnError) {
	if s.idle(id) { // resetting a stream that does not exist yet would be a violation of ours
		return event{}, &ConnError{Code: code, Reason: "on idle stream " + strconv.FormatUint(uint64(id), 10)}
	}
	err := s.glitch(costStreamError)
	s.out = appendRST(s.out, id, code)
	if st := s.streams[id]; st != nil {
		return event{kind: evBroken, st: st, code: code}, err
	}
	return event{}, err
}

func (s *session) beginData(h frameHeader, p []byte) (int, event, *ConnError) {
	if h.id == 0 {
		return 0, event{}, protocolError("DATA on stream 0")
	}
	n, pad := frameHeaderLen, 0
	if h.flags&flagPadded != 0 {
		if h.length == 0 {
			return 0, event{}, &ConnError{Code: CodeFrameSize, Reason: "padded DATA without length"}
		}
		if len(p) < frameHeaderLen+1 {
			return 0, s.more(frameHeaderLen + 1), nil
		}
		n++
		if pad = int(p[frameHeaderLen]); pad > h.length-1 {
			return 0, event{}, protocolError("padding exceeds DATA")
		}
	}
	if s.idle(h.id) {
		return 0, event{}, protocolError("DATA on idle stream")
	}
	if s.recvWin -= int64(h.length); s.recvWin < 0 {
		return 0, event{}, &ConnError{Code: CodeFlowControl, Reason: "connection window exceeded"}
	}
	s.recvCredit += h.length
	st := s.streams[h.id]
	s.data = dataFrame{on: true, st: st, left: h.length - (n - frameHeaderLen) - pad, pad: pad, end: h.flags&flagEndStream != 0}
	if s.data.left == 0 && !s.data.end {
		if err := s.glitch(costEmptyData); err != nil {
			return 0, event{}, err
		}
	}
	if st == nil {
		if s.recentlyReset(h.id) {
			return n, event{}, nil
		}
		ev, err := s.streamError(h.id, CodeStreamClosed)
		return n, ev, err
	}
	var bad Code
	switch {
	case st.remoteEnd:
		bad = CodeStreamClosed
	case st.recvWin < int64(h.length):
		bad = CodeFlowControl
	case s.client && !st.answered:
		bad = CodeProtocol
	case st.bodyLeft >= 0 && (int64(s.data.left) > st.bodyLeft || s.data.end && int64(s.data.left) != st.bodyLeft):
		bad = CodeProtocol
	default:
		st.recvWin -= int64(h.length)
		st.recvCredit += h.length - s.data.left // padding is consumed at once
		if st.bodyLeft >= 0 {
			st.bodyLeft -= int64(s.data.left)
		}
		return n, event{}, nil
	}
	s.data.st = nil
	ev, err := s.streamError(h.id, bad)
	return n, ev, err
}

func (s *session) nextData(p []byte) (int, event, *ConnError) {
	d := &s.data
	if len(p) == 0 && d.left+d.pad > 0 {
		return 0, s.more(1), nil
	}
	n := min(len(p), d.left)
	d.left -= n
	ev := event{kind: evData, st: d.st, data: p[:n]}
	if d.left == 0 {
		k := min(len(p)-n, d.pad)
		d.pad -= k
		n += k
		if d.pad == 0 {
			d.on = false
			ev.end = d.end
			if d.end && d.st != nil {
				d.st.remoteEnd = true
			}
		}
	}
	if ev.st == nil || len(ev.data) == 0 && !ev.end {
		return n, event{}, nil
	}
	return n, ev, nil
}

func (s *session) headersFrame(h frameHeader, p []byte) (event, *ConnError) {
	if h.id == 0 {
		return event{}, protocolError("HEADERS on stream 0")
	}
	pad := 0
	if h.flags&flagPadded != 0 {
		if len(p) < 1 {
			return event{}, &ConnError{Code: CodeFrameSize, Reason: "padded HEADERS"}
		}
		pad, p = int(p[0]), p[1:]
	}
	s.blockBad = false
	if h.flags&flagPriority != 0 {
		if len(p) < 5 {
			return event{}, &ConnError{Code: CodeFrameSize, Reason: "HEADERS with priority"}
		}
		s.blockBad = binary.BigEndian.Uint32(p)&maxStreamID == h.id
		p = p[5:]
	}
	if pad > len(p) {
		return event{}, protocolError("padding exceeds HEADERS")
	}
	if !s.client && h.id&1 == 0 || s.client && s.idle(h.id) {
		return event{}, protocolError("HEADERS on a stream that the peer may not open")
	}
	s.blockID, s.blockEnd, s.blockLen, s.block = h.id, h.flags&flagEndStream != 0, 0, s.block[:0]
	return s.blockFragment(p[:len(p)-pad], h.flags&flagEndHeaders != 0)
}

// maxBlockFrames bounds HEADERS and CONTINUATION frames of one block; 64 KiB fit in far fewer.
const maxBlockFrames = 64

func (s *session) blockFragment(p []byte, last bool) (event, *ConnError) {
	s.blockLen++
	if len(s.block)+len(p) > maxControlFrame || s.blockLen > maxBlockFrames {
		return event{}, &ConnError{Code: CodeEnhanceYourCalm, Reason: "header block too long"}
	}
	block := p
	if !last || len(s.block) > 0 {
		s.block = append(s.block, p...)
		block = s.block
	}
	if !last {
		return event{}, nil
	}
	id := s.blockID
	s.blockID = 0
	if cap(s.block) > 4<<10 {
		s.block = nil
	}
	if err := s.dec.decode(block); err != nil {
		return event{}, &ConnError{Code: CodeCompression, Reason: err.Error()}
	}
	if s.client {
		return s.clientHeaders(id)
	}
	return s.serverHeaders(id)
}

func (s *session) clientHeaders(id uint32) (event, *ConnError) {
	st := s.streams[id]
	switch {
	case st == nil:
		return event{}, nil // crossed our reset
	case st.remoteEnd:
		return s.streamError(id, CodeStreamClosed)
	case s.blockBad || s.dec.tooLarge:
		return s.streamError(id, CodeProtocol)
	case st.answered:
		return s.trailers(st)
	}
	resp, bad := s.dec.response()
	if bad != "" || resp.Status == 101 || resp.Status < 200 && s.blockEnd {
		return s.streamError(id, CodeProtocol)
	}
	if resp.Status < 200 {
		return event{}, s.glitch(costStreamError)
	}
	st.answered = true
	st.remoteEnd = s.blockEnd
	s.resp = resp
	return event{kind: evResponse, st: st, end: s.blockEnd}, nil
}

func (s *session) serverHeaders(id uint32) (event, *ConnError) {
	if st := s.streams[id]; st != nil {
		if st.remoteEnd {
			return s.streamError(id, CodeStreamClosed)
		}
		return s.trailers(st)
	}
	if id <= s.lastID {
		if s.recentlyReset(id) {
			return event{}, s.glitch(costStreamError)
		}
		return event{}, protocolError("HEADERS on a closed stream")
	}
	s.lastID = id
	if id > s.accept { // after our GOAWAY
		s.out = appendRST(s.out, id, CodeRefusedStream)
		return event{}, s.glitch(costRefused)
	}
	if s.dec.tooLarge {
		return event{kind: evTooLarge, id: id, end: s.blockEnd}, s.glitch(costTooLarge)
	}
	req, bad := s.dec.request()
	if bad != "" || s.blockBad {
		err := s.glitch(costStreamError)
		s.out = appendRST(s.out, id, CodeProtocol)
		return event{kind: evMalformed, id: id}, err
	}
	s.req = req
	return event{kind: evRequest, id: id, end: s.blockEnd}, nil
}

func (s *session) trailers(st *Stream) (event, *ConnError) {
	if s.dec.trailers() != "" || !s.blockEnd || s.dec.tooLarge || st.bodyLeft > 0 {
		return s.streamError(st.id, CodeProtocol)
	}
	st.remoteEnd = true
	return event{kind: evEnd, st: st}, nil
}

func (s *session) rstFrame(h frameHeader, p []byte) (event, *ConnError) {
	if h.id == 0 {
		return event{}, protocolError("RST_STREAM on stream 0")
	}
	if len(p) != 4 {
		return event{}, &ConnError{Code: CodeFrameSize, Reason: "RST_STREAM"}
	}
	if s.idle(h.id) {
		return event{}, protocolError("RST_STREAM on idle stream")
	}
	st := s.streams[h.id]
	if st == nil {
		return event{}, s.glitch(costPing)
	}
	var err *ConnError
	if !s.client && !st.answered {
		err = s.glitch(costUnansweredReset)
	}
	return event{kind: evReset, st: st, code: Code(binary.BigEndian.Uint32(p))}, err
}

func (s *session) windowUpdateFrame(h frameHeader, p []byte) (event, *ConnError) {
	if len(p) != 4 {
		return event{}, &ConnError{Code: CodeFrameSize, Reason: "WINDOW_UPDATE"}
	}
	inc := int64(binary.BigEndian.Uint32(p) & maxWindow)
	if err := s.windowUpdateReceived(); err != nil {
		return event{}, err
	}
	if h.id == 0 {
		if inc == 0 {
			return event{}, protocolError("WINDOW_UPDATE of 0")
		}
		if s.sendWin += inc; s.sendWin > maxWindow {
			return event{}, &ConnError{Code: CodeFlowControl, Reason: "connection window overflow"}
		}
		return event{kind: evWritable}, nil
	}
	if s.idle(h.id) {
		return event{}, protocolError("WINDOW_UPDATE on idle stream")
	}
	st := s.streams[h.id]
	if st == nil {
		return event{}, nil
	}
	if inc == 0 {
		return s.streamError(h.id, CodeProtocol)
	}
	if st.sendWin += inc; st.sendWin > maxWindow {
		return s.streamError(h.id, CodeFlowControl)
	}
	return event{kind: evWritable, st: st}, nil
}

func (s *session) settingsFrame(h frameHeader, p []byte) (event, *ConnError) {
	if h.id != 0 {
		return event{}, protocolError("SETTINGS on a stream")
	}
	if h.flags&flagAck != 0 {
		if len(p) != 0 {
			return event{}, &ConnError{Code: CodeFrameSize, Reason: "SETTINGS acknowledgement with payload"}
		}
		if len(s.unacked) == 0 {
			return event{}, protocolError("acknowledgement of SETTINGS that were not sent")
		}
		s.lowerWindows(s.unacked[0])
		s.unacked = s.unacked[1:]
		return event{}, nil
	}
	if len(p)%6 != 0 {
		return event{}, &ConnError{Code: CodeFrameSize, Reason: "SETTINGS"}
	}
	if len(p) > 6*64 {
		return event{}, &ConnError{Code: CodeEnhanceYourCalm, Reason: "SETTINGS with too many entries"}
	}
	if s.settings {
		if err := s.glitch(costSettings); err != nil {
			return event{}, err
		}
	}
	s.settings = true
	for ; len(p) > 0; p = p[6:] {
		v := binary.BigEndian.Uint32(p[2:])
		switch binary.BigEndian.Uint16(p) {
		case settingHeaderTableSize:
			s.enc.hpack.SetMaxDynamicTableSize(min(v, hpackTableSize))
		case settingEnablePush:
			if v > 1 {
				return event{}, protocolError("SETTINGS_ENABLE_PUSH")
			}
		case settingMaxStreams:
			s.peerMaxStreams = v
		case settingInitialWindowSize:
			if v > maxWindow {
				return event{}, &ConnError{Code: CodeFlowControl, Reason: "SETTINGS_INITIAL_WINDOW_SIZE"}
			}
			delta := int64(v) - s.peerWindow
			s.peerWindow = int64(v)
			for _, st := range s.streams {
				if st.sendWin += delta; st.sendWin > maxWindow {
					return event{}, &ConnError{Code: CodeFlowControl, Reason: "stream window overflow"}
				}
			}
		case settingMaxFrameSize:
			if v < minMaxFrame || v > maxMaxFrame {
				return event{}, protocolError("SETTINGS_MAX_FRAME_SIZE")
			}
			s.peerMaxFrame = int(v)
		}
	}
	s.out = appendFrameHeader(s.out, 0, frameSettings, flagAck, 0)
	return event{kind: evWritable}, nil
}

// hold counts n bytes more in stream queues.
func (s *session) hold(n int) {
	s.buffered += n
	s.memory.add(n)
}

// returnConnWindow gives the connection window back on receipt, not on consumption: a stalled stream is
// held by its own window, its neighbours go on. When the queues of all streams together hold much, the
// streams' windows shrink for as long as that lasts.
func (s *session) returnConnWindow() {
	if s.recvCredit >= ownConnWindow/4 {
		s.out = appendWindowUpdate(s.out, 0, s.recvCredit)
		s.recvWin += int64(s.recvCredit)
		s.recvCredit = 0
	}
	if w := s.fitting(); w < s.window || w > s.window && len(s.unacked) == 0 && s.now()-s.windowedAt > int64(time.Second) {
		s.announceWindow(w)
	}
}

// fitting is the stream window that suits what is held: by this connection, and by all that share the memory if
// this one has a part in it. Between the levels it stays as it is.
func (s *session) fitting() int64 {
	held := s.memory.Held()
	limit := s.memory.limit
	switch {
	case held > limit/2 && s.buffered > 0:
		return leastStreamWindow
	case s.buffered > pressureHigh || held > limit/8 && s.buffered > pressureLow/4:
		return min(s.window, tightStreamWindow)
	case s.buffered < pressureLow && held < limit/16 || s.buffered == 0:
		return ownStreamWindow
	}
	return s.window
}

const (
	pressureHigh      = 16 << 20
	pressureLow       = 4 << 20
	tightStreamWindow = 256 << 10
	leastStreamWindow = 64 << 10
)

func (s *session) announceWindow(w int64) {
	delta := w - s.window
	s.window, s.windowedAt = w, s.now()
	s.out = appendFrameHeader(s.out, 6, frameSettings, 0, 0)
	s.out = appendSetting(s.out, settingInitialWindowSize, uint32(w))
	if delta > 0 {
		s.lowerWindows(-delta)
		delta = 0
	}
	s.unacked = append(s.unacked, -delta)
}

func (s *session) lowerWindows(by int64) {
	if by == 0 {
		return
	}
	s.granted -= by
	for _, st := range s.streams {
		st.recvWin -= by
	}
}

// returnWindow gives st's window back once a quarter of it was consumed.
func (s *session) returnWindow(st *Stream, n int) {
	st.recvCredit += n
	if int64(st.recvCredit) >= s.window/4 && !st.remoteEnd && !st.gone {
		s.out = appendWindowUpdate(s.out, st.id, st.recvCredit)
		st.recvWin += int64(st.recvCredit)
		st.recvCredit = 0
	}
}

// room is how many bytes of n st may send now by flow control.
func (s *session) room(st *Stream, n int) int {
	return max(0, int(min(int64(n), st.sendWin, s.sendWin)))
}

// appendData queues p, which room allowed, as DATA frames.
func (s *session) appendData(st *Stream, p []byte, end bool) {
	st.sendWin -= int64(len(p))
	s.sendWin -= int64(len(p))
	for {
		n := min(len(p), s.peerMaxFrame)
		var flags byte
		if end && n == len(p) {
			flags = flagEndStream
		}
		s.out = appendFrameHeader(s.out, n, frameData, flags, st.id)
		s.out = append(s.out, p[:n]...)
		s.dataSent(n, min(st.sendWin, s.sendWin))
		if p = p[n:]; len(p) == 0 {
			return
		}
	}
}

func (s *session) appendRequest(id uint32, r *Request) {
	e := s.enc
	if r.Method == "" {
		e.put(":method", "CONNECT")
	} else {
		e.put(":method", r.Method)
	}
	e.put(":authority", r.Authority)
	if r.Scheme != "" {
		e.put(":scheme", r.Scheme)
	}
	if r.Path != "" {
		e.put(":path", r.Path)
	}
	for _, f := range r.Header {
		e.put(f.Name, f.Value)
	}
	s.out = appendHeaders(s.out, id, e.take(), false, s.peerMaxFrame)
}

func (s *session) appendResponse(id uint32, status int, h []Field, end bool) {
	s.enc.put(":status", strconv.Itoa(status))
	for _, f := range h {
		s.enc.put(f.Name, f.Value)
	}
	s.out = appendHeaders(s.out, id, s.enc.take(), end, s.peerMaxFrame)
}
