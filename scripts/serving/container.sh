#!/usr/bin/env bash
# What a container runs: tritonserver, the gateway beside it, and before they are told to stop, the engine drained, as
# scripts/serving/guard.py does it elsewhere. $1 is the model repository; $WICORE_DRAIN the seconds that running answers get
# (default 20); $WICORE_GATEWAY the gateway's settings, or "off".
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

# Ends the server when a model's process has died, which Triton does not start again: its requests would never end. Who
# ends in an orderly way takes his file away before.
# shellcheck disable=SC2317 # Called in the background.
watch_models() {
    local file state
    while sleep 1; do
        for file in "$run"/engines/*.json "$run"/workers/*.json; do
            [[ -e $file ]] || continue
            state=$(sed 's/.*) //; s/ .*//' "/proc/$(basename "$file" .json)/stat" 2> /dev/null || true)
            if [[ (-z $state || $state == Z) && -e $file && ! -e $run/drain.json ]]; then
                echo "a model's process died ($(basename "$file" .json)); ending the server, to be started again" >&2
                touch "$run/died"
                kill -TERM "$server"
                sleep 1
                kill -KILL "$server" 2> /dev/null || true # It would wait for requests that do not end any more.
                return
            fi
        done
    done
}

# Starts the gateway again when it dies, until it is told to stop.
keep_gateway() {
    local process stopping=
    trap 'stopping=1; kill -TERM "$process" 2> /dev/null || true' TERM
    while [[ -z $stopping ]]; do
        python3 -m wicore_backend.gateway --set "drain_s=${WICORE_DRAIN:-20}" &
        process=$!
        while kill -0 "$process" 2> /dev/null; do
            wait "$process" || true
        done
        [[ $stopping ]] || sleep 1
    done
}

ulimit -S -s 262144 # HTTP threads of some releases keep request bodies there.
tritonserver --model-repository="$1" --model-repository="$run/markers" --model-control-mode=poll \
    --repository-poll-secs=1 --exit-timeout-secs=8 "${@:2}" &
server=$!
watch_models &
watch=$!
gateway=
if [[ ${WICORE_GATEWAY:-} != off ]]; then
    keep_gateway &
    gateway=$!
fi
trap drain_and_stop TERM INT

code=0
while kill -0 "$server" 2> /dev/null; do
    wait "$server" && code=0 || code=$?
done
kill "$watch" 2> /dev/null || true
if [[ -e $run/died ]]; then
    code=1
fi
if [[ $gateway ]]; then
    kill -TERM "$gateway" 2> /dev/null || true
    wait "$gateway" || true
fi
rm -rf "$run"
exit "$code"
