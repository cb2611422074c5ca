"""ggml's block types as the stream's solver: every type that some variant needs, from one read of the weights."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import gguf
import torch
from torch import Tensor

from quantkit.calibration.statistics import HESSIAN, SQUARES, Statistics
from quantkit.channels import by_channel
from quantkit.costs import FLOAT_BYTES, Cost, Shape, StageWork
from quantkit.grids.block_bytes import encode, pack
from quantkit.grids.blocks import TYPES, BlockType
from quantkit.grids.encoded import EncodedGrid, as_floats
from quantkit.machine import pieces_at_a_time, share_rows
from quantkit.progress import timed
from quantkit.qtensor import Importance, LinearFacts, QuantizedLinear
from quantkit.solvers import ggml
from quantkit.solvers.block_gptq import solve_blocks
from quantkit.solvers.gptq import FACTORISE, PANEL, Factor, factorize, feedback_cost, output_energy
from quantkit.solvers.refine import Sweeps, refine_operations

DENSE = ("F16", "BF16")
SWEPT_BITS = 3  # of more a sweep gains 2 or 3 %, for twice the products of GPTQ itself
SEARCHED_BYTES = 64 * 1024**2  # a piece's rows that are searched together, several times over


@dataclass(frozen=True)
class BlockSolver:
    """Searches each type's scales on the weights, or lets GPTQ choose codes with them.

    Attributes:
        types: the ggml types that a linear is needed in, by its full name and its row length; the first is the one
            that a stream goes on with.
        weighted: collect the mean squares of the inputs, weight errors by them and hand them on.
        damping: of GPTQ, see `quantkit.solvers.gptq.factorize`; None searches on the weights alone.
        sweeps: times that GPTQ chooses every code again, where codes have few bits.
        with_ggml: ggml's own encoder makes every type, not only those that ours does not make, and errors of what has
            no input are weighted as it does.
    """

    types: Callable[[str, int], tuple[str, ...]]
    weighted: bool
    damping: float | None = None
    sweeps: int = 0
    with_ggml: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(
            name for name, wanted in ((SQUARES, self.weighted), (HESSIAN, self.damping is not None)) if wanted
        )

    def solve(
        self, weights: dict[str, Tensor], statistics: Statistics
    ) -> Iterator[tuple[str, QuantizedLinear, LinearFacts]]:
        """Solved linears, one by one; see `quantkit.solvers.contract.Solver`."""
        # an embedding has no input whose squares could weigh its columns
        seen = statistics.num_tokens
        mean_I = _published(statistics.mean_square(), seen) if self.weighted and seen else None
        importance = None if mean_I is None else Importance(mean_I, seen)
        factors: dict[int, Factor] = {}
        swept: dict[tuple[int, int], Sweeps | None] = {}
        spent: dict[str, float] = {}
        for name, weight_OI in weights.items():
            started = time.perf_counter()
            solved, loss = [], None
            for kind in self.types(name, weight_OI.shape[1]):
                if kind in DENSE:
                    solved.append(QuantizedLinear(*as_floats(weight_OI, kind, where=name)))
                elif self.with_ggml or kind not in TYPES:
                    solved.append(QuantizedLinear(*ggml.encode(weight_OI, kind, mean_I, where=name)))
                elif self.damping is None or not seen:
                    given_I = self._weights(weight_OI, mean_I)
                    solved.append(QuantizedLinear(*encode(weight_OI, TYPES[kind], given_I, where=name)))
                else:
                    with timed(spent, FACTORISE):
                        factor = self._factor(factors, statistics, TYPES[kind], name)
                    sweeps = self._sweeps(swept, statistics, factor, TYPES[kind])
                    working_OI = weight_OI.to(factor.upper_II.dtype)
                    encoded_OY, lost = solve_by_rows(working_OI, factor, TYPES[kind], sweeps, where=name)
                    solved.append(QuantizedLinear(encoded_OY, EncodedGrid(kind)))
                    if loss is None:
                        energy = output_energy(
                            by_channel(working_OI, factor.order_I), factor.upper_II, min(PANEL, TYPES[kind].block)
                        )
                        loss = lost / energy if energy else 0.0
            damping = max((factor.damping for factor in factors.values()), default=None)
            facts = LinearFacts(name, loss, damping, time.perf_counter() - started, spent.pop(FACTORISE, 0.0))
            # no variable holds them on while the next is solved
            yield name, replace(solved[0], others=tuple(solved[1:]), importance=importance), facts

    def cost(self, work: StageWork) -> Cost:
        """With GPTQ one factor for each size of block, and feedback for each type of ours; else a search.

        Of a search the bytes in all types are there, once as they are found and once as they are written.
        """
        encoded = max((self._encoded_bytes(shape) for shape in work.shapes), default=0)
        found = Cost(memory_bytes=SEARCHED_BYTES * pieces_at_a_time() + 2 * encoded)
        if self.damping is None or not work.tokens:
            return found
        solved = [(shape, kind) for shape in work.shapes for kind in self.types(shape.name, shape.columns)]
        solved = [(shape, kind) for shape, kind in solved if kind in TYPES]
        sizes = {TYPES[kind].block for _, kind in solved}
        gptq = feedback_cost(replace(work, shapes=tuple(shape for shape, _ in solved)), factors=len(sizes))
        swept = sum(
            self._times(TYPES[kind]) * refine_operations(shape.rows, shape.columns, TYPES[kind].block)
            for shape, kind in solved
        )
        # sweeps go by the Hessian in the order that the blocks are visited in
        ordered = len({TYPES[kind].block for _, kind in solved if self._times(TYPES[kind])}) * work.columns**2
        operations = (gptq + Cost({"solve": swept})).operations
        return Cost(operations, gptq.memory_bytes + ordered * FLOAT_BYTES + found.memory_bytes)

    def _encoded_bytes(self, shape: Shape) -> int:
        types = self.types(shape.name, shape.columns)
        sizes = [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] for kind in types]
        return sum(shape.size // block * block_bytes for block, block_bytes in sizes)

    def _factor(self, factors: dict[int, Factor], statistics: Statistics, kind: BlockType, name: str) -> Factor:
        """The Hessian's factor for blocks of this size, made once."""
        if kind.block not in factors:
            assert self.damping is not None, "GPTQ has a damping"
            # blocks stay where they are in the row; visited by importance, and so are their columns
            factors[kind.block] = factorize(
                statistics.hessian(), order="group-aware", group_size=kind.block, damping=self.damping, where=name
            )
        return factors[kind.block]

    def _sweeps(
        self, swept: dict[tuple[int, int], Sweeps | None], statistics: Statistics, factor: Factor, kind: BlockType
    ) -> Sweeps | None:
        """With the Hessian in the order of blocks of this size, put in order once."""
        key = kind.block, self._times(kind)
        if key not in swept:
            swept[key] = Sweeps.of(self._times(kind), statistics.hessian(), factor.order_I, factor.damping)
        return swept[key]

    def _times(self, kind: BlockType) -> int:
        return self.sweeps if kind.bits <= SWEPT_BITS else 0

    def _weights(self, weight_OI: Tensor, mean_I: Tensor | None) -> Tensor | None:
        """Even weights for what has no input: ggml's own would be the weights' squares, which large columns rule."""
        if mean_I is None and self.weighted:
            return torch.ones(weight_OI.shape[1], device=weight_OI.device)
        return mean_I


def solve_by_rows(
    weight_OI: Tensor, factor: Factor, kind: BlockType, sweeps: Sweeps | None, *, where: str
) -> tuple[Tensor, float]:
    """A linear's bytes [O, Y] by GPTQ, and what is lost, tr(E H E^T): some rows on each thread of a CPU."""

    def solve(weight_RI: Tensor) -> tuple[Tensor, float]:
        codes_RI, grid, lost = solve_blocks(weight_RI, factor, kind, sweeps=sweeps, where=where)
        return pack(codes_RI, grid), lost

    encoded, lost = zip(*share_rows(solve, weight_OI), strict=True)
    return torch.cat(encoded), sum(lost)


def _published(mean_I: Tensor, tokens: int) -> Tensor:
    """The means as a reader of the published matrix finds them: it holds float32 sums."""
    return mean_I.float() * tokens / tokens
