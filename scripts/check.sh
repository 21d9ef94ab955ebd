#!/usr/bin/env bash
# What CI asks beyond the tests. Each step says what it checks; the first that
# fails ends the run.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/tools/go.mod
tool() { go tool -modfile="$tools" "$@"; }
step() { printf '== %s\n' "$*"; }

step 'every go.mod is tidy'
for module in . tools examples; do
	(cd "$module" && go mod tidy -diff)
done

step 'generated code is what buf makes of proto/'
before=$(find gen -type f -exec sha256sum {} + | sort)
tool buf generate
after=$(find gen -type f -exec sha256sum {} + | sort)
if [ "$before" != "$after" ]; then
	echo 'gen/ differs from proto/: commit what "make generate" makes' >&2
	exit 1
fi

step 'buf lint'
tool buf lint

step 'buf breaking, against the commit before the last change of proto/'
last=$(git log -n 1 --format=%H -- proto)
if [ -n "$(git status --porcelain -- proto)" ]; then
	base=$last # what is not committed yet is the change
else
	base=$(git rev-parse --quiet --verify "$last^" || true)
fi
if [ -n "$base" ] && git cat-file -e "$base:proto" 2>/dev/null; then
	tool buf breaking --against ".git#ref=$base,subdir=."
else
	echo 'no earlier version of proto/'
fi

step 'gofmt'
unformatted=$(gofmt -l $(git ls-files '*.go' | grep -v '^gen/'))
if [ -n "$unformatted" ]; then
	printf 'not formatted by gofmt:\n%s\n' "$unformatted" >&2
	exit 1
fi

step 'vet and staticcheck'
go vet ./...
go vet -tags unrecorded ./server ./server/audit ./cmd/broker # what make bench builds
tool staticcheck ./...
(cd examples && go vet ./... && go tool -modfile=../tools/go.mod staticcheck ./...)

step 'secrets are never formatted, and nothing weak is used (tools/vet)'
(cd tools && go vet ./... && go test ./... && go build -o ../bin/vet ./vet)
go vet -vettool="$PWD/bin/vet" ./...
(cd examples && go vet -vettool="$PWD/../bin/vet" ./...)

step 'known vulnerabilities'
# GOVULNDB is another database than that of Go, such as file:///folder. The exit code is 3
# when the code calls what is vulnerable; a database that cannot be reached is no fault of it.
database=${GOVULNDB:-https://vuln.go.dev}
for module in . examples; do
	code=0
	report=$(cd "$module" && go tool -modfile="$tools" govulncheck -db "$database" ./... 2>&1) || code=$?
	if [ "$code" = 1 ] && [[ $report == *'fetching vulnerabilities: '* ]]; then
		echo "not looked for: the database at $database cannot be reached"
		break
	elif [ "$code" != 0 ]; then
		printf '%s\n' "$report" >&2
		exit 1
	fi
done

for os in linux darwin; do
	for arch in amd64 arm64; do
		step "everything compiles for $os/$arch, tests too"
		GOOS=$os GOARCH=$arch go vet ./...
	done
done
# One of them will do: SQLite takes long.
step 'the examples compile for darwin/arm64, tests too'
(cd examples && GOOS=darwin GOARCH=arm64 go vet ./...)

# Without the tests of the program and of the examples: they look at processes, which are
# built without the detector, and all that runs in the broker is looked at here.
step 'tests with the race detector'
# The server's take longest and begin first; three packages at a time, since tests wait as
# well as compute.
go test -p 3 -race ./server $(go list ./... | grep -v -e '/cmd/broker$' -e '/server$')
