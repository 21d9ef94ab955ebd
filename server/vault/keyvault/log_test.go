package keyvault_test

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
)

// heard keeps what is logged, and tells who waits for it.
type heard struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // closed and replaced at each line
}

func newHeard() *heard { return &heard{more: make(chan struct{})} }

func (h *heard) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(h, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (h *heard) Write(line []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.more)
	h.more = make(chan struct{})
	return h.text.Write(line)
}

func (h *heard) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.text.String()
}

// wait blocks until message was logged.
func (h *heard) wait(message string) {
	for {
		h.mu.Lock()
		more, found := h.more, strings.Contains(h.text.String(), `msg="`+message+`"`)
		h.mu.Unlock()
		if found {
			return
		}
		<-more
	}
}
