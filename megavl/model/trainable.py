"""Which parameters a group covers. The stages' rows are `megavl.config.recipe.TRAINABLE_BY_STAGE`.

| group | covers | parameters, 7B |
|---|---|---|
| llm | embedding, decoder layers, final norm, head | 6,910,365,696 |
| adaptor | the aligner | 20,979,712 |
| sam_downsamples | the two stride-2 convolutions, which the paper counts as adaptor | 5,898,240 |
| sam_hd | neck of the HD branch and its scalar | 787,457 |
| sam_neck | neck of SAM | 787,456 |
| sam_trunk | patch embedding, positions, blocks of SAM | 88,883,456 |
| siglip | the SigLIP tower | 303,688,704 |
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

_PREFIXES = (
    ("vision.siglip.", "siglip"),
    ("vision.sam.downsamples.", "sam_downsamples"),
    ("vision.sam.neck_hd.", "sam_hd"),
    ("vision.sam.hd_alpha_downsamples", "sam_hd"),
    ("vision.sam.neck.", "sam_neck"),
    ("vision.sam.", "sam_trunk"),
    ("vision.adaptor.", "adaptor"),
    ("language_model.", "llm"),
)


def part_of(name: str) -> str:
    """Group of the parameter with the canonical name `name`."""
    for prefix, part in _PREFIXES:
        if name.startswith(prefix):
            return part
    raise AssertionError(f"parameter {name} belongs to no group")


def is_vision(name: str) -> bool:
    """Whether the parameter belongs to the vision side, which a text-only step must leave alone."""
    return name.startswith("vision.")


def freeze(model: nn.Module, *, train: Collection[str], prefix: str = "") -> None:
    """Let only the groups in `train` want gradients; must run before gradient buffers are made.

    Vision weights are replicated over tensor-parallel ranks. Their gradients are equal there by construction; averaging
    them keeps replicas from drifting apart where kernels are not deterministic.

    Args:
        model: whole stage, or a part of one.
        train: groups that want gradients.
        prefix: canonical name of the part, with its dot.
    """
    for name, parameter in model.named_parameters(prefix=prefix.removesuffix(".")):
        parameter.requires_grad_(part_of(name) in train)
        if is_vision(name):
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
