"""What no library is given: tensors that are not what the contract says, which it would read as garbage."""

import pytest
import torch

from wicore_backend.errors import EngineError
from wicore_backend.executor.segments.contract import TOKENS, Segment, SegmentKind, TensorSpec
from wicore_backend.executor.segments.given import check_given

SEGMENT = Segment(SegmentKind.MID, 3)
SPEC = TensorSpec("attention", torch.float32, (TOKENS, 4, 8))
CPU = torch.device("cpu")


@pytest.mark.parametrize("tokens", [1, 7])
def test_any_number_of_tokens_is_right(tokens):
    check_given(SEGMENT, SPEC, torch.zeros(tokens, 4, 8), CPU)


def test_a_device_need_not_be_named_by_its_number():
    some = torch.empty(2, 4, 8, device="meta")
    check_given(SEGMENT, SPEC, some, torch.device("meta", 0))


@pytest.mark.parametrize(
    ("tensor", "device", "said"),
    [
        (torch.zeros(2, 4, 8).half(), CPU, r"float16 \(2, 4, 8\) on cpu in place of torch\.float32 \('T', 4, 8\)"),
        (torch.zeros(2, 32), CPU, r"is torch\.float32 \(2, 32\) on cpu in place of"),
        (torch.zeros(2, 8, 4).transpose(1, 2), CPU, r"with strides \(32, 1, 4\) on cpu in place of .* in order"),
        (torch.zeros(2, 4, 8), torch.device("cuda", 1), r"on cpu in place of .* on cuda:1"),
    ],
    ids=["type", "shape", "order", "device"],
)
def test_anything_else_is_an_error_that_names_the_segment_and_what_is_wrong(tensor, device, said):
    with pytest.raises(EngineError, match=rf"^mid_003: attention .*{said}"):
        check_given(SEGMENT, SPEC, tensor, device)
