#!/usr/bin/env bash
# Runs every fuzz target for the given time, one after the other: the fuzzer
# takes one target at a time and all processors.
set -euo pipefail
cd "$(dirname "$0")/.."
for file in $(git ls-files '*_test.go'); do
	for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
		echo "== $target in $(dirname "$file")"
		# Without a bound on minimizing, whose default is a minute for each find, long inputs
		# leave no time for others.
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$1" -fuzzminimizetime 20x "./$(dirname "$file")"
	done
done
