package holder

import (
	"errors"
	"fmt"
	"os"
)

// Version of the protocol. A client of another version is refused: an item that is misread would be an
// open connection to nowhere.
const Version = 1

// DefaultPath is where the holder listens.
const DefaultPath = "/run/warren/holder.sock"

const (
	maxRecord  = 64 << 10 // bytes of JSON in one record
	maxFiles   = 32       // descriptors in one item; the kernel's SCM_MAX_FD is 253
	maxMeta    = 16 << 10
	maxNameLen = 256
	listBytes  = 32 << 10 // metadata in one page of List
)

// Errors that a caller decides on. Every other error of a Client means that the connection is of no use
// any more.
var (
	ErrSuperseded = errors.New("another agent has taken over")
	ErrNotFound   = errors.New("not held")
	ErrFull       = errors.New("the holder is full")
	ErrVersion    = errors.New("protocol versions differ")
	ErrRefused    = errors.New("refused")
	ErrInvalid    = errors.New("invalid request")
	ErrAbsent     = errors.New("the holder does not answer")
)

var codes = map[string]error{
	"superseded": ErrSuperseded,
	"not-found":  ErrNotFound,
	"full":       ErrFull,
	"version":    ErrVersion,
	"refused":    ErrRefused,
	"invalid":    ErrInvalid,
}

func codeOf(err error) string {
	for code, e := range codes {
		if errors.Is(err, e) {
			return code
		}
	}
	return "invalid"
}

// Key names an item. Kind is its owner's choice, such as "pod" or "blob".
type Key struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
}

func (k Key) String() string { return k.Kind + "/" + k.Name }

func (k Key) check() error {
	if k.Kind == "" || k.Name == "" || len(k.Kind) > maxNameLen || len(k.Name) > maxNameLen {
		return fmt.Errorf("%w: key %q", ErrInvalid, k)
	}
	return nil
}

// Item is a set of descriptors under one key. Names says what each of Files is; Meta is its owner's.
type Item struct {
	Key   Key
	Meta  []byte
	Names []string
	Files []*os.File
}

// Close closes the item's files.
func (i *Item) Close() {
	for _, f := range i.Files {
		f.Close()
	}
	i.Files = nil
}

// File returns the file of that name, or nil.
func (i *Item) File(name string) *os.File {
	for n, s := range i.Names {
		if s == name && n < len(i.Files) {
			return i.Files[n]
		}
	}
	return nil
}

func checkItem(k Key, meta []byte, names []string, files int) error {
	switch {
	case len(names) != files:
		return fmt.Errorf("%w: %s has %d names for %d files", ErrInvalid, k, len(names), files)
	case files > maxFiles:
		return fmt.Errorf("%w: %s has %d files, at most %d", ErrInvalid, k, files, maxFiles)
	case len(meta) > maxMeta:
		return fmt.Errorf("%w: %s has %d bytes of metadata, at most %d", ErrInvalid, k, len(meta), maxMeta)
	}
	for _, n := range names {
		if len(n) > maxNameLen {
			return fmt.Errorf("%w: %s has a file name of %d bytes", ErrInvalid, k, len(n))
		}
	}
	return k.check()
}

// operations of a request
const (
	opHello  = "hello"
	opPing   = "ping"
	opPut    = "put"
	opGet    = "get"
	opList   = "list"
	opDelete = "delete"
	opWriter = "writer" // is there one?
)

// request is one record from the agent. The descriptors of a put travel with it.
type request struct {
	Op      string   `json:"op"`
	Version int      `json:"version,omitempty"`
	Writer  bool     `json:"writer,omitempty"`
	Born    int64    `json:"born,omitempty"` // hello: when the agent started, ns since boot
	Key     Key      `json:"key,omitzero"`   // list: the last key of the previous page
	Meta    []byte   `json:"meta,omitempty"`
	Names   []string `json:"names,omitempty"`
	Stamp   string   `json:"stamp,omitempty"`
	Blob    bool     `json:"blob,omitempty"` // put: the only file is a sealed memfd and counts by its size
}

// response answers one request. The descriptors of a get travel with it.
type response struct {
	Code       string `json:"code,omitempty"`
	Error      string `json:"error,omitempty"`
	Generation uint64 `json:"generation,omitempty"`
	Vacant     bool   `json:"vacant,omitempty"` // writer: the one of that generation has closed its connection
	Items      []held `json:"items,omitempty"`
	More       bool   `json:"more,omitempty"`
	Usage      Usage  `json:"usage,omitzero"`
}

// held is an item without its descriptors.
type held struct {
	Key   Key      `json:"key"`
	Meta  []byte   `json:"meta,omitempty"`
	Names []string `json:"names,omitempty"`
	Stamp string   `json:"stamp,omitempty"`
	Blob  bool     `json:"blob,omitempty"`
}

// Usage is what a holder keeps now.
type Usage struct {
	Items     int   `json:"items"`
	Files     int   `json:"files"`
	BlobBytes int64 `json:"blobBytes"`
}

func (r *response) err() error {
	if r.Error == "" {
		return nil
	}
	if e, ok := codes[r.Code]; ok {
		return fmt.Errorf("%w: %s", e, r.Error)
	}
	return errors.New(r.Error)
}
