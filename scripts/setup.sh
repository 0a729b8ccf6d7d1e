#!/usr/bin/env bash
# Sets up what serving needs, and with --test what the tests need; starts nothing.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
serving setup "$@"
