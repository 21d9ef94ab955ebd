//go:build !unrecorded

package audit

// Recording is so but in the build with the tag unrecorded, which writes no line of
// calls that change nothing. That one is for "make bench" alone, which tells by it what
// the lines cost, and it warns when it starts.
const Recording = true
