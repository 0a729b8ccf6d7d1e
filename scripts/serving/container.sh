#!/usr/bin/env bash
# What a container runs: tritonserver, and before it is told to stop, the engine drained, as scripts/serving/guard.py
# does it elsewhere. $1 is the model repository; $WICORE_DRAIN the seconds that running answers get (default 20).
set -euo pipefail

run=$(mktemp -d)
mkdir "$run/markers"
export WICORE_RUN_DIRECTORY=$run

# shellcheck disable=SC2329 # Called by the trap.
drain_and_stop() {
    local began_stopping=$SECONDS
    printf '{"grace_s": %s}' "${WICORE_DRAIN:-20}" > "$run/drain.new"
    mv "$run/drain.new" "$run/drain.json"
    until [[ $SECONDS -gt $((began_stopping + ${WICORE_DRAIN:-20} + 10)) ]] || ! compgen -G "$run/engines/*.json" > /dev/null; do
        sleep 0.1
    done
    kill -TERM "$server" 2> /dev/null || true
}

ulimit -S -s 262144 # HTTP threads of some releases keep request bodies there.
tritonserver --model-repository="$1" --model-repository="$run/markers" --model-control-mode=poll \
    --repository-poll-secs=1 --exit-timeout-secs=8 "${@:2}" &
server=$!
trap drain_and_stop TERM INT

code=0
while kill -0 "$server" 2> /dev/null; do
    wait "$server" && code=0 || code=$?
done
rm -rf "$run"
exit "$code"
