package hbone

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
	"crypto/hkdf"
	_ "crypto/sha256" // for suites
	_ "crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
)

// The TLS 1.3 record layer (RFC 8446, sections 4.6, 5 and 6) of a connection whose handshake crypto/tls has made.
// It does no I/O. The handshake, the certificates and the primitives stay the standard library's; what is here
// saves the copies of payload that crypto/tls makes, and lets many records share one system call.

const (
	recordHeaderLen = 5
	maxPlaintext    = 16 << 10
	maxCiphertext   = maxPlaintext + 256
	recordOverhead  = 1 + 16 // content type, tag
	maxUseless      = 16     // messages in a row that are no data, as crypto/tls has it
	maxHandshakeMsg = 64 << 10

	// keyLimit is after how many records a key is replaced. AES-GCM allows 2^24.5 (section 5.5).
	keyLimit = 1 << 24
)

// Content types and handshake messages that occur after a handshake.
const (
	typeAlert       = 21
	typeHandshake   = 22
	typeApplication = 23

	messageNewSessionTicket = 4
	messageKeyUpdate        = 24
)

// Alerts.
const (
	alertCloseNotify       tls.AlertError = 0
	alertUnexpectedMessage tls.AlertError = 10
	alertBadRecordMAC      tls.AlertError = 20
	alertRecordOverflow    tls.AlertError = 22
	alertIllegalParameter  tls.AlertError = 47
	alertDecodeError       tls.AlertError = 50
	alertInternal          tls.AlertError = 80
	alertUserCanceled      tls.AlertError = 90
)

type suite struct {
	key  int
	hash crypto.Hash
}

var suites = map[uint16]suite{
	tls.TLS_AES_128_GCM_SHA256: {16, crypto.SHA256},
	tls.TLS_AES_256_GCM_SHA384: {32, crypto.SHA384},
}

// half is one direction: a traffic secret, the key made of it and how often that was used. It is all that
// another process needs to go on with the direction.
type half struct {
	suite  suite
	secret []byte
	aead   cipher.AEAD
	iv     [12]byte
	seq    uint64
	nonce  [12]byte
}

// newHalf fails for suites that are not supported and where nonces may not be chosen here (FIPS 140).
func newHalf(id uint16, secret []byte) (*half, error) {
	s, ok := suites[id]
	if !ok {
		return nil, fmt.Errorf("no record layer for %s", tls.CipherSuiteName(id))
	}
	if fips140.Enabled() {
		return nil, errors.New("no record layer under FIPS 140 but that of crypto/tls")
	}
	if len(secret) != s.hash.Size() {
		return nil, fmt.Errorf("traffic secret of %d bytes", len(secret))
	}
	h := &half{suite: s}
	return h, h.use(secret)
}

// use begins with a new secret.
func (h *half) use(secret []byte) error {
	key, err := h.expand(secret, "key", h.suite.key)
	if err != nil {
		return err
	}
	iv, err := h.expand(secret, "iv", len(h.iv))
	if err != nil {
		return err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	h.aead, err = cipher.NewGCM(block)
	h.secret, h.seq = secret, 0
	copy(h.iv[:], iv)
	return err
}

// update moves to the next secret (section 7.2).
func (h *half) update() error {
	next, err := h.expand(h.secret, "traffic upd", len(h.secret))
	if err != nil {
		return err
	}
	return h.use(next)
}

// expand is HKDF-Expand-Label without context.
func (h *half) expand(secret []byte, label string, n int) ([]byte, error) {
	info := make([]byte, 0, 32)
	info = binary.BigEndian.AppendUint16(info, uint16(n))
	info = append(info, byte(len("tls13 ")+len(label)))
	info = append(info, "tls13 "...)
	info = append(info, label...)
	info = append(info, 0)
	return hkdf.Expand(func() hash.Hash { return h.suite.hash.New() }, secret, string(info), n)
}

// next returns the nonce of the record that follows.
func (h *half) next() []byte {
	h.nonce = h.iv
	n := binary.BigEndian.Uint64(h.nonce[4:]) ^ h.seq
	binary.BigEndian.PutUint64(h.nonce[4:], n)
	h.seq++
	return h.nonce[:]
}

// seal appends a record of p. The byte behind p, where p's array has one, is used meanwhile: p's owner must not
// let anybody else see it.
func (h *half) seal(out, p []byte, typ byte) []byte {
	n := len(p) + recordOverhead
	out = append(out, typeApplication, 3, 3, byte(n>>8), byte(n))
	header := out[len(out)-recordHeaderLen:]
	if cap(p) > len(p) {
		p = p[:len(p)+1]
		last := &p[len(p)-1]
		kept := *last
		*last = typ
		out = h.aead.Seal(out, h.next(), p, header)
		*last = kept
		return out
	}
	at := len(out)
	out = append(append(out, p...), typ)
	return h.aead.Seal(out[:at], h.next(), out[at:], header)
}

// open decrypts the record in rec, header included, behind out, which has room for it. The content is what was
// added to out.
func (h *half) open(out, rec []byte) ([]byte, byte, error) {
	at, before := len(out), out
	out, err := h.aead.Open(out, h.next(), rec[recordHeaderLen:], rec[:recordHeaderLen])
	if err != nil {
		return before, 0, alertBadRecordMAC
	}
	if len(out)-at > maxPlaintext+1 {
		return out[:at], 0, alertRecordOverflow
	}
	for i := len(out) - 1; i >= at; i-- { // zeros are padding
		if out[i] != 0 {
			return out[:i], out[i], nil
		}
	}
	return out[:at], 0, alertUnexpectedMessage
}

// opener is the receiving side: a half, and what remains of handshake messages.
type opener struct {
	*half
	client  bool // receives what servers send
	hand    []byte
	useless int
	owed    bool // the peer asked for new keys of this side
}

// recordLen is how long the record is that p begins with, header included; 0 while that is not known.
func recordLen(p []byte) (int, error) {
	if len(p) < recordHeaderLen {
		return 0, nil
	}
	n := int(p[3])<<8 | int(p[4])
	switch {
	case p[0] != typeApplication: // also a change_cipher_spec, which nobody sends after his Finished
		return 0, alertUnexpectedMessage
	case n > maxCiphertext:
		return 0, alertRecordOverflow
	case n < recordOverhead:
		return 0, alertBadRecordMAC
	}
	return recordHeaderLen + n, nil
}

// take decrypts one complete record. Application data is added to out. The error is the alert that answers what
// the peer did, io.EOF after its close_notify, or a *net.OpError with the alert that the peer sent.
func (o *opener) take(out, rec []byte) ([]byte, error) {
	at := len(out)
	out, typ, err := o.open(out, rec)
	if err != nil {
		return out, err
	}
	content := out[at:]
	if len(o.hand) > 0 && typ != typeHandshake {
		return out[:at], alertUnexpectedMessage
	}
	if typ == typeApplication && len(content) > 0 {
		o.useless = 0
		return out, nil
	}
	out = out[:at]
	switch typ {
	case typeApplication:
		return out, o.noData()
	case typeAlert:
		return out, o.alert(content)
	case typeHandshake:
		return out, o.handshake(content)
	default:
		return out, alertUnexpectedMessage
	}
}

// noData counts what is no data: a peer may not keep this side busy with it.
func (o *opener) noData() error {
	if o.useless++; o.useless > maxUseless {
		return alertUnexpectedMessage
	}
	return nil
}

func (o *opener) alert(p []byte) error {
	if len(p) != 2 {
		return alertUnexpectedMessage
	}
	switch a := tls.AlertError(p[1]); a {
	case alertCloseNotify:
		return io.EOF
	case alertUserCanceled:
		return o.noData()
	default:
		return &net.OpError{Op: "remote error", Err: a}
	}
}

// handshake handles the messages that may come after the handshake.
func (o *opener) handshake(p []byte) error {
	if len(p) == 0 {
		return alertUnexpectedMessage
	}
	o.hand = append(o.hand, p...)
	for len(o.hand) >= 4 {
		typ, n := o.hand[0], int(o.hand[1])<<16|int(o.hand[2])<<8|int(o.hand[3])
		switch {
		case typ == messageNewSessionTicket && o.client:
			if n > maxHandshakeMsg {
				return alertDecodeError
			}
			if len(o.hand) < 4+n {
				return nil
			}
			o.hand = o.hand[4+n:] // nothing is resumed
			if err := o.noData(); err != nil {
				return err
			}
		case typ == messageKeyUpdate:
			if n != 1 {
				return alertDecodeError
			}
			if len(o.hand) < 5 {
				return nil
			}
			request := o.hand[4]
			if request > 1 {
				return alertIllegalParameter
			}
			if len(o.hand) > 5 { // what follows would be under the old key
				return alertUnexpectedMessage
			}
			o.hand = nil
			o.owed = o.owed || request == 1
			if err := o.update(); err != nil {
				return alertInternal
			}
			return o.noData()
		default:
			return alertUnexpectedMessage
		}
	}
	if len(o.hand) == 0 {
		o.hand = nil
	}
	return nil
}

// appendKeyUpdate tells the peer of new keys, and begins to use them.
func (h *half) appendKeyUpdate(out []byte) ([]byte, error) {
	out = h.seal(out, []byte{messageKeyUpdate, 0, 0, 1, 0}, typeHandshake)
	return out, h.update()
}

func (h *half) appendAlert(out []byte, a tls.AlertError) []byte {
	level := byte(2)
	if a == alertCloseNotify {
		level = 1
	}
	return h.seal(out, []byte{level, byte(a)}, typeAlert)
}
