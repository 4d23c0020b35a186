package main

import (
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"
)

// A pod that cleaned its node waits, without being configured, until it is told to end.
func TestIdle(t *testing.T) {
	guard := make(chan os.Signal, 1) // before run listens, the signal would end the test
	signal.Notify(guard, syscall.SIGTERM)
	defer signal.Stop(guard)
	ended := make(chan error, 1)
	go func() { ended <- run([]string{"idle"}) }()
	select {
	case err := <-ended:
		t.Fatalf("it does not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	for give := time.After(10 * time.Second); ; {
		if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
			return
		case <-give:
			t.Fatal("it does not end")
		case <-time.After(10 * time.Millisecond):
		}
	}
}
