package main

import (
	"testing"

	"golang.org/x/tools/go/analysis/analysistest"
)

// The lines of testdata say what is reported about them, and that nothing else is.

func TestNeverFormat(t *testing.T) {
	analysistest.Run(t, analysistest.TestData(), neverFormat, module+"gen/exto/secrets/v1", module+"server")
}

func TestNoWeak(t *testing.T) {
	analysistest.Run(t, analysistest.TestData(), noWeak, module+"weak")
}
