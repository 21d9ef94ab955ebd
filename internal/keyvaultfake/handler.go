package keyvaultfake

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/google/uuid"
)

// maxBody is far above what any request of a client may hold.
const maxBody = 1 << 20

// exchange is a request on its way through a face.
type exchange struct {
	Request
	http  *http.Request
	body  []byte
	given string // the name as it was given: a new secret keeps it
}

// answer to a request. Its body is sent as JSON; nil is none.
type answer struct {
	status int
	inner  string
	header http.Header
	body   any
}

// face is one of the services that the fake shows over HTTP.
type face interface {
	// read tells from the request what it asks for.
	read(x *exchange)
	// handle does what is asked and fills Principal.
	handle(x *exchange, stale bool) answer
	// later does so in the vault at that time, for a client that is not there any more.
	later(x *exchange, due time.Time)
	// refuse words an injected error.
	refuse(x *exchange, fault Fault) answer
}

// handler takes every request of a face through the journal, the hook and its fault.
func (f *Fake) handler(s *server, in face) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.running.Add(1)
		defer f.running.Done()
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil || s.gate.isShut() {
			cut(w)
			return
		}
		x := &exchange{http: r, body: body, Request: Request{
			At: f.Now(), Method: r.Method, Path: r.URL.Path, Query: r.URL.Query(),
			ClientRequestID: r.Header.Get("x-ms-client-request-id"), RequestID: uuid.NewString(),
		}}
		in.read(x)
		entry := f.journal.begin(x.Request)
		x.Seq = entry.Seq
		fault := f.fault(x.Request)
		f.journal.update(func() { entry.Fault = fault != Fault{} })

		if !f.before(r.Context(), fault) || fault.Cut {
			cut(w)
			return
		}
		if fault.LateCommit > 0 {
			in.later(x, f.Now().Add(fault.LateCommit))
			f.journal.update(func() { entry.Principal = x.Principal })
			cut(w)
			return
		}
		var a answer
		if fault.Status != 0 {
			a = in.refuse(x, fault)
		} else {
			a = in.handle(x, fault.Stale)
		}
		f.journal.update(func() { entry.Principal = x.Principal })
		f.after(r.Context(), fault)
		if fault.CutAfter {
			cut(w)
			return
		}
		f.journal.update(func() { entry.Status, entry.Inner = a.status, a.inner })
		a.send(w, x.RequestID)
	})
}

func (a answer) send(w http.ResponseWriter, requestID string) {
	header := w.Header()
	for name, values := range a.header {
		header[name] = values
	}
	header.Set("x-ms-request-id", requestID)
	header.Set("Cache-Control", "no-store")
	if a.body == nil {
		w.WriteHeader(a.status)
		return
	}
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false) // a value that leaks should be found as it is
	if err := encoder.Encode(a.body); err != nil {
		panic(err) // what is encoded are types of this package
	}
	header.Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(a.status)
	_, _ = w.Write(body.Bytes()) // a client that went away is its own affair
}

// retryAfter is the header, if there is to be one, in whole seconds rounded up.
func retryAfter(d time.Duration) http.Header {
	header := http.Header{}
	if d > 0 {
		header.Set("Retry-After", strconv.Itoa(int((d+time.Second-1)/time.Second)))
	}
	return header
}
