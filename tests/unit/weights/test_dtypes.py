"""Names of element types, and casts that lose no finite value."""

from __future__ import annotations

import pytest
import torch

from megavl.config.errors import CheckpointError
from megavl.weights.dtypes import CODE_OF_DTYPE, DTYPE_OF_CODE, DTYPES, cast, dtype_name


def test_every_type_has_one_name_and_code() -> None:
    assert all(dtype_name(dtype) == name for name, dtype in DTYPES.items())
    assert all(DTYPE_OF_CODE[code] == dtype for dtype, code in CODE_OF_DTYPE.items())
    assert set(DTYPES.values()) | {torch.float64} == set(DTYPE_OF_CODE.values())


def test_cast_refuses_values_beyond_float16() -> None:
    tensor = torch.tensor([1.0, 70_000.0])
    with pytest.raises(CheckpointError, match="f: tensor 'a' reaches 70000, beyond float16's 65504"):
        cast(tensor, torch.float16, name="a", source="f")
    assert cast(tensor, None, name="a", source="f") is tensor
    infinite = cast(torch.tensor([float("inf")]), torch.float16, name="a", source="f")
    assert infinite.dtype == torch.float16 and bool(infinite.isinf())
