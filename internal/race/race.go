//go:build race

// Package race tells tests whether they run under the race detector, for which those of
// many steps that come one after the other leave out what shows it nothing.
package race

// Enabled reports whether this is a build with the race detector.
const Enabled = true
