#!/usr/bin/env bash
# Sets up what is missing and runs the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
serving test "$@"
