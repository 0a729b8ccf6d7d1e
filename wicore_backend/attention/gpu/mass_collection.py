"""Attention masses on their way from the kernels to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from wicore_backend.attention.gpu.plans import Plan
from wicore_backend.attention.gpu.upload import put

Masses = Mapping[int, NDArray[np.float32]]
"""By sequence of a step; see `Attention.mass`."""


def collect(plan: Plan, *, cells_in_block: int) -> Callable[[], Masses]:
    """As `Attention.collect`, on the stream of the step's layers; its result outlives what is in the plan now."""
    measurements, mass, closed_up = plan.measurements, plan.mass, plan.closed_up
    if measurements is None or mass is None or not measurements.all:
        return dict
    values = mass.values[: measurements.rows]
    totals = put({"totals": measurements.totals()}, values.device)["totals"]
    shares = (values - values.index_select(0, totals)).exp2_().mean(1)
    on_host = torch.empty(shares.shape, dtype=shares.dtype, pin_memory=shares.is_cuda)
    on_host.copy_(shares, non_blocking=True)
    arrived = None
    if shares.is_cuda:
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

    def wait() -> Masses:
        if arrived is not None:
            arrived.synchronize()
        masses = measurements.by_block(on_host.numpy(), cells_in_block=cells_in_block)
        if closed_up is None:
            return masses
        return {sequence: closed_up.spread(sequence, mass) for sequence, mass in masses.items()}

    return wait
