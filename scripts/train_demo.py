"""Trains the demo model from nothing, on data it generates itself.

    python -m scripts.train_demo --minutes 25 --out /tmp/demo     # one GPU
    python -m scripts.train_demo --small --minutes 1 --out /tmp/demo   # any CPU: shows that everything runs

Every half minute it writes `<out>/weights.safetensors` (float32) and adds a line of JSON to `<out>/log.jsonl`: the
loss and the held-out accuracy of every skill, a turn counting only if every token of its answer is right.
`--tokenizer` trains the tokenizer anew and writes the small files of the checkpoint; `--publish WEIGHTS` turns
trained weights into the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.data import DataLoader

from scripts.demo_data.conversation import Split
from scripts.demo_data.model import (
    SMALL,
    Attend,
    Geometry,
    Stream,
    Twin,
    dense_attend,
    load_weights,
    save_weights,
    write_settings,
)
from scripts.demo_data.packing import Pack, Packer, PackStream, training_pack
from scripts.demo_data.rendering import LABEL_CLASSES, cell_labels, render
from scripts.demo_data.tokenizer import UnitEncoder, train_tokenizer, write_tokenizer_settings

CHECKPOINT = Path(__file__).resolve().parents[1] / "models" / "wicore-demo"
BLOCK = 128
"""Tokens in one side of a block of FlexAttention's sparse masks."""


@dataclass(frozen=True)
class Plan:
    """How to train. Lengths are in tokens, times in seconds."""

    seconds: float
    tokens: int = 65536
    """In one step."""
    pictures: int = 192
    """The most in one step."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 200
    decay_share: float = 0.4
    """The learning rate falls to zero over this last share of the time."""
    first_length: int = 256
    last_length: int = 32768
    """Lists of facts grow from the first to the last length, doubling whenever they are learnt."""
    learnt: float = 0.93
    """The share of right answers about facts at which the lists grow."""
    facts_judged: int = 600
    """Questions about facts that are looked at before the lists may grow."""
    label_weight: float = 0.2
    """Of the loss that tells each picture row what it shows; its heads are not part of the model."""
    report_every: float = 30.0
    workers: int = 12
    seed: int = 0

    def rate(self, step: int, progress: float) -> float:
        """The learning rate: warm up, hold, fall linearly."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm * min(1.0, max(0.0, (1 - progress) / self.decay_share))


class Labels(nn.Module):
    """Tells shape and colour at each picture row: a dense signal that teaches the vision tower early."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(geometry.vision_hidden, classes) for classes in LABEL_CLASSES)

    def forward(self, pooled: Tensor, labels: tuple[Tensor, Tensor], is_picture: Tensor) -> Tensor:
        """Mean cross-entropy over the rows of real pictures; pooled is [M, T, vision_hidden], labels [M, T]."""
        weight = is_picture.float()[:, None] / (is_picture.sum().clamp(min=1) * pooled.shape[1])
        losses = [
            (F.cross_entropy(head(pooled).float().transpose(1, 2), label, reduction="none") * weight).sum()
            for head, label in zip(self.heads, labels, strict=True)
        ]
        return torch.stack(losses).sum()


class SparseMasks:
    """FlexAttention's masks of a stream. Their buffers stay where they are, so one compiled kernel serves all steps."""

    def __init__(self, tokens: int, window: int, device: torch.device) -> None:
        self._rows = torch.arange(tokens, device=device)
        self._window = window
        self._limits = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._lows = {is_global: torch.zeros(tokens, dtype=torch.int64, device=device) for is_global in (True, False)}
        self._rules = {is_global: self._rule(low) for is_global, low in self._lows.items()}

    def _rule(self, low: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        limits = self._limits

        def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k >= low[q]) & (k <= limits[q])

        return visible

    def update(self, starts: Tensor, limits: Tensor) -> tuple[BlockMask, BlockMask]:
        """(global, local) masks of this stream."""
        self._limits.copy_(limits)
        self._lows[True].copy_(starts)
        self._lows[False].copy_(torch.maximum(starts, self._rows - self._window + 1))
        return self._block_mask(is_global=True), self._block_mask(is_global=False)

    def _block_mask(self, *, is_global: bool) -> BlockMask:
        low, high = self._lows[is_global].view(-1, BLOCK), self._limits.view(-1, BLOCK)
        first = self._rows[::BLOCK]  # first key of each block
        last = first + BLOCK - 1
        touched = (last >= low.amin(1)[:, None]) & (first <= high.amax(1)[:, None])
        full = (first >= low.amax(1)[:, None]) & (last <= high.amin(1)[:, None])
        return BlockMask.from_kv_blocks(
            *_ordered(touched & ~full),
            *_ordered(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=self._rules[is_global],
            seq_lengths=(len(self._rows), len(self._rows)),
        )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(count [1, 1, B], indices [1, 1, B, B]) of the true columns of each row, as FlexAttention wants them."""
    count = blocks.sum(1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return count[None, None], indices[None, None].contiguous()


class Trainer:
    """One model, its optimizer, and its packs."""

    def __init__(self, geometry: Geometry, plan: Plan, device: torch.device, start: Path | None) -> None:
        torch.manual_seed(plan.seed)
        self.geometry = geometry
        self.plan = plan
        self.device = device
        self.twin = Twin(geometry).to(device)
        if start is not None:
            self.twin.load_state_dict(load_weights(start))
        self.labels = Labels(geometry).to(device)
        parameters = [*self.twin.parameters(), *self.labels.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=device.type == "cuda",
        )
        self.longest = torch.tensor(plan.first_length)
        self.longest.share_memory_()  # type: ignore[no-untyped-call]
        self.packer = Packer(
            UnitEncoder.load(CHECKPOINT),
            tokens=plan.tokens,
            pictures=plan.pictures,
            image_tokens=geometry.image_tokens,
        )
        self._loss = self._forward
        self._render = render
        self._masks: SparseMasks | None = None
        if device.type == "cuda":
            self._masks = SparseMasks(plan.tokens, geometry.window, device)
            self._loss = torch.compile(self._forward, dynamic=False)
            self._render = torch.compile(render, dynamic=False)

    def packs(self) -> Iterator[Pack]:
        stream = PackStream(self.packer, seed=self.plan.seed, split=Split.TRAIN, longest=self.longest)
        workers = self.plan.workers
        return iter(
            DataLoader(
                stream,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                pin_memory=self.device.type == "cuda",
            )
        )

    def held_out_packs(self, count: int) -> list[Pack]:
        rng = Random(f"held-out {self.plan.seed}")
        longest = min(16384, self.plan.last_length, self.plan.tokens // 2)
        return [training_pack(self.packer, rng, Split.HELD_OUT, longest=longest) for _ in range(count)]

    def run(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """(loss, [K] whether each answer token is predicted right) of one pack on this device."""
        pack = pack.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        with torch.no_grad():
            pixels = self._render(pack.scenes, pack.things, side=self.geometry.image_size)
            side = round(self.geometry.image_tokens**0.5)
            labels = cell_labels(pack.scenes, pack.things, side=side)
        masks = None if self._masks is None else self._masks.update(pack.starts, pack.limits)
        return self._loss(pack_stream(pack), pixels, masks, labels, pack.is_picture, pack.targets, pack.weights)

    def _forward(
        self,
        stream: Stream,
        pixels: Tensor,
        masks: tuple[BlockMask, BlockMask] | None,
        labels: tuple[Tensor, Tensor],
        is_picture: Tensor,
        targets: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        attend = dense_attend(stream, self.geometry.window) if masks is None else sparse_attend(*masks)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits, pooled = self.twin(stream, pixels if masks is not None else pixels.float(), attend)
            label_loss = self.labels(pooled, labels, is_picture)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum() + self.plan.label_weight * label_loss
        return loss, logits.argmax(-1) == targets

    def train(self, out: Path) -> None:
        """Trains for the plan's time, writing weights and a line of the log to `out` as it goes."""
        out.mkdir(parents=True, exist_ok=True)
        held_out = self.held_out_packs(6 if self.device.type == "cuda" else 1)
        packs = self.packs()
        began = reported = time.monotonic()
        compiled: float | None = None
        progress = 0.0
        step = 0
        lately, facts = Tally(), Tally()
        sampled = 20 if self.device.type == "cuda" else 1  # looking at a step's answers waits for the device
        while progress < 1:
            pack = next(packs)
            loss, right = self.step(pack, rate=self.plan.rate(step, progress))
            step += 1
            if step % sampled == 0:
                lately.add(pack, right, loss)
                facts.add(pack, right, loss)
            if facts.turns("facts") >= self.plan.facts_judged:
                self._grow(facts)
                facts = Tally()
            now = time.monotonic()
            compiled = now if compiled is None else compiled
            progress = (now - compiled) / self.plan.seconds
            if progress >= 1 or now - reported > self.plan.report_every:
                reported = now
                state = {"step": step, "seconds": round(now - began), "progress": round(progress, 3)}
                self._report(out, state, lately, held_out)
                lately = Tally()

    def step(self, pack: Pack, *, rate: float) -> tuple[Tensor, Tensor]:
        """Learns from one pack; gives its loss and which answer tokens were right before."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, right = self.run(pack)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.twin.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), right

    def _grow(self, facts: Tally) -> None:
        if facts.accuracy(depth=1)["facts"] >= self.plan.learnt:
            self.longest.fill_(min(self.plan.last_length, 2 * int(self.longest)))

    def _report(self, out: Path, state: dict[str, float], lately: Tally, held_out: list[Pack]) -> None:
        result = Tally()
        for pack in held_out:
            # Gradients stay on, although unused: without them the whole step would be compiled once more.
            loss, right = self.run(pack)
            result.add(pack, right, loss.detach())
        save_weights(self.twin, out / "saving.safetensors", dtype=torch.float32)
        (out / "saving.safetensors").replace(out / "weights.safetensors")
        line = {
            **state,
            "longest": int(self.longest),
            "train_loss": lately.loss,
            "held_out_loss": result.loss,
            "train": lately.accuracy(depth=1),
            "held_out": result.accuracy(depth=2),
        }
        print(json.dumps(line), flush=True)
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


def pack_stream(pack: Pack) -> Stream:
    return Stream(pack.ids, pack.positions, pack.starts, pack.limits, pack.picture_rows, pack.answer_rows)


def sparse_attend(global_mask: BlockMask, local_mask: BlockMask) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, is_global: bool) -> Tensor:
        mask = global_mask if is_global else local_mask
        out = flex_attention(q, k, v, block_mask=mask, scale=1.0, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    return attend


class Tally:
    """Right turns and all turns by skill, and the mean loss."""

    def __init__(self) -> None:
        self._right: dict[str, int] = defaultdict(int)
        self._all: dict[str, int] = defaultdict(int)
        self._losses: list[float] = []

    def add(self, pack: Pack, right: Tensor, loss: Tensor) -> None:
        used = pack.turns >= 0
        wrong = torch.zeros(len(pack.skills)).index_add(0, pack.turns[used], (~right.cpu()[used]).float())
        for skill, errors in zip(pack.skills, wrong.tolist(), strict=True):
            self._all[skill] += 1
            self._right[skill] += errors == 0
        self._losses.append(float(loss))

    @property
    def loss(self) -> float | None:
        return round(sum(self._losses) / len(self._losses), 4) if self._losses else None

    def turns(self, family: str) -> int:
        return sum(count for skill, count in self._all.items() if skill.startswith(family))

    def accuracy(self, *, depth: int) -> dict[str, float]:
        """By the first `depth` parts of the skills' names."""
        right: dict[str, int] = defaultdict(int)
        total: dict[str, int] = defaultdict(int)
        for skill, count in self._all.items():
            name = "/".join(skill.split("/")[:depth])
            total[name] += count
            right[name] += self._right[skill]
        return {name: round(right[name] / total[name], 3) for name in sorted(total)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="training time after compiling")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where weights and log go")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--rate", type=float, default=Plan.learning_rate, help="peak learning rate")
    parser.add_argument("--first-length", type=int, default=Plan.first_length, help="first lists of facts, tokens")
    parser.add_argument("--small", action="store_true", help="a tiny model and tiny packs, for a CPU")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--tokenizer", action="store_true", help="only train the tokenizer, write the settings")
    parser.add_argument("--publish", type=Path, metavar="WEIGHTS", help="only write these weights as checkpoint")
    options = parser.parse_args()
    if options.tokenizer:
        train_tokenizer(CHECKPOINT)
        write_tokenizer_settings(CHECKPOINT)
        write_settings(CHECKPOINT, Geometry())
        return
    if options.publish is not None:
        twin = Twin(Geometry())
        twin.load_state_dict(load_weights(options.publish))
        save_weights(twin, CHECKPOINT / "model.safetensors")
        return
    device = torch.device("cuda" if torch.cuda.is_available() and not options.small else "cpu")
    if device.type == "cpu" and not options.small:
        parser.error("no GPU found; --small trains a tiny model on a CPU")
    torch.set_float32_matmul_precision("high")
    plan = Plan(
        seconds=options.minutes * 60,
        learning_rate=options.rate,
        first_length=options.first_length,
        seed=options.seed,
    )
    if options.small:
        plan = replace(plan, tokens=2048, pictures=4, workers=0, warmup_steps=5, facts_judged=50, report_every=20)
    Trainer(SMALL if options.small else Geometry(), plan, device, options.start).train(options.out)


if __name__ == "__main__":
    main()
