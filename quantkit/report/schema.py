"""What a record holds, as closed classes: the schema that docs publish, and the check of every record that is read."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Field(pattern=r"^[0-9a-f]{64}$")


class Part(BaseModel):
    """A table of the record: closed, so that a key without a meaning here is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Output(Part):
    """A file of the artifact. The record itself, the card and the signature are not among them."""

    name: str = Field(description="Path below the artifact's folder.")
    size_bytes: int = Field(ge=0)
    sha256: str = Sha256


class SourceFacts(Part):
    """The dense checkpoint that was quantized."""

    id: str = Field(description="Hub id, `bielik-nano`, or the name of a local folder.")
    revision: str | None = Field(description="Commit on the Hub, where it is from there.")
    on_hub: bool
    license: str | None = Field(description="As the source's own model card states it; null where it states none.")
    license_name: str | None = Field(description="Of a licence that the Hub has no name for.")
    license_link: str | None
    sha256: dict[str, str] = Field(
        description="Of every file that goes into the artifact, by name: weights, configuration, tokenizer, licence."
    )


class CalibrationText(Part):
    """A text set that statistics were collected on."""

    name: str
    sha256: str = Sha256
    revision: str | None = Field(description="Commit of the data set, where it is from the Hub.")
    windows: int = Field(ge=0)


class CalibrationFacts(Part):
    """The tokens that statistics were collected on."""

    texts: list[CalibrationText]
    window_tokens: int
    seed: int
    tokens_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the token ids, window by window.")


class Environment(Part):
    """What it was made with and on; nothing tells whose machine it was."""

    versions: dict[str, str] = Field(description="Of quantkit and of every package whose change may change bytes.")
    commit: str | None = Field(description="Commit of quantkit's checkout, `-dirty` if changed; null for a wheel.")
    python: str
    system: str
    device: Literal["cpu", "cuda"]
    device_model: str = Field(description="Model name of the GPU, or of the CPU with its vector instructions.")
    threads: int
    cuda: str | None = Field(description="CUDA version of torch, where it computed on a GPU.")
    driver: str | None = Field(description="Version of the GPU's driver, where it computed on a GPU.")
    ranks: int = Field(default=1, ge=1, description="Processes that made it together; they do not change the bytes.")


class Linear(Part):
    """One solved linear."""

    name: str
    loss: float | None = Field(description="Output error over output energy on the calibration text; null without it.")
    damping: float | None = Field(description="Fraction of the Hessian's mean diagonal that was added to it.")
    elapsed_s: float
    factorise_s: float = Field(default=0.0, description="Of these, for the factor it shares with those after it.")


class ItemFacts(Part):
    """One item of the stream: embedding, a layer, or the head."""

    linears: list[Linear]
    seconds: dict[str, float] = Field(
        description="`read` (waited for), `embed`, `load`, `prepare`, `forward` (up to the last linears' inputs), "
        "`statistics`, `factorise`, `solve`, `advance` (from there to the next layer), `pack`, `write`."
    )


class Allotment(Part):
    """How the bits of a variant were spread, where they were measured to be."""

    bits_per_weight: float = Field(description="Over the linears of the decoder layers, all that the file stores.")
    noise: float = Field(description="What the choice costs by the measurement.")
    bound: float = Field(description="No choice within the target costs less; equal to `noise` where that is proven.")


class BuildFacts(Part):
    """What the build cost, from the source on disk to the artifact; a build that was continued counts in full."""

    items: dict[str, ItemFacts]
    seconds: dict[str, float] = Field(
        description="Wall time by stage. `source`: found, fetched where need be, and hashed; `earlier runs`: of a "
        "build that was continued, up to the last that they kept."
    )
    wall_seconds: float = Field(description="Sum of the stages.")
    operations: dict[str, float] = Field(
        default={},
        description="Least floating-point operations of each stage, two for a multiply-add: products and "
        "factorizations, no searches; see docs/growth.md.",
    )
    bytes: dict[str, int] = Field(
        default={}, description="`read`: of the source's weights; `written`: of the artifact."
    )
    peak_memory_bytes: dict[str, int] = Field(
        description="`host`: resident; `device`: of the GPU's tensors; `engine`: resident, of the largest process of "
        "an upstream package."
    )
    allotments: dict[str, Allotment] = Field(default={}, description="By variant, for a format that measures first.")


class AnswerFacts(Part):
    """The greedy answer to the recipe's prompt."""

    text: str
    num_tokens: int
    finite: bool
    repeats: bool


class ReferenceFigures(Part):
    """The source's own figures."""

    ppl_per_token: float
    ppl_per_word: float
    bits_per_byte: float
    answer: AnswerFacts | None


class Result(Part):
    """What one runtime made of a variant; the figures are there where `status` is `ok`."""

    runtime: str
    status: Literal["ok", "not run", "failed"]
    reason: str
    ppl_per_token: float | None = None
    ppl_per_word: float | None = None
    bits_per_byte: float | None = None
    ratio: float | None = Field(default=None, description="Perplexity over the reference's.")
    mean_kld: float | None = Field(default=None, description="Nats per token.")
    p99_kld: float | None = None
    top1_agreement: float | None = None
    seconds: float | None = None
    answer: AnswerFacts | None = None
    package: str | None = Field(default=None, description="Of the engine that ran it.")
    version: str | None = None


class Verdict(Part):
    """Whether the gates were passed."""

    passed: bool
    failures: list[str]


class JudgedVariant(Part):
    """A variant and how good it is."""

    name: str
    files: list[str]
    bits_per_weight: float
    size_bytes: int
    results: list[Result]
    gate: Verdict


class JudgedPart(Part):
    """A text set that it was judged on."""

    name: str
    sha256: str = Sha256
    revision: str | None = Field(description="Commit of the data set, where it is from the Hub.")
    windows: int = Field(ge=0)
    sampled: bool = Field(description="The windows are a sample of the set, not all of it.")


class JudgedText(Part):
    """The text it was judged on."""

    name: str
    sha256: str = Sha256
    documents: int
    tokens: int
    words: int
    bytes: int
    parts: list[JudgedPart] = Field(default=[], description="The text sets that it is made of.")


class Validation(Part):
    """The document of `quantkit validate --json`."""

    artifact: str
    format: str
    engine: str
    text: JudgedText
    reference: ReferenceFigures
    variants: list[JudgedVariant]
    gate: Verdict


class ValidationText(Part):
    """A text set that the recipe is judged by, and no other counts for its gates."""

    name: str
    sha256: str | None = Field(description="Null for a set of the Hub that was not read yet.")


class Published(Part):
    """Where a published folder was put, and what of the artifact it does not hold."""

    repo: str
    revision: str = Field(description="Branch.")
    left_out: dict[str, list[str]] = Field(description="Variants that did not pass, with the reasons.")
    pictures: list[str] = Field(description="Plots of the report that the card shows.")


class EngineFacts(BaseModel):
    """The upstream package that quantized, and whatever else its runner tells of itself."""

    model_config = ConfigDict(extra="allow", frozen=True)
    package: str
    version: str


class Record(Part):
    """`quantkit.json`: where every byte of an artifact came from, and how good the result is."""

    schema_: Literal[2] = Field(alias="schema")
    format: str
    engine: str = Field(description="`quantkit`, or the upstream package that quantized.")
    recipe: dict[str, Any] = Field(description="Every key resolved; `quantkit recipes schema` describes it.")
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of `identity`.")
    identity: dict[str, Any] = Field(description="Everything that decides the bytes.")
    source: SourceFacts
    chat: str | None = Field(description="The recipe's prompt as the source's chat template writes it; null without.")
    calibration: CalibrationFacts | None = Field(description="Null where no text was read.")
    environment: Environment
    engine_facts: EngineFacts | None
    reproducible: bool = Field(description="The same identity gives the same bytes.")
    variants: dict[str, list[str]] = Field(description="Weight files of each variant.")
    outputs: list[Output]
    build: BuildFacts
    validation_texts: list[ValidationText] | None = Field(
        default=None, description="The texts that the recipe names, by their content: the gates hold on them alone."
    )
    validation: Validation | None
    published: Published | None = Field(
        default=None, description="Of a folder as it is on the Hub; variants, files and validation are those there."
    )
    card_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of README.md, which is drawn from the record.")
    seal: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the record without this key, as JSON with sorted keys and no spaces: tells of an edit.",
    )


def record_schema() -> dict[str, Any]:
    """JSON Schema of a record."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Record.model_json_schema(by_alias=True)
