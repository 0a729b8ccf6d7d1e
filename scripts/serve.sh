#!/usr/bin/env bash
# Sets up what is missing and serves Gemma-3 through Triton: scripts/serve.sh --help
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
serving serve "$@"
