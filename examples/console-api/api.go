package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/exto/secrets-broker/client"
	"github.com/exto/secrets-broker/examples/rows"
	"github.com/exto/secrets-broker/secret"
)

// creationTimeout bounds a create. On Key Vault, a Put of a secret that was just
// deleted can take over a minute.
const creationTimeout = 5 * time.Minute

// api answers the operator, and the instances.
type api struct {
	broker   *client.Client
	verifier *client.Verifier
	table    *rows.Table
	operator secret.Value
	locks    sync.Map // secret.InstanceID to a chan struct{}, full while locked; one stays for each id
}

func (a *api) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /instances", a.operated(a.create))
	mux.HandleFunc("POST /instances/{id}/rotate", a.operated(a.rotate))
	mux.HandleFunc("PUT /instances/{id}/connection", a.operated(a.connect))
	mux.HandleFunc("DELETE /instances/{id}", a.operated(a.decommission))
	mux.HandleFunc("GET /v1/instances/{id}/hello", answered(a.hello))
	return mux
}

// lock waits until nothing else changes this instance, and keeps it so until unlock.
// Without it a create that is still under way could write a secret after a DELETE
// has taken away the row. It is in memory, so this must be the only Console API on
// its table.
func (a *api) lock(ctx context.Context, id secret.InstanceID) (unlock func(), err error) {
	held, _ := a.locks.LoadOrStore(id, make(chan struct{}, 1))
	lock := held.(chan struct{})
	select {
	case lock <- struct{}{}:
		return func() { <-lock }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// create makes an instance. The row is written first, in state creating, and made
// active last. A DELETE meanwhile waits. So an error or a crash anywhere leaves no
// secret of which no row tells: the row is still creating, a further POST is
// refused, and DELETE takes away what there is. What the broker had begun when the
// Console API died, DELETE waits for there: the broker makes the writes of a secret
// one after the other.
//
// It goes on when its caller leaves. The broker makes the token. If the answer is
// lost after that, rotate makes another one.
func (a *api) create(r *http.Request) (*answer, error) {
	var in struct {
		ID               string `json:"id"`
		DatabaseURI      string `json:"database_uri"`
		OIDCClientSecret string `json:"oidc_client_secret"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	id, err := secret.ParseInstanceID(in.ID)
	if err != nil {
		return nil, problem{http.StatusBadRequest, err.Error()}
	}
	uri, oidc := secret.NewValue(in.DatabaseURI), secret.NewValue(in.OIDCClientSecret)
	// The broker checks values too; here nothing has to be undone yet.
	if err := errors.Join(secret.CheckValue(secret.DatabaseURI, uri), secret.CheckValue(secret.OIDCClientSecret, oidc)); err != nil {
		return nil, problem{http.StatusBadRequest, err.Error()}
	}
	unlock, err := a.lock(r.Context(), id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), creationTimeout)
	defer cancel()
	row, err := a.table.Insert(ctx, id)
	if errors.Is(err, rows.ErrExists) {
		return nil, problem{http.StatusConflict, "there is an instance of this id, or a part of one: DELETE it first"}
	}
	if err != nil {
		return nil, err
	}
	// Put recovers and overwrites what an earlier instance of this id left deleted.
	if err := a.put(ctx, row.DBURIRef, uri, client.PutOptions{}); err != nil {
		return nil, err
	}
	if err := a.put(ctx, row.OIDCClientSecretRef, oidc, client.PutOptions{}); err != nil {
		return nil, err
	}
	token, err := a.rotateToken(ctx, row, client.RotateOptions{AllowMissing: true})
	if err != nil {
		return nil, err
	}
	active, err := a.table.Activate(ctx, row)
	if err == nil && !active {
		err = errors.New("instance " + row.ID + ": its row is gone or another's: something else than this Console API works on the table, and there may be secrets without a row")
	}
	if err != nil {
		return nil, err
	}
	return handOut(row, token), nil
}

// rotate makes another token. The old one is good for the grace period. Without
// AllowMissing: the token of an instance that is being deleted stays deleted.
func (a *api) rotate(r *http.Request) (*answer, error) {
	var in struct {
		Grace string `json:"grace"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	grace, err := time.ParseDuration(in.Grace)
	if err != nil || grace < 0 {
		return nil, problem{http.StatusBadRequest, `grace must be a duration such as "10m", or "0s"`}
	}
	row, unlock, err := a.active(r)
	if err != nil {
		return nil, err
	}
	defer unlock()
	token, err := a.rotateToken(r.Context(), row, client.RotateOptions{GracePeriod: grace})
	if err != nil {
		return nil, err
	}
	return handOut(row, token), nil
}

// connect gives an instance another database. It overwrites the version that it
// saw and no other: a URI that somebody else wrote or deleted meanwhile stays so.
func (a *api) connect(r *http.Request) (*answer, error) {
	var in struct {
		DatabaseURI string `json:"database_uri"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	row, unlock, err := a.active(r)
	if err != nil {
		return nil, err
	}
	defer unlock()
	key, err := client.ParseKey(row.DBURIRef)
	if err != nil {
		return nil, err
	}
	seen, err := a.broker.Describe(r.Context(), key)
	options := client.PutOptions{MustMatchVersion: seen.Version}
	if errors.Is(err, client.ErrNotFound) {
		options, err = client.PutOptions{MustNotExist: true}, nil
	}
	if err != nil {
		return nil, err
	}
	return nil, a.put(r.Context(), row.DBURIRef, secret.NewValue(in.DatabaseURI), options)
}

// decommission ends an instance: the secrets first, and the row only when they are
// gone, so that after a crash in between the row still says what is to be done.
// It may be run again at any time, without a row too.
func (a *api) decommission(r *http.Request) (*answer, error) {
	id, err := parseID(r)
	if err != nil {
		return nil, err
	}
	ctx := r.Context()
	unlock, err := a.lock(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	row, err := a.table.MarkDeleting(ctx, id)
	if err != nil && !errors.Is(err, rows.ErrNotFound) {
		return nil, err
	}
	if err := a.broker.DeleteInstance(ctx, id); err != nil {
		return nil, err
	}
	return nil, a.table.Delete(ctx, row)
}

// hello stands for what instances call. Whether a token is good the broker knows,
// and the Verifier remembers for as long as nothing changes.
func (a *api) hello(r *http.Request) (*answer, error) {
	id, err := parseID(r)
	if err != nil {
		return nil, err
	}
	token, ok := bearer(r)
	if !ok {
		return nil, problem{http.StatusUnauthorized, "a bearer token is required"}
	}
	result, err := a.verifier.VerifyToken(r.Context(), id, token)
	if err != nil {
		return nil, err // 503 and not 401: nobody knows whether it is good
	}
	if !result.OK() {
		return nil, problem{http.StatusUnauthorized, "not a token of this instance"}
	}
	return &answer{ID: id.String()}, nil
}

func (a *api) put(ctx context.Context, ref string, value secret.Value, o client.PutOptions) error {
	key, err := client.ParseKey(ref)
	if err == nil {
		_, err = a.broker.Put(ctx, key, value, o)
	}
	return err
}

func (a *api) rotateToken(ctx context.Context, row rows.Row, o client.RotateOptions) (secret.Value, error) {
	key, err := client.ParseKey(row.RegistrationTokenRef)
	if err != nil {
		return secret.Value{}, err
	}
	rotated, err := a.broker.Rotate(ctx, key, o)
	return rotated.Value, err
}

// handOut gives the token to whoever sets the instance up. It is not kept.
func handOut(row rows.Row, token secret.Value) *answer {
	return &answer{ID: row.ID, RegistrationToken: token.Reveal()}
}

// active is the row that a request is about, locked.
func (a *api) active(r *http.Request) (row rows.Row, unlock func(), err error) {
	id, err := parseID(r)
	if err != nil {
		return rows.Row{}, nil, err
	}
	unlock, err = a.lock(r.Context(), id)
	if err != nil {
		return rows.Row{}, nil, err
	}
	row, err = a.table.Get(r.Context(), id)
	switch {
	case errors.Is(err, rows.ErrNotFound):
		err = problem{http.StatusNotFound, "there is no instance of this id"}
	case err == nil && row.State != rows.Active:
		err = problem{http.StatusConflict, "the instance is " + string(row.State)}
	}
	if err != nil {
		unlock()
		return rows.Row{}, nil, err
	}
	return row, unlock, nil
}

// operated lets the operator in and nobody else.
func (a *api) operated(h handler) http.HandlerFunc {
	return answered(func(r *http.Request) (*answer, error) {
		if token, ok := bearer(r); !ok || !token.Equal(a.operator) {
			return nil, problem{http.StatusUnauthorized, "only for the operator"}
		}
		return h(r)
	})
}

// answer is the body of an answer; nil: there is none.
type answer struct {
	ID                string `json:"id"`
	RegistrationToken string `json:"registration_token,omitempty"`
}

type handler func(*http.Request) (*answer, error)

func answered(h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := h(r)
		if err != nil {
			status, text := judge(err)
			if status >= http.StatusInternalServerError && r.Context().Err() == nil { // else nobody waits for it
				slog.Error("a request failed", "method", r.Method, "route", r.Pattern, "error", err)
			}
			http.Error(w, text, status)
			return
		}
		w.Header().Set("Cache-Control", "no-store")
		if body == nil {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(body); err != nil {
			slog.Warn("an answer was not sent", "route", r.Pattern, "error", err)
		}
	}
}

// problem is an error with an answer of its own.
type problem struct {
	status int
	text   string
}

func (p problem) Error() string { return p.text }

// judge makes an answer of an error. Those of the broker hold no value, and tell
// what to do.
func judge(err error) (status int, text string) {
	if p, ok := errors.AsType[problem](err); ok {
		return p.status, p.text
	}
	for status, errs := range map[int][]error{
		http.StatusBadRequest:         {client.ErrInvalid},
		http.StatusConflict:           {client.ErrNotFound, client.ErrDeleted, client.ErrDisabled, client.ErrExists, client.ErrVersionMismatch},
		http.StatusServiceUnavailable: {client.ErrUnavailable, client.ErrQuotaExceeded, context.DeadlineExceeded},
	} {
		for _, known := range errs {
			if errors.Is(err, known) {
				return status, err.Error()
			}
		}
	}
	return http.StatusInternalServerError, "internal error: the log tells more"
}

func parseID(r *http.Request) (secret.InstanceID, error) {
	id, err := secret.ParseInstanceID(r.PathValue("id"))
	if err != nil {
		return secret.InstanceID{}, problem{http.StatusNotFound, "there is no instance of this id"}
	}
	return id, nil
}

func bearer(r *http.Request) (secret.Value, bool) {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return secret.NewValue(token), ok && token != ""
}

// read decodes a body. What is wrong with it is not repeated: it holds secrets.
func read(r *http.Request, into any) error {
	decoder := json.NewDecoder(http.MaxBytesReader(nil, r.Body, 64<<10))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil || decoder.More() {
		return problem{http.StatusBadRequest, "the body is not the JSON that this request takes"}
	}
	return nil
}
