"""What codecs of KV blocks promise: sizes, error bounds, finite numbers, the same bytes for the same values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.codecs import make_codec

torch.set_num_threads(1)

NAMES = ("exact", "fp8", "q8", "q4")
LOSSY = NAMES[1:]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEMO = (2, 2, 16, 2, 64)
GEMMA_27B = (10, 2, 16, 16, 128)

shapes = st.tuples(
    st.integers(1, 3),
    st.just(2),
    st.sampled_from((1, 3, 8, 16, 17, 32)),
    st.integers(1, 3),
    st.sampled_from((1, 5, 16, 64, 96, 256)),
)


@st.composite
def kv_blocks(draw, *, largest_exponent=15):
    """Blocks whose values, channels and tokens differ in size by powers of two, some of them zero or constant."""
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    exponent = draw(st.integers(-24, largest_exponent - 4))
    if dtype is not torch.float16:
        exponent *= draw(st.sampled_from((1, 6)))  # Down to denormals, 2**-144.
    size = (draw(st.integers(1, 3)), *shape)
    blocks = torch.randn(size, generator=random)
    blocks *= 2.0 ** torch.randint(-4, 1, (size[-1],), generator=random)
    blocks *= 2.0 ** torch.randint(-6, 1, (*size[:4], 1, 1), generator=random)
    blocks += draw(st.sampled_from((0.0, 0.0, 3.0)))
    blocks *= torch.rand(size[:4], generator=random).gt(draw(st.sampled_from((0.0, 0.3))))[..., None, None]
    if draw(st.booleans()):
        blocks[:, :, :, :, :1] = blocks[:, :, :1, :1, :1]
    return (blocks * 2.0**exponent).to(dtype)


def through(name, blocks):
    codec = make_codec(name, tuple(blocks.shape[1:]), blocks.dtype)
    encoded = codec.encode(blocks)
    assert encoded.shape == (len(blocks), codec.encoded_bytes)
    decoded = torch.full_like(blocks, 7)
    codec.decode(encoded, out=decoded)
    return codec, encoded, decoded


def half_unit(values, dtype):
    """Of the dtype's last place, for float64 values, with what computing in float32 adds."""
    limits = torch.finfo(dtype)
    return values.abs() * (limits.eps / 2 + 2**-21) + limits.smallest_normal * limits.eps


def groups_of(blocks, size):
    return blocks.double().reshape(len(blocks), -1, size)


def group_size(shape):
    values = 2 * shape[2] * shape[3] * shape[4]
    return max(size for size in range(1, 65) if values % size == 0)


@given(blocks=kv_blocks())
@settings(max_examples=60, deadline=None)
def test_exact_returns_the_bytes(blocks):
    _, _, decoded = through("exact", blocks)
    assert torch.equal(decoded.view(torch.uint8), blocks.view(torch.uint8))


@given(blocks=kv_blocks())
@settings(max_examples=100, deadline=None)
def test_q8_errs_by_at_most_a_254th_of_the_largest_magnitude(blocks):
    _, _, decoded = through("q8", blocks)
    size = group_size(blocks.shape[1:])
    x, y = groups_of(blocks, size), groups_of(decoded, size)
    largest = x.abs().amax(-1, keepdim=True)
    assert torch.all((x - y).abs() <= largest / 254 + half_unit(x, blocks.dtype) + largest * 2**-20)
    assert torch.equal(y.abs().amax(-1, keepdim=True), largest), "the largest magnitude is exact"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_q8_code_in_units_of_every_magnitude_is_rounded_as_if_it_were_divided(dtype):
    magnitudes = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    magnitudes = magnitudes[magnitudes.isfinite()]
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(magnitudes)).view(-1, 2**15)  # Four groups a magnitude.
    stored = magnitudes.repeat_interleave(4).view(len(codes), -1)
    codec = make_codec("q8", (1, 2, 32, 8, 64), dtype)
    out = torch.empty(len(codes), *codec.shape, dtype=dtype)
    codec.decode(torch.cat([codes, stored.view(torch.uint8)], 1), out=out)
    units = codes.view(torch.int8).float().div_(127).view(len(codes), -1, 64)
    expected = (units * stored.float()[..., None]).to(dtype)
    assert torch.equal(out.view(torch.int16).flatten(), expected.view(torch.int16).flatten())


@given(blocks=kv_blocks())
@settings(max_examples=100, deadline=None)
def test_fp8_errs_by_at_most_a_16th(blocks):
    _, _, decoded = through("fp8", blocks)
    x, y = blocks.double(), decoded.double()
    largest = x.abs().amax((3, 5), keepdim=True)
    bound = torch.maximum(x.abs() / 16, largest / 448 / 2**10)
    assert torch.all((x - y).abs() <= bound * (1 + 2**-18) + half_unit(x, blocks.dtype))
    assert torch.equal(y.abs().amax((3, 5), keepdim=True), largest), "the largest magnitude is exact"


@given(blocks=kv_blocks())
@settings(max_examples=100, deadline=None)
def test_q4_values_err_by_at_most_a_30th_of_their_range(blocks):
    _, _, decoded = through("q4", blocks)
    _, _, tokens, _, dim = blocks.shape[1:]
    width = max(size for size in range(1, 129) if dim % size == 0)
    wanted = min(-(-128 // width), tokens)
    rows = next(size for size in range(wanted, tokens + 1) if tokens % size == 0)

    def groups(tensor):
        return tensor[:, :, 1].double().unflatten(4, (-1, width)).unflatten(2, (-1, rows))

    x, y = groups(blocks), groups(decoded)
    least, most = x.amin((3, 6), keepdim=True), x.amax((3, 6), keepdim=True)
    unit = half_unit(torch.maximum(least.abs(), most.abs()), blocks.dtype)
    assert torch.all((x - y).abs() <= (most - least) / 30 + unit)
    assert torch.equal(y.amin((3, 6), keepdim=True), least)
    assert torch.equal(y.amax((3, 6), keepdim=True), most)


@given(blocks=kv_blocks())
@settings(max_examples=100, deadline=None)
def test_q4_keys_err_by_at_most_a_30th_of_their_channels_range(blocks):
    _, _, decoded = through("q4", blocks)
    tokens = blocks.shape[3]
    run = next(size for size in range(min(16, tokens), tokens + 1) if tokens % size == 0)

    def runs(tensor):
        return tensor[:, :, 0].double().unflatten(2, (-1, run))  # [N, layers, runs, tokens, heads, d]

    x, y = runs(blocks), runs(decoded)
    least, most = x.amin(3, keepdim=True), x.amax(3, keepdim=True)
    head = x.amax((3, 5), keepdim=True) - x.amin((3, 5), keepdim=True)
    widened = torch.minimum(most - least + head * (2 / 15 + 2**-18), head)
    unit = half_unit(x.abs().amax((3, 5), keepdim=True), blocks.dtype)
    assert torch.all((x - y).abs() <= widened / 30 + unit)


@given(blocks=kv_blocks(), name=st.sampled_from(("exact", "fp8", "q8")))
@settings(max_examples=150, deadline=None)
def test_going_down_a_second_time_changes_nothing(blocks, name):
    codec, encoded, decoded = through(name, blocks)
    encoded_again = codec.encode(decoded)
    again = torch.empty_like(blocks)
    codec.decode(encoded_again, out=again)
    assert torch.equal(again, decoded)
    if name != "fp8":  # Where float16 is coarser than e4m3, near 0, several codes stand for one number.
        assert torch.equal(encoded_again, encoded)


@given(blocks=kv_blocks())
@settings(max_examples=60, deadline=None)
def test_q4_values_go_down_a_second_time_unchanged(blocks):
    codec, _, decoded = through("q4", blocks)
    again = torch.empty_like(blocks)
    codec.decode(codec.encode(decoded), out=again)
    assert torch.equal(again[:, :, 1], decoded[:, :, 1])


@given(blocks=kv_blocks(), name=st.sampled_from(NAMES))
@settings(max_examples=60, deadline=None)
def test_a_block_gives_the_same_bytes_whatever_is_beside_it(blocks, name):
    codec, encoded, _ = through(name, blocks)
    alone = [codec.encode(block[None].clone())[0] for block in blocks]
    assert torch.equal(torch.stack(alone), encoded)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_blocks_than_a_chunk_are_encoded_as_one_by_one(name, dtype):
    blocks = torch.randn(70, *DEMO, generator=torch.Generator().manual_seed(1)).to(dtype)
    codec, encoded, decoded = through(name, blocks)
    one = torch.empty_like(blocks[:1])
    for index in (0, 63, 64, 69):
        assert torch.equal(codec.encode(blocks[index : index + 1])[0], encoded[index])
        codec.decode(encoded[index : index + 1].clone(), out=one)
        assert torch.equal(one[0], decoded[index])


@given(blocks=kv_blocks(), name=st.sampled_from(LOSSY), seed=st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_what_is_not_finite_is_decoded_as_finite(blocks, name, seed):
    where = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed))
    for number, share in ((float("nan"), 0.1), (float("inf"), 0.05), (-float("inf"), 0.01)):
        blocks = torch.where(where < share, number, blocks)
    _, _, decoded = through(name, blocks)
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fp8", "q8"])
def test_nan_becomes_zero_and_infinity_the_largest_number(name, dtype):
    blocks = torch.zeros(1, *DEMO, dtype=dtype)
    blocks[0, 0, 0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    _, _, decoded = through(name, blocks)
    largest = torch.finfo(dtype).max
    assert decoded[0, 0, 0, 0, 0, :3].tolist() == [0, largest, -largest]
    assert not decoded[0, 0, 0, 0, 0, 3:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSY)
def test_the_largest_numbers_of_both_signs_stay_finite(name, dtype):
    blocks = torch.full((1, *DEMO), torch.finfo(dtype).max, dtype=dtype)
    blocks[..., ::2] *= -1
    _, _, decoded = through(name, blocks)
    limit = min(torch.finfo(dtype).max, 2.0**126) if name == "q4" else torch.finfo(dtype).max
    assert torch.equal(decoded, blocks.clamp(-limit, limit))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.140625, 2**-24, -(2.0**15)])
def test_constant_blocks_are_exact(name, dtype, value):
    blocks = torch.full((2, *DEMO), value, dtype=dtype)
    _, _, decoded = through(name, blocks)
    assert torch.equal(decoded, blocks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_denormal_is_exact(name, dtype):
    limits = torch.finfo(dtype)
    blocks = torch.zeros(1, *DEMO, dtype=dtype)
    blocks[0, :, :, 3, 1, 5] = limits.smallest_normal * limits.eps
    assert blocks.any()
    _, _, decoded = through(name, blocks)
    assert torch.equal(decoded, blocks)


@pytest.mark.parametrize("shape", [DEMO, (6, *DEMO[1:]), GEMMA_27B, (5, 2, 32, 4, 256)], ids=str)
def test_blocks_shrink_as_promised(shape):
    ratios = {
        (name, dtype.itemsize): make_codec(name, shape, dtype).ratio
        for name in NAMES
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert ratios["exact", 2] == ratios["exact", 4] == 1
    assert ratios["fp8", 2] >= 1.99
    assert ratios["q8", 2] >= 1.9
    assert ratios["q8", 4] >= 3.7
    assert ratios["q4", 2] >= 3.6
    assert ratios["q4", 4] >= 7


def test_decoding_writes_its_blocks_of_a_pool_and_no_others():
    blocks = torch.randn(3, *DEMO)
    codec, encoded, decoded = through("q4", blocks)
    pool = torch.full((8, *DEMO), 5.0)
    codec.decode(encoded, out=pool[2:5])
    assert torch.equal(pool[2:5], decoded)
    assert torch.all(pool[:2] == 5)
    assert torch.all(pool[5:] == 5)


@given(seed=st.integers(0, 2**32), name=st.sampled_from(NAMES), dtype=st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_any_bytes_decode_to_something(seed, name, dtype):
    codec = make_codec(name, DEMO, dtype)
    noise = torch.randint(
        0, 256, (2, codec.encoded_bytes), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    codec.decode(noise, out=torch.empty(2, *DEMO, dtype=dtype))


def test_no_blocks_encode_to_nothing():
    codec, encoded, _ = through("q8", torch.empty(0, *DEMO))
    assert encoded.shape == (0, codec.encoded_bytes)


def test_fingerprints_differ_where_the_bytes_mean_something_else():
    codecs = [
        make_codec(name, shape, dtype)
        for name in NAMES
        for shape in (DEMO, (2, 2, 32, 1, 64))
        for dtype in (torch.bfloat16, torch.float16)
    ]
    assert len({codec.fingerprint for codec in codecs}) == len(codecs)


def test_stored_bytes_keep_their_meaning():
    """A change of these bytes needs a new version."""
    blocks = torch.arange(2 * 4 * 4).reshape(1, 1, 2, 4, 1, 4).to(torch.bfloat16) - 20
    encoded = {name: make_codec(name, tuple(blocks.shape[1:]), blocks.dtype).encode(blocks) for name in NAMES}
    assert {name: make_codec(name, DEMO, torch.bfloat16).version for name in NAMES} == dict.fromkeys(NAMES, 1)
    assert {name: bytes(each[0].tolist()).hex() for name, each in encoded.items()} == {
        "exact": "a0c198c190c188c180c170c160c150c140c130c120c110c100c1e0c0c0c0a0c0"
        "80c040c000c080bf0000803f004040408040a040c040e0400041104120413041",
        "fp8": "fefdfdfcfbfafaf9f8f7f6f5f3f2f0eef2efeae200626a6f727577797a7b7d7ea0413041",
        "q8": "81878e949aa1a7adb4bac0c7cdd4dae0e7edf3fa00060d131920262c33394046a041",
        "q4": "a0a0a0a0f5f5f5f5c0d1e2f3a0c1a0c08091a2b3c4d5e6f780c03041",
    }


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 2, 16, 64), torch.bfloat16), ((2, 3, 16, 2, 64), torch.bfloat16), (DEMO, torch.float64), (DEMO, torch.int8)],
)
def test_what_is_no_block_is_refused(shape, dtype):
    with pytest.raises(InvalidArgumentError):
        make_codec("q8", shape, dtype)


def test_an_unknown_codec_is_refused_by_name():
    with pytest.raises(InvalidArgumentError, match=r"'zip'.*exact, fp8, q8, q4"):
        make_codec("zip", DEMO, torch.bfloat16)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (torch.zeros(2, *DEMO, dtype=torch.float32), "takes torch.bfloat16"),
        (torch.zeros(2, *DEMO[1:], dtype=torch.bfloat16), "takes torch.bfloat16"),
        (torch.zeros(4, *DEMO, dtype=torch.bfloat16)[::2], "contiguous"),
    ],
)
def test_blocks_of_another_kind_are_refused(blocks, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make_codec("q8", DEMO, torch.bfloat16).encode(blocks)


def test_encoded_bytes_of_another_length_are_refused():
    codec = make_codec("q8", DEMO, torch.bfloat16)
    with pytest.raises(InvalidArgumentError, match="encoded"):
        codec.decode(
            torch.zeros(1, codec.encoded_bytes - 1, dtype=torch.uint8), out=torch.zeros(1, *DEMO, dtype=torch.bfloat16)
        )
