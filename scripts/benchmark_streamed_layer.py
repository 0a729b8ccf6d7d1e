"""Ways to run a layer of one token as one kernel, beside several kernels a layer; on a Hopper GPU, or dry on a CPU.

    python -m scripts.benchmark_streamed_layer --bits 4 8 16 --json
    python -m scripts.benchmark_streamed_layer --dry

Eight layers of distinct weights are one CUDA graph, as in a decode step but for the attention; `--pause` puts a kernel
of so many microseconds in its place, which reads nothing. Every way's first layer is compared with float32, and all
eight repeat 100 times bit for bit, before they are timed: all in turns, so that what the card does meets each alike.
A way that cannot be compiled, is wrong or hangs is told in the table in place of its time; after one that hangs the
process ends, since nothing can be launched any more.

Dry, small layers of each way are compiled by g++ and run by the tests' twin of the card (`tests/hopper_twin`).
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scripts.benchmark_shape import QUANTIZE
from scripts.random_gemma3 import _COMMON, SHAPES, random_weights
from wicore_backend.executor.streamed_layer import MEASURED, Bits, Form, StreamedLayers, Tuning
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.weights import Gemma3Weights, plain

_KINDS: Mapping[Bits, str] = {4: "int4", 8: "fp8", 16: "bf16"}
LAYERS = 8
REPLAYS, REPEATS = 20, 100
_TOLERANCE = 1e-2
_PATIENCE = 25.0
"""Seconds until a way counts as one that hangs: it is compiled in one, and launched in less than a thousandth."""
_MATRICES = ("qkv", "out", "gate_up", "down")
_SEVERAL = "several kernels"

_KB = 1024
WAYS: Mapping[Bits, Mapping[str, Tuning]] = {
    4: {
        "as it is": MEASURED,
        "36 KB on their way": replace(MEASURED, in_flight=36 * _KB),
        "72 KB": replace(MEASURED, in_flight=72 * _KB),
        "96 KB": replace(MEASURED, in_flight=96 * _KB),
        "7 warps": replace(MEASURED, warps=7),
        "14 warps, 60 KB": replace(MEASURED, warps=14, in_flight=60 * _KB),
    },
    8: {
        "as it is": MEASURED,
        "44 KB on their way": replace(MEASURED, in_flight=44 * _KB),
        "58 KB": replace(MEASURED, in_flight=58 * _KB),
        "88 KB": replace(MEASURED, in_flight=88 * _KB),
        "14 warps": replace(MEASURED, warps=14),
    },
    16: {
        "as it is": MEASURED,
        "58 KB on their way": replace(MEASURED, in_flight=58 * _KB),
        "116 KB": replace(MEASURED, in_flight=116 * _KB),
        "140 KB": replace(MEASURED, in_flight=140 * _KB),
        "6 warps": replace(MEASURED, warps=6),
        "7 warps": replace(MEASURED, warps=7),
        "14 warps": replace(MEASURED, warps=14),
    },
}


@dataclass(frozen=True, slots=True)
class Found:
    """Of a way: microseconds a layer, their ratio to several kernels, error of the first layer; or what is wrong."""

    bits: Bits
    way: str
    microseconds: float | None = None
    ratio: float | None = None
    error: float | None = None
    wrong: str | None = None


class Layers:
    """Nine layers of a published shape with random weights: eight steps from one attention to the next."""

    def __init__(self, shape: str, bits: Bits, device: torch.device) -> None:
        with tempfile.TemporaryDirectory() as directory:
            few = {"num_hidden_layers": LAYERS + 1, "vocab_size": 256}
            (Path(directory) / "config.json").write_text(json.dumps(_COMMON | SHAPES[shape] | few))
            self.config = Gemma3Config.from_checkpoint(Path(directory))
        self.weights: Gemma3Weights = random_weights(
            self.config, device=device, dtype=torch.bfloat16, quantize=QUANTIZE[_KINDS[bits]]
        )
        text = self.config.text
        self.attended = text.num_heads * text.head_dim
        angles = torch.randn(1, text.head_dim // 2, device=device).repeat(1, 2)
        self.rope = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.hidden = torch.randn(1, text.hidden_size, device=device).bfloat16()
        self.attention = torch.randn(1, self.attended, device=device).bfloat16()

    @property
    def bytes_of_layer(self) -> int:
        layer = self.weights.text.layers[0]
        return sum(getattr(layer, name).nbytes for name in _MATRICES)

    def streamed(self, tuning: Tuning) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """One kernel a layer."""
        layers, text = self.weights.text.layers, self.config.text
        form = Form.of(text, layers, tuning)
        if form is None:
            raise RuntimeError("the kernel is not for such layers")
        streamed = StreamedLayers(form, text.rms_norm_eps, layers, self.hidden.device)
        return lambda layer, hidden, attention: streamed(layer, hidden, attention, *self.rope)

    def several(self) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What is used where one kernel is not."""
        from wicore_backend.executor.cuda_executor import _Layer

        layers = [_Layer(self.config, layer) for layer in self.weights.text.layers]

        def step(layer: int, hidden: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
            following = layers[layer + 1]
            hidden, normed = layers[layer].after_attention(
                hidden, attention, following.input_norm, reader=following.qkv
            )
            queries, _, _ = following.before_attention(normed, *self.rope)
            return hidden, queries.flatten(1)

        return step

    def expected(self) -> tuple[Tensor, Tensor]:
        """The residual stream and the heads after the first layer, in float32."""
        from wicore_backend.executor.torch_executor import TorchExecutor

        text = self.weights.text
        widened = tuple(
            replace(layer, **{name: plain(getattr(layer, name), torch.float32) for name in _MATRICES})
            for layer in text.layers[:2]
        )
        embedding = text.embedding.float()
        twin = replace(text, embedding=embedding, head=embedding, layers=widened)
        rope = [table.float() for table in self.rope]
        executor = TorchExecutor(self.config, replace(self.weights, text=twin))
        hidden, qkv = executor.mid(0, self.hidden.float(), self.attention.float(), *rope)
        return hidden, torch.cat([part.flatten() for part in qkv])


class Steps:
    """Eight layers as a graph, by one way."""

    def __init__(
        self, layers: Layers, step: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]], pause: int
    ) -> None:
        def all_layers() -> tuple[Tensor, Tensor]:
            hidden, attention = layers.hidden, layers.attention
            for layer in range(LAYERS):
                hidden, heads = step(layer, hidden, attention)
                attention = heads[:, : layers.attended]
                if pause:
                    torch.cuda._sleep(pause)  # type: ignore[no-untyped-call]
            return hidden, attention

        all_layers()
        torch.cuda.synchronize()
        self._step = step  # Whose memory the graph uses.
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = all_layers()

    def unstable(self) -> str | None:
        """What is wrong when the same is computed again and again."""
        once: list[Tensor] = []
        for turn in range(REPEATS):
            self._graph.replay()
            if turn == 0:
                once = [result.clone() for result in self._results]
            elif not all(map(torch.equal, self._results, once)):
                return f"other numbers in replay {turn}"
        return None

    def microseconds(self) -> float:
        """Of a layer."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(REPLAYS):
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end) * 1e3 / REPLAYS / LAYERS)


def compare(layers: Layers, bits: Bits, ways: Mapping[str, Tuning], *, rounds: int, pause: float) -> Iterator[Found]:
    """Each way and several kernels, timed in turns."""
    cycles = _cycles(pause)
    expected = layers.expected()
    right: dict[str, tuple[Steps, float]] = {}
    for name, tuning in {_SEVERAL: None, **ways}.items():
        faulthandler.dump_traceback_later(_PATIENCE, exit=True)
        try:
            step = layers.several() if tuning is None else layers.streamed(tuning)
            hidden, heads = step(0, layers.hidden, layers.attention)
            error = max(_relative_error(hidden, expected[0]), _relative_error(heads, expected[1][: heads.numel()]))
            if not error < _TOLERANCE:
                raise RuntimeError(f"relative error {error:.2g}")
            steps = Steps(layers, step, cycles)
            if wrong := steps.unstable():
                raise RuntimeError(wrong)
        except (RuntimeError, AttributeError, TypeError) as error_of_way:
            yield Found(bits, name, wrong=str(error_of_way)[:300])
            print(f"{bits} bits, {name}: {error_of_way}"[:300], file=sys.stderr, flush=True)
        else:
            right[name] = steps, error
            # So that something is known should a later way hang.
            print(f"{bits} bits, {name}: {steps.microseconds():.1f} us, not in turns", file=sys.stderr, flush=True)
        faulthandler.cancel_dump_traceback_later()
    times: dict[str, list[float]] = {name: [] for name in right}
    for turn in range(rounds):
        order = list(right) if turn % 2 == 0 else list(reversed(right))
        for name in order:
            times[name].append(right[name][0].microseconds())
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, (_, error) in right.items():
        ratio = medians[name] / medians[_SEVERAL] if _SEVERAL in medians else None
        yield Found(bits, name, medians[name], ratio, error)


def dry(bits: Bits, ways: Mapping[str, Tuning]) -> Iterator[Found]:
    """Each way with small layers, on a CPU: whether it is right, and whether its threads wait for each other."""
    from tests.hopper_twin.small_layers import SmallLayers

    compiled: dict[Tuning, Found] = {}
    for name, tuning in ways.items():
        small = replace(tuning, warps=None, in_flight=None)
        if small not in compiled:
            with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
                layers = SmallLayers(Path(directory), _KINDS[bits], tuning=small)
                hidden, attention = layers.row()
                try:
                    results = layers.run(hidden, attention, seed=0)
                    compiled[small] = Found(bits, name, error=max(layers.errors(hidden, attention, results)))
                except AssertionError as wrong:
                    compiled[small] = Found(bits, name, wrong=str(wrong))
        yield replace(compiled[small], way=name)


def table(found: Sequence[Found]) -> str:
    """In columns: bits, way, microseconds a layer, their ratio to several kernels, error."""
    rows = [("bits", "way", "us a layer", "ratio", "error")]
    for one in found:
        time_of = "" if one.microseconds is None else f"{one.microseconds:.1f}"
        ratio = "" if one.ratio is None else f"{one.ratio:.3f}"
        rows.append((str(one.bits), one.way, time_of, ratio, one.wrong or f"{one.error:.1e}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def main() -> None:
    options = _arguments()
    chosen: dict[Bits, dict[str, Tuning]] = {
        bits: {name: way for name, way in WAYS[bits].items() if not options.ways or name in options.ways}
        for bits in options.bits
    }
    found: list[Found] = []
    for bits, ways in chosen.items():
        if options.dry:
            found += dry(bits, ways)
            continue
        with torch.inference_mode():
            layers = Layers(options.shape, bits, torch.device("cuda"))
            print(f"{bits} bits: {layers.bytes_of_layer / 1e6:.0f} MB a layer", file=sys.stderr, flush=True)
            found += compare(layers, bits, ways, rounds=options.rounds, pause=options.pause)
        print(table([one for one in found if one.bits == bits]), file=sys.stderr, flush=True)
        del layers
        torch.cuda.empty_cache()
    where = "a CPU" if options.dry else torch.cuda.get_device_name()
    print(json.dumps({"device": where, "found": [asdict(one) for one in found]}) if options.json else table(found))
    if any(one.wrong for one in found):
        raise SystemExit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"], default="gemma-3-27b")
    parser.add_argument("--bits", type=int, nargs="+", choices=[4, 8, 16], default=[4, 8, 16])
    parser.add_argument("--ways", nargs="+", help="names of ways, as in the table; all unless given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.0, help="microseconds between layers in which nothing is read")
    parser.add_argument("--dry", action="store_true", help="small layers on a CPU; needs g++ and nothing else")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry runs small layers on the CPU")
    return options


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.flatten().float() - theirs.flatten()).norm() / theirs.norm())


def _cycles(microseconds: float) -> int:
    """Of `torch.cuda._sleep`, measured."""
    if not microseconds:
        return 0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
    start.record()
    torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
    end.record()
    end.synchronize()
    return int(microseconds * 1_000_000 / (start.elapsed_time(end) * 1e3))


if __name__ == "__main__":
    main()
