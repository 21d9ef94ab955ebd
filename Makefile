# Go and git are all that these targets need; every other tool is pinned in
# tools/go.mod and built from the module proxy when it is first used.
TOOL := go tool -modfile=tools/go.mod
# Packages that the race detector and the analysers look at.
PACKAGES := ./...
# Fuzz targets run this long each.
FUZZTIME ?= 30s
# What "make bench" runs.
BENCH ?= Durable

.DEFAULT_GOAL := help
.PHONY: help run serve build test check generate bench fuzz

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: build ## start a broker on this machine with no set-up, in .broker-dev
	@exec bin/broker dev

serve: build ## start a broker as configured by .env and the environment
	@set -a; if [ -f .env ]; then . ./.env; fi; set +a; exec bin/broker serve

build: ## build bin/broker
	@go build -o bin/broker ./cmd/broker

test: ## run all tests
	go test $(PACKAGES)

check: ## what CI asks beyond the tests: generated code, lint, vet, analysis, races, platforms
	@scripts/check.sh

generate: ## make gen/ from proto/
	$(TOOL) buf generate

bench: ## measure the store against plain bbolt in one run and print the ratios
	go test -run '^$$' -bench '$(BENCH)' -benchtime 1x ./server/vault/embedded

fuzz: ## run every fuzz target for FUZZTIME (30s) each
	@scripts/fuzz.sh $(FUZZTIME)
