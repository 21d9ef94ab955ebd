//go:build unrecorded

package audit

// Recording is explained where it is true.
const Recording = false
