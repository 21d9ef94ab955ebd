# Go and git are all that these targets need; every other tool is pinned in
# tools/go.mod and built from the module proxy when it is first used.
TOOL := go tool -modfile=tools/go.mod
# Packages that the race detector and the analysers look at.
PACKAGES := ./...
# Fuzz targets run this long each.
FUZZTIME ?= 30s
# How many runs of random faults "make soak" makes.
SEEDS ?= 2000
# "make bench QUICK=1" prints the tables from fewer and shorter rounds.
QUICK ?=

.DEFAULT_GOAL := help
.PHONY: help run run-keyvault examples serve build test test-azure check generate bench fuzz soak

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: build ## start a broker on this machine with no set-up, in .broker-dev
	@exec bin/broker dev

# A program of its own, not "go run", which leaves it running when it is told to end.
run-keyvault: build ## the same on an Azure Key Vault in memory; Linux only
	@go build -o bin/run-keyvault ./internal/run-keyvault && exec bin/run-keyvault bin/broker

# Again a program of its own, which starts the others and ends them.
examples: build ## run the three example programs with a broker and a database
	@cd examples && go build -o ../bin/ ./console-api ./worker ./instance && go build -o ../bin/examples ./run
	@exec bin/examples bin

serve: build ## start a broker as configured by .env and the environment
	@set -a; if [ -f .env ]; then . ./.env; fi; set +a; exec bin/broker serve

build: ## build bin/broker
	@go build -o bin/broker ./cmd/broker

test: ## run all tests
	go test $(PACKAGES)
	cd examples && go test $(PACKAGES)

test-azure: ## hold the real vault AZURE_KEY_VAULT_URL against the suite of all vaults
	@[ "$$SECRET_STORE_PROVIDER" = azure-keyvault ] && [ -n "$$AZURE_KEY_VAULT_URL" ] || \
		{ echo 'make test-azure: set SECRET_STORE_PROVIDER=azure-keyvault and AZURE_KEY_VAULT_URL to a vault for tests; deleted secrets are left in it' >&2; exit 1; }
	go test -run '^TestAzure$$' -timeout 60m -count 1 -parallel 4 -v ./server/vault/keyvault

check: ## what CI asks beyond the tests: generated code, lint, vet, analysis, races, platforms
	@scripts/check.sh

generate: ## make gen/ from proto/
	$(TOOL) buf generate

# A program of its own, not "go run", as above. Its stores are in TMPDIR, and removed.
bench: build ## measure the broker beside an empty gRPC server, and write docs/performance.md; QUICK=1 prints only
	@go build -tags unrecorded -o bin/unrecorded ./cmd/broker
	@go build -o bin/bench ./internal/bench && exec bin/bench -broker bin/broker -unrecorded bin/unrecorded $(if $(QUICK),-quick,-docs docs)

soak: ## random faults against one secret, SEEDS (2000) times over
	BROKER_TEST_SEEDS=$(SEEDS) go test -count 1 -timeout 60m -run '^(TestRandomFaults|TestLinearizable)$$' ./server

fuzz: ## run every fuzz target for FUZZTIME (30s) each
	@scripts/fuzz.sh $(FUZZTIME)
