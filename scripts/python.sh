# shellcheck shell=bash
# Sourced by the scripts beside it: sets `root` to the checkout and `python` to a Python that serving works with.

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

python=
for candidate in ${WICORE_PYTHON:+"$WICORE_PYTHON"} python3.11 python3.12 python3; do
  if command -v "$candidate" >/dev/null && usable "$candidate"; then
    python=$(command -v "$candidate")
    break
  elif [[ $candidate == "${WICORE_PYTHON:-}" ]]; then
    break
  fi
done

if [[ -z $python ]]; then
  echo "Wicore needs Python 3.11 or 3.12 with its venv module (Debian, Ubuntu: apt install python3.11 python3.11-venv)." >&2
  echo "Install one, or name one that is not on PATH: WICORE_PYTHON=/path/to/python3.11" >&2
  exit 1
fi

serving() {
  PYTHONPATH=$root exec "$python" -P -m scripts.serving "$@"
}
