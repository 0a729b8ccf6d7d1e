"""The codecs' kernels in OpenAI Triton: the bytes and the numbers of their twins in PyTorch, on any numbers.

On a machine without a GPU they run under OpenAI Triton's interpreter (tests/conftest.py).
"""

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from wicore_backend.hmt.codecs import make_codec
from wicore_backend.hmt.codecs.kernels.arithmetic import e4m3_by_adding, in_units_of

torch.set_num_threads(1)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SAME_BYTES = ("exact", "fp8", "q8")
DEMO = (2, 2, 16, 2, 64)
SHAPES = [(1, 2, 16, 2, 64), (1, 2, 32, 1, 128), (1, 2, 4, 1, 256), (1, 2, 64, 1, 16)]
"""As of the demo, 27B and 1B models and, so that there are several runs of keys in half a block, of none."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")


def kernels_of(codec):
    kernels = codec._kernels
    assert kernels is not None
    return kernels


def numbers(kind, shape, dtype, *, seed=0):
    """Blocks [1, *shape] of one kind."""
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randn(1, *shape, generator=random)
    tokens = (*blocks.shape[:4], 1, 1)
    limits = torch.finfo(dtype)
    if kind == "large channels":
        blocks *= 2.0 ** torch.randint(-3, 4, (shape[-1],), generator=random)
    elif kind == "all magnitudes":
        reach = 14 if dtype is torch.float16 else 120
        blocks *= 2.0 ** torch.randint(-reach, reach, tokens, generator=random)
        blocks *= 2.0 ** torch.randint(-20, 1, blocks.shape, generator=random)
    elif kind == "denormal":
        blocks *= limits.smallest_normal / 8
    elif kind == "huge":
        blocks = blocks.sign() * limits.max * torch.rand(blocks.shape, generator=random)
    elif kind == "zeros":
        blocks *= torch.rand(tokens, generator=random).gt(0.5) & torch.rand(blocks.shape, generator=random).gt(0.5)
        blocks[0, 0, 0] = -0.0
    elif kind == "few values":
        blocks = blocks.mul(2).round()
    blocks = blocks.to(dtype)
    if kind == "not finite":
        where = torch.rand(blocks.shape, generator=random)
        for number, share in ((float("nan"), 0.1), (float("inf"), 0.05), (-float("inf"), 0.01)):
            blocks = torch.where(where < share, number, blocks)
        blocks.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[where > 0.95] = -1  # NaN with a sign.
    return blocks


KINDS = (
    "normal",
    "large channels",
    "all magnitudes",
    "denormal",
    "huge",
    "zeros",
    "few values",
    "not finite",
)


def encoded_by_kernel(codec, blocks, device):
    records = torch.full((len(blocks), codec.encoded_bytes), 77, dtype=torch.uint8, device=device)
    kernels_of(codec).encode(blocks.to(device), records)
    return records.cpu()


def decoded_by_kernel(codec, records, device):
    blocks = torch.full((len(records), *codec.shape), 5, dtype=codec.dtype, device=device)
    kernels_of(codec).decode(records.to(device), blocks)
    return blocks.cpu()


def decoded_by_twin(codec, records):
    blocks = torch.empty(len(records), *codec.shape, dtype=codec.dtype)
    codec.decode(records, out=blocks)
    return blocks


def assert_same_bits(first, second):
    """Zeros' signs included; of NaN, that it is one."""
    assert torch.equal(first.isnan(), second.isnan())
    assert torch.equal(first.nan_to_num(0.0).view(torch.uint8), second.nan_to_num(0.0).view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SAME_BYTES)
def test_kernels_write_the_bytes_and_read_the_numbers_of_their_twin(name, dtype, shape, kernel_device):
    codec = make_codec(name, shape, dtype)
    for kind in KINDS:
        blocks = numbers(kind, shape, dtype)
        records = codec.encode(blocks)
        assert torch.equal(encoded_by_kernel(codec, blocks, kernel_device), records), kind
        assert_same_bits(decoded_by_kernel(codec, records, kernel_device), decoded_by_twin(codec, records))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fp8", "q8"])
def test_any_bytes_decode_to_the_numbers_of_the_twin(name, dtype, kernel_device):
    codec = make_codec(name, DEMO, dtype)
    random = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (3, codec.encoded_bytes), generator=random, dtype=torch.uint8)
    assert_same_bits(decoded_by_kernel(codec, noise, kernel_device), decoded_by_twin(codec, noise))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_q4_differs_from_its_twin_only_where_two_codes_are_as_near(dtype, shape, kernel_device):
    codec = make_codec("q4", shape, dtype)
    for kind in KINDS:
        blocks = numbers(kind, shape, dtype)
        records = codec.encode(blocks)
        by_kernel = encoded_by_kernel(codec, blocks, kernel_device)
        assert (by_kernel != records).sum() <= records.numel() / 100, kind
        finite = blocks.double().nan_to_num(0.0, posinf=2.0**126, neginf=-(2.0**126)).clamp(-(2.0**126), 2.0**126)
        finite = finite.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
        twin = (decoded_by_twin(codec, records).double() - finite).abs()
        kernel = (decoded_by_kernel(codec, by_kernel, kernel_device).double() - finite).abs()
        # Numbers as large as those of a head have no finer digits, in the dtype or in float32.
        limits = torch.finfo(dtype)
        digits = finite.abs().amax((3, 5), keepdim=True) * (limits.eps + 2**-18) + limits.smallest_normal * limits.eps
        assert torch.all(kernel <= twin + digits), kind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_q4_keeps_the_ends_of_ranges(dtype, kernel_device):
    codec = make_codec("q4", DEMO, dtype)
    for kind in ("normal", "few values", "denormal", "zeros"):
        blocks = numbers(kind, DEMO, dtype)
        decoded = decoded_by_kernel(codec, encoded_by_kernel(codec, blocks, kernel_device), kernel_device)
        groups = [each[:, :, 1].unflatten(2, (-1, 2)) for each in (blocks, decoded)]  # Two tokens of a head.
        assert torch.equal(groups[0].amin((3, 5)), groups[1].amin((3, 5)))
        assert torch.equal(groups[0].amax((3, 5)), groups[1].amax((3, 5)))


@pytest.mark.parametrize("name", ["exact", "fp8", "q8", "q4"])
def test_kernels_write_their_blocks_of_a_pool_and_leave_the_others(name, kernel_device):
    codec = make_codec(name, DEMO, torch.bfloat16)
    blocks = torch.cat([numbers("normal", DEMO, torch.bfloat16, seed=seed) for seed in range(2)])
    records = encoded_by_kernel(codec, blocks, kernel_device)
    pool = torch.full((3 * len(blocks), *DEMO), 7, dtype=torch.bfloat16, device=kernel_device)
    middle = slice(len(blocks), 2 * len(blocks))
    kernels_of(codec).decode(records.to(kernel_device), pool[middle])
    assert torch.equal(pool[middle].cpu(), decoded_by_kernel(codec, records, kernel_device))
    assert torch.all(pool[: middle.start] == 7)
    assert torch.all(pool[middle.stop :] == 7)


@triton.jit
def _units(numbers, largest, units, count: tl.constexpr):
    places = tl.arange(0, count)
    tl.store(units + places, in_units_of(tl.load(numbers + places), tl.load(largest + places), SHORT=True))


@triton.jit
def _e4m3(numbers, codes, count: tl.constexpr):
    places = tl.arange(0, count)
    tl.store(codes + places, e4m3_by_adding(tl.load(numbers + places)))


@pytest.mark.parametrize("exponents", [(0, 0), (-1, 0), (-19, 0), (100, 101), (-120, -119)], ids=str)
def test_units_are_correctly_rounded_for_all_significands_of_11_bits(exponents, kernel_device):
    significands = torch.arange(1024, 2048, dtype=torch.float32)
    few = significands[torch.arange(1, 1024, 8) if kernel_device.type == "cpu" else torch.arange(1024)]
    for some in few.split(128):
        values = (significands * 2.0 ** exponents[0]).repeat(len(some))
        largest = (some * 2.0 ** exponents[1]).repeat_interleave(len(significands))
        values = torch.where(values > largest, values / 2, values)
        units = torch.empty_like(values).to(kernel_device)
        _units[(1,)](
            values.to(kernel_device), largest.to(kernel_device), units, count=len(values), enable_fp_fusion=False
        )
        assert torch.equal(units.cpu(), values / largest)


def test_e4m3_rounds_half_to_even(kernel_device):
    random = torch.Generator().manual_seed(5)
    exact = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (exact[1:] + exact[:-1]) / 2
    values = torch.cat([exact, middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(500.0))])
    values = torch.cat([values, 448 * torch.rand(2**13, generator=random) ** 4])[: 2**13]
    values = torch.cat([values, -values])
    codes = torch.empty(len(values), dtype=torch.uint8, device=kernel_device)
    _e4m3[(1,)](values.to(kernel_device), codes, count=len(values))
    assert torch.equal(codes.cpu(), values.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("name", ["fp8", "q8", "q4"])
@pytest.mark.parametrize("shape", [(1, 2, 17, 1, 96), (1, 2, 1, 1, 5), (1, 2, 256, 1, 256)], ids=str)
def test_shapes_that_no_program_can_take_are_left_to_the_twin(name, shape):
    codec = make_codec(name, shape, torch.bfloat16)
    fits_q8 = 2 * shape[2] * shape[3] * shape[4] % 64 == 0
    assert (codec._kernels is not None) == (name == "q8" and fits_q8)


@pytest.mark.parametrize("name", ["exact", "fp8", "q8", "q4"])
@pytest.mark.parametrize("shape", [DEMO, (22, 2, 32, 1, 256), (10, 2, 32, 16, 128)], ids=str)
def test_every_record_of_a_batch_is_aligned_for_the_kernels(name, shape):
    codec = make_codec(name, shape, torch.bfloat16)
    assert codec.encoded_bytes % kernels_of(codec).alignment == 0


def test_nothing_of_triton_is_imported_on_a_cpu():
    code = (
        "import sys, torch\n"
        "from wicore_backend import Engine\n"
        "from wicore_backend.hmt.codecs import make_codec\n"
        "for name in ('exact', 'fp8', 'q8', 'q4'):\n"
        f"    codec = make_codec(name, {DEMO}, torch.bfloat16)\n"
        f"    blocks = torch.zeros(1, *{DEMO}, dtype=torch.bfloat16)\n"
        "    codec.decode(codec.encode(blocks), out=blocks)\n"
        "    codec.prepare(torch.device('cpu'))\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["exact", "fp8", "q8", "q4"])
def test_a_cuda_device_takes_one_launch_allocates_nothing_and_waits_for_nothing(name):
    codec = make_codec(name, DEMO, torch.bfloat16)
    codec.prepare(torch.device("cuda"))
    pool = torch.cat([numbers("normal", DEMO, torch.bfloat16, seed=seed) for seed in range(2)]).cuda()
    records = codec.encode(pool)
    decoded = torch.empty_like(pool)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            codec.encode(pool, out=records)
            codec.decode(records, out=decoded)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    kernels = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert len(kernels) == 2, kernels


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["exact", "fp8", "q8", "q4"])
@pytest.mark.parametrize("shape", [DEMO, (1, 2, 17, 1, 96)], ids=str)
def test_records_may_lie_in_page_locked_memory(name, shape):
    codec = make_codec(name, shape, torch.bfloat16)
    blocks = numbers("normal", shape, torch.bfloat16)
    near = codec.encode(blocks.cuda())
    pinned = torch.zeros(near.shape, dtype=torch.uint8).pin_memory()
    codec.encode(blocks.cuda(), out=pinned)
    torch.cuda.synchronize()
    assert torch.equal(pinned, near.cpu())
    from_near, from_pinned = torch.zeros_like(blocks).cuda(), torch.zeros_like(blocks).cuda()
    codec.decode(near, out=from_near)
    codec.decode(pinned, out=from_pinned)
    assert torch.equal(from_near, from_pinned)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8", "q8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_twin_on_the_device_writes_the_same_bytes(name, dtype):
    shape = (4, 2, 32, 4, 128)
    codec = make_codec(name, shape, dtype)
    for kind in KINDS:
        blocks = numbers(kind, shape, dtype).cuda()
        by_twin = torch.empty(len(blocks), codec.encoded_bytes, dtype=torch.uint8, device="cuda")
        codec._encode_plain(blocks, by_twin)
        assert torch.equal(codec.encode(blocks), by_twin), kind
        assert torch.equal(by_twin.cpu(), codec.encode(blocks.cpu())), kind
