#!/usr/bin/env bash
# Checks what this machine has, builds TensorRT engines on it, compares and times them, and prints one table to send
# back. To be run once, on a machine with a card; --help has the options. Exits 2 when something is missing, and says what.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"

# In NVIDIA's image the packages are beside Triton; elsewhere in the checkout's own environment.
for candidate in "${WICORE_PYTHON:-}" "$root/.venv/bin/python" /opt/wicore/bin/python "$python"; do
  if [[ -n $candidate ]] && "$candidate" -c 'import safetensors, torch, tqdm' 2>/dev/null; then
    cd "$root"
    exec "$candidate" -m scripts.verify_card "$@"
  fi
done
echo "This machine cannot run TensorRT engines:" >&2
echo "- no PyTorch: scripts/setup.sh makes .venv, and .venv/bin/pip install torch 'wicore[gpu,onnx,tensorrt-rtx]' adds the rest" >&2
exit 2
