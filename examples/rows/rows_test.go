package rows_test

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/exto/secrets-broker/examples/rows"
	"github.com/exto/secrets-broker/secret"
)

// What was begun with one row does nothing to another one of the same id.
func TestAnotherRowOfTheID(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	table, err := rows.Open("sqlite:" + filepath.Join(t.TempDir(), "console.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = table.Close() })
	if err := table.Prepare(ctx); err != nil {
		t.Fatal(err)
	}
	id, err := secret.ParseInstanceID("demo")
	if err != nil {
		t.Fatal(err)
	}
	insert := func() rows.Row {
		t.Helper()
		row, err := table.Insert(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		return row
	}
	mark := func(want rows.Row) {
		t.Helper()
		want.State = rows.Deleting
		if got, err := table.MarkDeleting(ctx, id); err != nil || got != want {
			t.Fatalf("marking: got %v, %v, want %v", got, err, want)
		}
	}
	activate := func(row rows.Row, want bool) {
		t.Helper()
		if got, err := table.Activate(ctx, row); err != nil || got != want {
			t.Errorf("activating: got %v, %v, want %v", got, err, want)
		}
	}
	remove := func(row rows.Row) {
		t.Helper()
		if err := table.Delete(ctx, row); err != nil {
			t.Fatal(err)
		}
	}

	if _, err := table.MarkDeleting(ctx, id); !errors.Is(err, rows.ErrNotFound) {
		t.Errorf("marking no row: got %v, want ErrNotFound", err)
	}
	first := insert()
	if _, err := table.Insert(ctx, id); !errors.Is(err, rows.ErrExists) {
		t.Errorf("a second row: got %v, want ErrExists", err)
	}
	mark(first)
	activate(first, false)
	remove(first)
	second := insert()
	activate(first, false)
	activate(second, true)
	activate(second, false)
	remove(second) // it is not marked
	mark(second)
	remove(first)
	if row, err := table.Get(ctx, id); err != nil || row.Creation != second.Creation {
		t.Errorf("got row %v, %v, want the second", row, err)
	}
	remove(second)
	if row, err := table.Get(ctx, id); !errors.Is(err, rows.ErrNotFound) {
		t.Errorf("got row %v, %v, want none", row, err)
	}
}
