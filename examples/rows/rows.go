// Package rows is the Console's table of instances, in PostgreSQL or, where there
// is none, in SQLite. It stores the names of secrets and never a secret.
package rows

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"strings"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver pgx
	_ "modernc.org/sqlite"             // the driver sqlite

	"github.com/exto/secrets-broker/secret"
)

// State says how far an instance has come.
type State string

// The states. A row without all three secrets is Creating or Deleting.
const (
	Creating State = "creating"
	Active   State = "active"
	Deleting State = "deleting"
)

// Row is an instance. The references are names of secrets, for client.ParseKey.
type Row struct {
	ID    string
	State State
	// Creation tells this row from another one of the same id, before or after it.
	Creation             string
	RegistrationTokenRef string
	DBURIRef             string
	OIDCClientSecretRef  string
}

// Errors that errors.Is finds.
var (
	ErrExists   = errors.New("there is an instance of this id")
	ErrNotFound = errors.New("there is no instance of this id")
)

// Table is the table of instances. Safe for concurrent use.
type Table struct{ db *sql.DB }

// Open opens the table at url: postgres://… or sqlite:FILE. The password for
// PostgreSQL belongs into a file, and not into the url:
// postgres://console@db-1/console?passfile=/etc/console/pgpass.
func Open(url string) (*Table, error) {
	driver, source := "pgx", url
	if file, ok := strings.CutPrefix(url, "sqlite:"); ok {
		driver, source = "sqlite", "file:"+file+"?_pragma=busy_timeout(10000)&_pragma=journal_mode(wal)"
	} else if !strings.HasPrefix(url, "postgres://") && !strings.HasPrefix(url, "postgresql://") {
		return nil, errors.New("the database must be postgres://… or sqlite:FILE") // without the url: nobody knows what is in it
	}
	db, err := sql.Open(driver, source)
	if err != nil {
		return nil, fmt.Errorf("opening the database with %s: %w", driver, err)
	}
	return &Table{db}, nil
}

// Close ends the connections.
func (t *Table) Close() error { return t.db.Close() }

// Prepare makes the table if there is none. One program does.
func (t *Table) Prepare(ctx context.Context) error {
	_, err := t.db.ExecContext(ctx, `create table if not exists instances (
		id text primary key,
		state text not null,
		creation text not null,
		registration_token_ref text not null,
		db_uri_ref text not null,
		oidc_client_secret_ref text not null
	)`)
	return err
}

// Insert makes the row of an instance, in state Creating, with the names of its
// secrets. One insert of an id succeeds, and all others get ErrExists.
func (t *Table) Insert(ctx context.Context, id secret.InstanceID) (Row, error) {
	row := Row{ID: id.String(), State: Creating, Creation: rand.Text()}
	for kind, ref := range map[secret.Kind]*string{
		secret.RegistrationToken: &row.RegistrationTokenRef,
		secret.DatabaseURI:       &row.DBURIRef,
		secret.OIDCClientSecret:  &row.OIDCClientSecretRef,
	} {
		key, err := secret.NewKey(id, kind)
		if err != nil {
			return Row{}, err
		}
		*ref = key.String()
	}
	done, err := t.change(ctx, `insert into instances (`+columns+`)
		values ($1, $2, $3, $4, $5, $6) on conflict (id) do nothing`,
		row.ID, string(row.State), row.Creation, row.RegistrationTokenRef, row.DBURIRef, row.OIDCClientSecretRef)
	if err == nil && !done {
		err = ErrExists
	}
	return row, err
}

// Activate ends Creating. It reports false when the row is not in that state any
// longer, or is not there: another row of the same id is not touched.
func (t *Table) Activate(ctx context.Context, row Row) (bool, error) {
	return t.change(ctx, `update instances set state = $1 where id = $2 and creation = $3 and state = $4`,
		string(Active), row.ID, row.Creation, string(Creating))
}

// MarkDeleting begins the end of an instance, in whatever state, and returns its
// row, or ErrNotFound.
func (t *Table) MarkDeleting(ctx context.Context, id secret.InstanceID) (Row, error) {
	return t.one(ctx, `update instances set state = $1 where id = $2 returning `+columns, string(Deleting), id.String())
}

// Delete takes away a row that is marked; no row is as good, and another row of the
// same id is not touched.
func (t *Table) Delete(ctx context.Context, row Row) error {
	_, err := t.change(ctx, `delete from instances where id = $1 and creation = $2 and state = $3`, row.ID, row.Creation, string(Deleting))
	return err
}

// Get is the row of an instance, or ErrNotFound.
func (t *Table) Get(ctx context.Context, id secret.InstanceID) (Row, error) {
	return t.one(ctx, `select `+columns+` from instances where id = $1`, id.String())
}

// Active are the rows of the instances that run.
func (t *Table) Active(ctx context.Context) ([]Row, error) {
	return t.query(ctx, `select `+columns+` from instances where state = $1 order by id`, string(Active))
}

func (t *Table) one(ctx context.Context, statement string, args ...any) (Row, error) {
	found, err := t.query(ctx, statement, args...)
	if err == nil && len(found) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return Row{}, err
	}
	return found[0], nil
}

// columns are in the order of Row.
const columns = `id, state, creation, registration_token_ref, db_uri_ref, oidc_client_secret_ref`

// query is of a statement that yields columns.
func (t *Table) query(ctx context.Context, statement string, args ...any) (found []Row, err error) {
	rows, err := t.db.QueryContext(ctx, statement, args...)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var r Row
		if err := rows.Scan(&r.ID, &r.State, &r.Creation, &r.RegistrationTokenRef, &r.DBURIRef, &r.OIDCClientSecretRef); err != nil {
			return nil, err
		}
		found = append(found, r)
	}
	return found, rows.Err()
}

// change reports whether a statement changed a row.
func (t *Table) change(ctx context.Context, statement string, args ...any) (bool, error) {
	result, err := t.db.ExecContext(ctx, statement, args...)
	if err != nil {
		return false, err
	}
	n, err := result.RowsAffected()
	return n > 0, err
}
