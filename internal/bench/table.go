package main

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// table is shown as text and in a page alike. The first column is to the left, the
// others to the right.
type table struct {
	title  string
	header []string
	rows   [][]string
}

func (t *table) add(row ...string) { t.rows = append(t.rows, row) }

// text is the table for a terminal.
func (t *table) text() string {
	widths := make([]int, len(t.header))
	lines := append([][]string{t.header}, t.rows...)
	for _, line := range lines {
		for i, cell := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(plain(cell)))
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s\n\n", t.title)
	for _, line := range lines {
		for i, cell := range line {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(plain(cell)))
			if i == 0 {
				b.WriteString(plain(cell) + pad)
			} else {
				b.WriteString("  " + pad + plain(cell))
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

// plain is a cell without the marks of Markdown.
func plain(cell string) string { return strings.ReplaceAll(cell, "**", "") }

// Markdown is the table for a page.
func (t *table) Markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "| %s |\n| ---%s |\n", strings.Join(t.header, " | "), strings.Repeat(" | ---:", len(t.header)-1))
	for _, row := range t.rows {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
	}
	return b.String()
}

// String is a ratio with what the rounds gave.
func (s spread) String() string { return fmt.Sprintf("%.2f (%.2f–%.2f)", s.Median, s.Min, s.Max) }

// count is a number with commas.
func count(n int) string {
	digits := strconv.Itoa(n)
	for at := len(digits) - 3; at > 0; at -= 3 {
		digits = digits[:at] + "," + digits[at:]
	}
	return digits
}

// seconds is a time with three digits or so.
func seconds(s float64) string {
	switch {
	case s < 1e-3:
		return fmt.Sprintf("%.0f µs", s*1e6)
	case s < 10e-3:
		return fmt.Sprintf("%.2f ms", s*1e3)
	case s < 1:
		return fmt.Sprintf("%.0f ms", s*1e3)
	}
	return fmt.Sprintf("%.2f s", s)
}

func kilobytes(bytes float64) string { return fmt.Sprintf("%.1f KiB", bytes/(1<<10)) }

func megabytes(bytes int64) string { return fmt.Sprintf("%.0f MiB", float64(bytes)/(1<<20)) }
