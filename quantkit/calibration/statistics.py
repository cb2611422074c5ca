"""What a solver wants to know about the inputs of a linear, summed over calibration tokens.

Shape legend: N tokens, O out features, I in features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from quantkit.costs import FLOAT_BYTES, Cost, StageWork
from quantkit.machine import needs_widening
from quantkit.ranks import ALONE, Ranks, owners

HESSIAN = "hessian"
DEVIATION = "deviation"
SQUARES = "squares"
ACTIVATIONS = "activations"  # no sum: the forward pass itself
BLOCK = 512  # of a symmetric sum; what lies above the diagonal blocks is not computed


class Statistics:
    """Running sums over the inputs of linears that read the same tensor.

    Args:
        needs: which sums to keep: "hessian" (sum of x x^T, float32 [I, I]), "deviation" (sum of (x' - x) x^T with
            x' the same token's input in the unquantized stream, float32 [I, I]; asked for together with "hessian"),
            "squares" (sum of x^2, float32 [I]). Float64 inputs are summed in float64.
        ranks: who keep them together, each its own parts of the sums over all tokens, until `complete`.
        weights: [O, I] of the linears that are solved from them; where `narrow`, what is kept of the deviation is
            its product with the only one.
        every: of each batch, one window in so many is known of the unquantized stream, the first among them; the
            deviation is made of these, as if it were of all.
    """

    def __init__(
        self, needs: frozenset[str], ranks: Ranks = ALONE, weights: Sequence[Tensor] = (), every: int = 1
    ) -> None:
        self.needs = needs
        self.every = every
        self.ranks = ranks
        self._weight_OI = weights[0] if narrow([(len(weight), weight.shape[1]) for weight in weights]) else None
        self.num_tokens = self._num_compared = 0
        self._is_complete = False
        self._sums: dict[str, Tensor] = {}

    def add(self, inputs: Tensor, exact_inputs: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            inputs: [B, ..., I], what the linear reads in the stream being quantized.
            exact_inputs: the same of `inputs[::every]` in the unquantized stream; needed for "deviation" only.
        """
        x_NI = _multipliable(inputs.flatten(0, -2))
        self.num_tokens += x_NI.shape[0]
        width = x_NI.shape[1]
        part_owners = self._owners(width)
        with _exact_bfloat16_products(inputs.dtype):
            if HESSIAN in self.needs:
                total_II = self._total(HESSIAN, x_NI, width)
                for start in range(0, width, BLOCK):
                    if part_owners[start] != self.ranks.rank:
                        continue
                    stop = min(start + BLOCK, width)
                    _add_product(total_II[start:stop, :stop], x_NI[:, start:stop], x_NI[:, :stop])
            if DEVIATION in self.needs:
                assert exact_inputs is not None, "the unquantized stream was not run"
                compared_NI = _multipliable(inputs[:: self.every].flatten(0, -2))
                self._num_compared += len(compared_NI)
                total_RI = self._total(DEVIATION, x_NI, width if self._weight_OI is None else len(self._weight_OI))
                if part_owners[DEVIATION] == self.ranks.rank:
                    # in bfloat16 the difference is rounded, by a share of what moved
                    moved_NI = torch.sub(exact_inputs.flatten(0, -2), compared_NI).to(compared_NI.dtype)
                    _add_product(
                        total_RI, moved_NI if self._weight_OI is None else self._made_of(moved_NI), compared_NI
                    )
        if SQUARES in self.needs:
            total_I = torch.cat([_sum_of_squares(part_NB) for part_NB in x_NI.split(BLOCK, dim=1)])
            self._sums[SQUARES] = self._sums[SQUARES] + total_I if SQUARES in self._sums else total_I

    def complete(self) -> None:
        """Make of what was added the sums that are asked for; all ranks come here once, after the last batch."""
        assert not self._is_complete, "it is done once"
        self._is_complete = True
        if not self._sums:
            return
        width = next(iter(self._sums.values())).shape[-1]
        for part, owner in self._owners(width).items():
            own = (
                self._sums[HESSIAN][part : part + BLOCK, : part + BLOCK] if isinstance(part, int) else self._sums[part]
            )
            self.ranks.share(own, owner)
        if HESSIAN in self._sums:
            total_II = self._sums[HESSIAN]
            for start in range(0, width, BLOCK):
                stop = start + BLOCK
                total_II[start:stop, stop:] = total_II[stop:, start:stop].t()
        if DEVIATION in self._sums and self._num_compared < self.num_tokens:
            self._sums[DEVIATION] *= self.num_tokens / self._num_compared

    def mean_square(self) -> Tensor:
        """The mean of x^2, [I]."""
        return self._sums[SQUARES] / self.num_tokens

    def hessian(self) -> Tensor:
        """The sum of x x^T, [I, I]; once complete."""
        assert self._is_complete, "a part of the sum is still missing"
        return self._sums[HESSIAN]

    def deviation(self) -> Tensor:
        """The sum of (x' - x) x^T, [I, I], or where `narrow` that of W (x' - x) x^T, [O, I]; once complete."""
        assert self._is_complete, "a part of the sum is still missing"
        return self._sums[DEVIATION]

    def _made_of(self, moved_NI: Tensor) -> Tensor:
        """W (x' - x), [N, O], in the dtype of the products."""
        assert self._weight_OI is not None
        return moved_NI @ self._weight_OI.to(moved_NI.dtype).t()

    def _total(self, name: str, like_NI: Tensor, rows: int) -> Tensor:
        if name not in self._sums:
            dtype = torch.promote_types(like_NI.dtype, torch.float32)
            self._sums[name] = torch.zeros((rows, like_NI.shape[1]), dtype=dtype, device=like_NI.device)
        return self._sums[name]

    def _owners(self, width: int) -> dict[int | str, int]:
        rows = None if self._weight_OI is None else len(self._weight_OI)
        return _owners(self.needs, width, rows, self.ranks.size)


def narrow(shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether linears of these shapes are a single one, [O, I], with less than half as many outputs as inputs.

    Then the product of its weight with the deviation, all that a solver wants of that, is summed itself as
    W (x' - x) x^T: 4 O I operations a token instead of 2 I^2, and O I numbers instead of I^2.
    """
    return len(shapes) == 1 and 2 * shapes[0][0] < shapes[0][1]


@cache
def _owners(needs: frozenset[str], width: int, narrow_rows: int | None, ranks: int) -> dict[int | str, int]:
    """Who sums what: blocks of rows of the symmetric sum, by their first row, and the other as a whole.

    Squares are no work, and everybody's.
    """
    costs: dict[int | str, float] = {}
    if HESSIAN in needs:
        costs |= {start: BLOCK * min(start + BLOCK, width) for start in range(0, width, BLOCK)}
    if DEVIATION in needs:
        costs[DEVIATION] = width * (width if narrow_rows is None else 2 * narrow_rows)
    return dict(zip(costs, owners(list(costs.values()), ranks), strict=True))


def cost(needs: frozenset[str], work: StageWork) -> Cost:
    """What collecting statistics of one input takes; of a symmetric sum half counts."""
    if not (work.tokens and work.shapes):
        return Cost()
    square = work.columns**2
    operations, numbers = 0.0, 0
    if HESSIAN in needs:
        operations, numbers = operations + square * work.tokens, numbers + square
    if DEVIATION in needs and work.narrow:
        operations, numbers = operations + 4.0 * work.largest * work.compared, numbers + work.largest
    elif DEVIATION in needs:
        operations, numbers = operations + 2.0 * square * work.compared, numbers + square
    return Cost({"statistics": operations} if numbers else {}, numbers * FLOAT_BYTES)


def _multipliable(x_NI: Tensor) -> Tensor:
    """As it is where torch has a product that takes bf16 and sums in float32; else bf16 in float32's clothes."""
    return x_NI if x_NI.is_cuda else x_NI.to(torch.promote_types(x_NI.dtype, torch.float32))


def _sum_of_squares(x_NB: Tensor) -> Tensor:
    """Over tokens, [B] of some columns, in float32 at least: a wide copy of all columns would be a batch's largest."""
    return x_NB.to(torch.promote_types(x_NB.dtype, torch.float32)).square().sum(0)


@contextmanager
def _exact_bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Let the CPU's bf16 units multiply float32 matrices that hold bf16 values: the same products, summed in float32.

    Where they are no faster nothing changes.

    Args:
        dtype: what the values were computed in; nothing changes for another than bfloat16, whose values would be cut.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype == torch.bfloat16 and not needs_widening(torch.device("cpu"), dtype):
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _add_product(total: Tensor, left_NI: Tensor, right_NI: Tensor) -> None:
    """Add left^T right to `total`, summed in the total's dtype."""
    if left_NI.dtype == total.dtype:
        total.addmm_(left_NI.t(), right_NI)
    else:
        # tensor cores multiply bf16 exactly; only the sum is rounded, in float32
        total += torch.mm(left_NI.t(), right_NI, out_dtype=torch.float32)
