"""The [quantize] table of a recipe: one closed class per format, and the table that names them."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A table of a recipe: frozen, strictly typed, closed; its numbers are finite, as JSON's are."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    files: ClassVar[tuple[str, ...]] = ()
    """Keys that name local files."""


# keys that several formats have
Damping = Annotated[
    float,
    Field(
        gt=0,
        lt=1,
        description="Fraction of the Hessian's mean diagonal added to it; doubled, and recorded, when too little.",
    ),
]
ScaleCandidates = Annotated[
    int,
    Field(
        ge=0,
        le=200,
        description="Shrunken ranges the scale search tries per group, weighted by the Hessian's diagonal, with scales "
        "of either sign on symmetric grids; 0 is none.",
    ),
]
Asymmetric = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Share of the correction towards the unquantized model's outputs (GPTAQ); 0 is plain GPTQ and runs "
        "one stream instead of two.",
    ),
]
AsymmetricEvery = Annotated[
    int,
    Field(
        ge=1,
        le=64,
        description="Of each batch, one window in so many goes through the unquantized model for that; 1 is all.",
    ),
]
RefineSweeps = Annotated[
    int,
    Field(
        ge=0,
        le=20,
        description="Times that GPTQ's scales and codes are chosen again, each knowing all others; 0 is GPTQ alone.",
    ),
]
# every name ends in an empty one
Ending = Annotated[str, Field(min_length=1)]
Skip = Annotated[
    tuple[Ending, ...],
    Field(
        strict=False,
        description='Name endings of linears to leave in 16 bits, such as "mlp.down_proj".',
    ),
]


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
    damping: Damping = 0.01
    scale_candidates: ScaleCandidates = 10
    asymmetric: Asymmetric = 0.5
    asymmetric_every: AsymmetricEvery = 2
    refine_sweeps: RefineSweeps = 1
    skip: Skip = ()


class HqqSection(Section):
    """How weights are put on grids with float zeros."""

    bits: Literal[2, 3, 4, 8] = Field(default=3, description="Bits per code.")
    group_size: Literal[16, 32, 64, 128] = Field(
        default=64, description="Weights per scale and zero; 3 bits with 64 are 3.7 bits per weight."
    )
    axis: Literal[0, 1] = Field(
        default=1, description="1 groups inputs of a row, which fast kernels need; 0 groups rows of a column."
    )
    solver: Literal["least-squares", "half-quadratic", "gptq"] = Field(
        default="least-squares",
        description="`least-squares` and `half-quadratic` (HQQ's own, p = 0.7) see the weights alone; `gptq` lets GPTQ "
        "choose codes on the same grid from calibration text (axis 1 only).",
    )
    scale_candidates: int = Field(
        default=0,
        ge=0,
        le=200,
        description="Shrunken ranges the scale search tries per group beside the full one; of `gptq` 5 where nothing "
        "is said.",
    )
    refine_sweeps: RefineSweeps = 1
    qmodel_pt: bool = Field(
        default=False, description="Also write `qmodel.pt`, the pickle that hqq's own `from_quantized` opens."
    )
    skip: Skip = ()

    @model_validator(mode="before")
    @classmethod
    def _gptq_tries_ranges(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("solver") == "gptq":
            return {"scale_candidates": 5} | given
        return given

    @model_validator(mode="after")
    def _gptq_needs_rows(self) -> "HqqSection":
        if self.solver == "gptq" and self.axis == 0:
            raise ValueError('solver = "gptq" needs axis = 1: GPTQ goes through the inputs of a row')
        return self


class MlxSection(Section):
    """How every matrix, embedding and head included, is put on grids of scale and bias."""

    bits: Literal[2, 3, 4, 5, 6, 8] = Field(default=4, description="Bits per code, where `mixed` says nothing else.")
    group_size: Literal[32, 64, 128] = Field(default=64, description="Input channels per scale and bias.")
    mixed: Literal["none", "mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"] = Field(
        default="none",
        description="mlx-lm's mixtures of low and high bits: the head, and v_proj and down_proj of the first and last "
        "eighth and every third layer between get the high ones.",
    )
    solver: Literal["gptq", "least-squares", "round-to-nearest"] = Field(
        default="gptq",
        description="`gptq` chooses codes from calibration text; the others see the weights alone, `round-to-nearest` "
        "as `mx.quantize` does. The embedding has no calibration and gets least squares with `gptq`.",
    )
    scale_candidates: int = Field(
        default=5,
        ge=0,
        le=200,
        description="Shrunken ranges the scale search of `gptq` tries per group beside the full one.",
    )
    refine_sweeps: RefineSweeps = 1
    dtype: Literal["float16", "bfloat16"] = Field(
        default="float16", description="Of scales, biases and what stays dense; float16 keeps scales finer."
    )
    skip: tuple[Ending, ...] = Field(
        default=(), strict=False, description='Name endings of matrices to leave in 16 bits, such as "lm_head".'
    )


FileType = Literal[
    "F16", "BF16", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1",
    "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS",
    "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS",
]  # fmt: skip
I_QUANTS = "IQ"
"""How the names of the file types begin that only ggml's encoder makes."""
NEED_IMPORTANCE = ("Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS")
"""File types that llama-quantize refuses without an importance matrix."""


class GgufSection(Section):
    """Which GGUF files are written, and what they say of the model."""

    types: tuple[FileType, ...] = Field(
        default=("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
        strict=False,
        min_length=1,
        description="File types, one file each; llama-quantize's mixtures of tensor types.",
    )
    imatrix: bool = Field(
        default=True,
        description="Weight errors by the mean squares of the inputs, collected on the calibration text, and publish "
        'them as a file. Several types need `calibration.activations = "float"`.',
    )
    imatrix_dat: bool = Field(
        default=False, description="Publish the importance matrix in llama.cpp's older form too, `.imatrix.dat`."
    )
    solver: Literal["search", "gptq"] = Field(
        default="search",
        description="`search` chooses scales and codes on the weights; `gptq` lets GPTQ choose the codes, with scales "
        "searched block by block. The embedding has no calibration and is always searched.",
    )
    damping: float = Field(
        default=0.01, gt=0, lt=1, description="Of `gptq`: fraction of the Hessian's mean diagonal added to it."
    )
    refine_sweeps: int = Field(
        default=1,
        ge=0,
        le=20,
        description="Of `gptq`: times that codes of 2 and 3 bits are chosen again, each knowing all others; 0 is GPTQ "
        "alone.",
    )
    encoder: Literal["quantkit", "ggml"] = Field(
        default="quantkit",
        description="Who searches: our own encoder, or ggml's of the installed engine `llama-cpp`, whose bytes are "
        "those of llama-quantize. The I-quants are always ggml's and need the engine, beside other types of ours.",
    )
    name: str = Field(
        default="model",
        pattern=r"^[\w+-][\w.+-]*$",
        max_length=200,
        description="Model name in the files and of the files, `<name>.<type>.gguf`.",
    )
    shard_gb: float = Field(
        default=45.0,
        gt=0,
        description="Most gigabytes of weights in one file; what has more is split as gguf-split does "
        "(`-00001-of-00002`). The Hub takes files of 50.",
    )
    ollama: bool = Field(
        default=True,
        description="Write `Modelfile`, `template`, `params` and, if it is given, `system` for Ollama, where the model "
        "has a chat template.",
    )
    system: str | None = Field(default=None, description="System turn that Ollama gives the model by default.")
    license: str | None = Field(default=None, description="Licence that the files state.")
    languages: tuple[str, ...] = Field(
        default=("pl",), strict=False, description="ISO 639-1 codes that the files state."
    )
    base_model: str | None = Field(default=None, description="`org/name` on the Hub that the files state.")
    quantized_by: str | None = Field(default=None, description="Organization that the files name.")

    @model_validator(mode="after")
    def _types_can_be_made(self) -> "GgufSection":
        if self.encoder == "ggml" and self.solver == "gptq":
            raise ValueError('encoder = "ggml" has no GPTQ: leave solver = "search"')
        if len(set(self.types)) < len(self.types):
            raise ValueError("types are file types, each once")
        if not self.imatrix and (found := [name for name in self.types if name in NEED_IMPORTANCE]):
            raise ValueError(f"{', '.join(found)} need imatrix = true")
        if self.system and '"""' in self.system:
            raise ValueError('system may not hold """, which ends it in a Modelfile')
        return self


class AwqSection(Section):
    """How channels are scaled, and how what was scaled is quantized; 4 bits with zeros is all that AWQ files hold."""

    group_size: Literal[32, 64, 128] = Field(default=128, description="Input channels per scale and zero.")
    solver: Literal["gptq", "round-to-nearest"] = Field(
        default="gptq",
        description="Who chooses codes once channels are scaled: `gptq`, or rounding on clipped ranges, as AWQ itself "
        "does (`round-to-nearest`).",
    )
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
        default="group-aware",
        description="Of `gptq`: order in which input channels are solved; the file does not tell.",
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Of `gptq`: fraction of the Hessian's mean diagonal added to it; doubled, and recorded, when too "
        "little.",
    )
    scale_candidates: int = Field(
        default=20,
        ge=0,
        le=200,
        description="Shrunken ranges (clipping) tried per group: weighted by the Hessian's diagonal with `gptq`, by "
        "what the group adds to the output with `round-to-nearest`; 0 is none.",
    )
    asymmetric: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Of `gptq`: share of the correction towards the unquantized model's outputs (GPTAQ); 0 is plain "
        "GPTQ and runs one stream instead of two.",
    )
    asymmetric_every: AsymmetricEvery = 2
    refine_sweeps: RefineSweeps = 1
    skip: Skip = ()


class CompressedTensorsSection(Section):
    """How GPTQ quantizes for compressed-tensors, the container of llm-compressor and vLLM."""

    bits: Literal[4, 8] = Field(default=4, description="Bits per code.")
    group_size: Literal[-1, 32, 64, 128] = Field(
        default=128, description="Input channels per scale; -1 is one scale per row."
    )
    symmetric: bool = Field(default=True, description="Fix the zero point in the middle of the codes.")
    order: Literal["natural", "group-aware"] = Field(
        default="group-aware", description="Order in which input channels are solved; the file does not tell."
    )
    damping: Damping = 0.01
    scale_candidates: ScaleCandidates = 10
    asymmetric: Asymmetric = 0.5
    asymmetric_every: AsymmetricEvery = 2
    refine_sweeps: RefineSweeps = 1
    dtype: Literal["bfloat16", "float16"] = Field(
        default="bfloat16", description="Of scales and of what is not quantized; bfloat16 keeps a bf16 source as it is."
    )
    skip: Skip = ()


class Exl2Section(Section):
    """Which sizes are written, and how mixtures are measured and solved."""

    bits: tuple[float, ...] = Field(
        default=(4.0,),
        strict=False,
        min_length=1,
        description="Targets of bits per weight over the linears of the decoder layers, scales and tables included; "
        'one folder each. Several need `calibration.activations = "float"`.',
    )
    head_bits: Literal[2, 3, 4, 5, 6, 8] = Field(default=6, description="About so many bits for the head.")
    damping: Damping = 0.01
    scale_candidates: int = Field(
        default=12, ge=1, le=200, description="Scales tried per column and group, weighted by the Hessian's diagonal."
    )
    refine_sweeps: int = Field(
        default=1,
        ge=0,
        le=20,
        description="Times that GPTQ's codes are chosen again, each knowing all others; 0 is GPTQ alone.",
    )
    measure_tokens: int = Field(
        default=512,
        ge=4,
        description="Tokens that options are compared on, the beginnings of four calibration windows.",
    )
    measurement: str | None = Field(
        default=None,
        description="Path of a measurement.json of the same model or of one that it was tuned from, quantkit's or "
        "exllamav2's: widths are then allotted by it, and nothing is measured.",
    )
    files: ClassVar[tuple[str, ...]] = ("measurement",)

    @field_validator("bits")
    @classmethod
    def _distinct(cls, bits: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(bits)) < len(bits) or min(bits) < 2 or max(bits) > 8:
            raise ValueError("targets lie between 2 and 8, each once")
        return tuple(sorted(bits))


QUANTIZE: dict[str, Section] = {
    "awq": AwqSection(),
    "compressed-tensors": CompressedTensorsSection(),
    "gptq": GptqSection(),
    "hqq": HqqSection(),
    "mlx": MlxSection(),
    "gguf": GgufSection(),
    "exl2": Exl2Section(),
}
"""Each format's table with its defaults, by the format's name."""
