"""The [quantize] table of a recipe: one closed class per format, and the table that names them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A table of a recipe: frozen, strictly typed, closed."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class GptqSection(Section):
    """How GPTQ quantizes."""

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits per code. vLLM serves 4 and 8.")
    group_size: Literal[-1, 32, 64, 128] = Field(
        default=128, description="Input channels per scale; -1 is one scale per row."
    )
    symmetric: bool = Field(
        default=True, description="Fix the zero point in the middle of the codes. vLLM serves symmetric only."
    )
    order: Literal["natural", "group-aware", "activation"] = Field(
        default="group-aware",
        description="Order in which input channels are solved. `group-aware` has the gain of activation order with a "
        "trivial g_idx; `activation` writes desc_act, which vLLM refuses with groups.",
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Fraction of the Hessian's mean diagonal added to it; doubled, and recorded, when too little.",
    )
    scale_candidates: int = Field(
        default=20,
        ge=0,
        le=200,
        description="Shrunken ranges the scale search tries per group, weighted by the Hessian's diagonal; 0 is none.",
    )
    asymmetric: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the correction towards the unquantized model's outputs (GPTAQ); 0 is plain GPTQ and runs "
        "one stream instead of two.",
    )
    skip: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description='Name endings of linears to leave in 16 bits, such as "mlp.down_proj".',
    )


class AwqSection(Section):
    """How channels are scaled, and how GPTQ quantizes what was scaled; 4 bits with zeros is all that AWQ files hold."""

    group_size: Literal[32, 64, 128] = Field(default=128, description="Input channels per scale and zero.")
    scaling_steps: int = Field(
        default=20,
        ge=0,
        le=200,
        description="Exponents of the search for activation-aware channel scales, evenly from 0 (no scaling) to 1; 0 "
        "leaves the model's channels as they are.",
    )
    scaling_windows: int = Field(
        default=8, ge=1, description="Calibration windows the scaling search looks at, evenly spaced."
    )
    order: Literal["natural", "group-aware"] = Field(
        default="group-aware", description="Order in which input channels are solved; the file does not tell."
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Fraction of the Hessian's mean diagonal added to it; doubled, and recorded, when too little.",
    )
    scale_candidates: int = Field(
        default=20,
        ge=0,
        le=200,
        description="Shrunken ranges (clipping) tried per group, weighted by the Hessian's diagonal; 0 is none.",
    )
    skip: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description='Name endings of linears to leave in 16 bits, such as "mlp.down_proj".',
    )


QUANTIZE: dict[str, Section] = {"gptq": GptqSection(), "awq": AwqSection()}
"""Each format's table with its defaults, by the format's name."""
