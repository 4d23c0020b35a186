package holder

import (
	"encoding/json"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzRecords feeds a server the records of one client, each with as many descriptors as a byte says. Whatever
// comes, the server's count of what it holds is right, no descriptor is lost or closed twice, and only a writer
// that has said hello changes anything.
func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"op":"hello","version":1,"writer":true,"born":1}`), []byte(`{"op":"put","key":{"kind":"pod","name":"a"},"names":["x","y"]}`), uint8(2))
	f.Add([]byte(`{"op":"hello","version":1}`), []byte(`{"op":"delete","key":{"kind":"pod","name":"a"}}`), uint8(0))
	f.Add([]byte(`{"op":"hello","version":1,"writer":true}`), []byte(`{"op":"put","key":{"kind":"","name":"a"},"names":["x"],"blob":true}`), uint8(1))
	f.Add([]byte(`{"op":"put"}`), []byte(`{"op":"list","key":{"kind":"pod"}}`), uint8(40))
	f.Add([]byte(`{"op":"hello","version":2}`), []byte(`{"op":"get","key":{"kind":"kept","name":"always"}}`), uint8(1))
	f.Add([]byte(`{`), []byte(`{"op":"ping","born":-1}`), uint8(0))
	f.Fuzz(func(t *testing.T, first, second []byte, files uint8) {
		s := NewServer(ServerConfig{MaxItems: 3, MaxFiles: 8, MaxBlobBytes: 1 << 10})
		open := countFDs(t)
		kept := request{Op: opPut, Key: Key{"kept", "always"}, Names: []string{"a"}}
		if err := s.put(kept, nullFDs(t, 1)); err != nil {
			t.Fatal(err)
		}
		var generation uint64
		greeted := false
		for _, record := range [][]byte{first, second, second} {
			var req request
			if json.Unmarshal(record, &req) != nil {
				continue
			}
			in := nullFDs(t, int(files%40))
			before, resp, out, err := s.Usage(), response{}, fdset(nil), error(nil)
			switch {
			case req.Op == opHello:
				generation, err = s.hello(req)
				greeted = err == nil
			case !greeted:
				err = ErrInvalid
			default:
				resp, out, err = s.handle(req, generation, &in)
			}
			in.close()
			out.close()
			if after := s.Usage(); after != before && (generation == 0 || err != nil) {
				t.Errorf("%s: %+v becomes %+v, writer %v, %v", record, before, after, generation != 0, err)
			}
			if err != nil && !errors.Is(resp.err(), nil) {
				t.Errorf("an error and an answer: %v, %+v", err, resp)
			}
		}
		n := 0
		for _, it := range s.items {
			n += len(it.fds)
			for _, fd := range it.fds {
				if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
					t.Errorf("a descriptor that is held is closed: %v", err)
				}
			}
		}
		if u := s.Usage(); u.Files != n || u.Items != len(s.items) || u.Items > 3 || u.Files > 8 || u.BlobBytes < 0 {
			t.Errorf("%+v, and there are %d items with %d files", u, len(s.items), n)
		}
		s.closeItems()
		if now := countFDs(t); now != open {
			t.Errorf("%d descriptors before, %d after", open, now)
		}
	})
}

func nullFDs(t *testing.T, n int) (out fdset) {
	for range n {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, fd)
	}
	return out
}

func countFDs(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
