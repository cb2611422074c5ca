"""The inner loops as plain torch, on any device: what the compiled ones are held against."""

from itertools import chain, repeat

import torch
from torch import Tensor

from quantkit.kernels.levels import CODES_PER_RUN, SMALLEST_STEP, Levels


def solve_panel(
    weight_PO: Tensor, feedback_PO: Tensor, upper_PP: Tensor, levels: Levels, codes_PO: Tensor, error_PO: Tensor
) -> Tensor:
    """See `quantkit.kernels.solve_panel`."""
    lost_O = torch.zeros_like(weight_PO[0])
    for i, weight_O in enumerate(weight_PO):
        pull_O = feedback_PO[i] + error_PO[:i].t() @ upper_PP[:i, i]
        code_O = levels.encode(torch.addcdiv(weight_O, pull_O, upper_PP[i, i]), i)
        codes_PO[i] = code_O
        torch.sub(weight_O, levels.decode(code_O, i), out=error_PO[i])
        lost_O += torch.addcmul(pull_O, error_PO[i], upper_PP[i, i]).square_()
    return lost_O


def rounding_errors(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, zero_CO: Tensor, top: int) -> Tensor:
    """See `quantkit.kernels.rounding_errors`."""
    error_CO = torch.empty_like(scale_CO)
    ratio_IO, nearest_IO = torch.empty_like(weight_IO), torch.empty_like(weight_IO)
    for scale_O, zero_O, error_O in zip(scale_CO, zero_CO, error_CO, strict=True):
        torch.div(weight_IO, scale_O, out=ratio_IO).add_(zero_O)
        torch.round(ratio_IO, out=nearest_IO).clamp_(0, top)
        torch.mv(ratio_IO.sub_(nearest_IO).square_().t(), importance_I, out=error_O)
    return error_CO.mul_(scale_CO.square())


def best_scales(weight_IO: Tensor, importance_I: Tensor, scale_CO: Tensor, top: int, worth_turning: float) -> Tensor:
    """See `quantkit.kernels.best_scales`."""
    usable_CO, middle_CO = torch.where(scale_CO == 0, 1.0, scale_CO), torch.full_like(scale_CO, (top + 1) // 2)
    error_O, index_O = rounding_errors(weight_IO, importance_I, usable_CO, middle_CO, top).min(0)
    if worth_turning == 0:
        return index_O
    turned_O, turned_index_O = rounding_errors(weight_IO, importance_I, -usable_CO, middle_CO, top).min(0)
    return torch.where(turned_O < error_O * worth_turning, len(scale_CO) + turned_index_O, index_O)


def code_moments(weight_IO: Tensor, importance_I: Tensor, scale_O: Tensor, zero_O: Tensor, top: int) -> Tensor:
    """See `quantkit.kernels.code_moments`."""
    ratio_IO = weight_IO / scale_O + zero_O
    code_IO = ratio_IO.round().clamp_(0, top)
    miss_IO = ratio_IO.sub_(code_IO)
    lost_O = importance_I @ miss_IO.square() * scale_O.square()
    share_I = importance_I / importance_I.sum()
    # from a code that is there: equal ones are then 0 apart, whatever the shares sum to
    apart_IO = code_IO - code_IO[0]
    code_O = share_I @ apart_IO
    apart_IO -= code_O
    together_O = share_I @ (apart_IO * miss_IO)
    return torch.stack([lost_O, code_IO[0] + code_O, share_I @ miss_IO, share_I @ apart_IO.square(), together_O])


def round_groups(weight_OI: Tensor, length: int, top: int, codes_OI: Tensor) -> tuple[Tensor, Tensor]:
    """See `quantkit.kernels.round_groups`."""
    weight_OGI = weight_OI.unflatten(1, (-1, length))
    # torch goes through either in vectors, but not through both at once
    least_OG, most_OG = weight_OGI.amin(dim=2), weight_OGI.amax(dim=2)
    step_OG = ((most_OG - least_OG) / top).clamp(min=SMALLEST_STEP)
    from_least_OG = least_OG.abs() > most_OG.abs()
    step_OG = torch.where(from_least_OG, step_OG, -step_OG)
    edge_OG = torch.where(from_least_OG, least_OG, most_OG)
    steps_OG = (edge_OG / step_OG).round()
    step_OG = torch.where(steps_OG != 0, edge_OG / steps_OG, step_OG)
    low_OG = torch.where(steps_OG != 0, edge_OG, 0.0)
    ratio_OGI = weight_OGI.sub(low_OG[..., None]).div_(step_OG[..., None])
    codes_OI.copy_(ratio_OGI.round_().clamp_(0, top).flatten(1))
    return step_OG, low_OG


def squared_errors(
    weight_OI: Tensor, codes_OI: Tensor, step_OG: Tensor, shift_OG: Tensor, less_OG: Tensor
) -> tuple[Tensor, Tensor]:
    """See `quantkit.kernels.squared_errors`."""
    step, shift, less = (part_OG.unsqueeze(2) for part_OG in (step_OG, shift_OG, less_OG))
    decoded_OGI = codes_OI.float().unflatten(1, (step_OG.shape[1], -1)).sub_(shift).mul_(step).sub_(less)
    off_OI = decoded_OGI.flatten(1).sub_(weight_OI)
    return off_OI.square_().sum().double(), weight_OI.square().sum().double()


def pack(codes_NX: Tensor, bits: int) -> Tensor:
    """See `quantkit.kernels.pack`."""
    width = codes_NX.shape[1]
    runs = codes_NX.unflatten(0, (-1, CODES_PER_RUN))
    words = torch.zeros((runs.shape[0], bits, width), dtype=torch.int32, device=codes_NX.device)
    for i in range(CODES_PER_RUN):
        word, shift = divmod(i * bits, 32)
        code = runs[:, i].to(torch.int32)
        words[:, word] |= code << shift
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return words.view(-1, width)


def unpack(words_WX: Tensor, bits: int) -> Tensor:
    """See `quantkit.kernels.unpack`."""
    width = words_WX.shape[1]
    runs = words_WX.view(-1, bits, width)
    codes = torch.empty((runs.shape[0], CODES_PER_RUN, width), dtype=torch.uint8, device=words_WX.device)
    mask = 2**bits - 1
    for i in range(CODES_PER_RUN):
        word, shift = divmod(i * bits, 32)
        # the shift is arithmetic; the mask drops the copied sign bits unless the code straddles words
        code = runs[:, word] >> shift
        if shift + bits > 32:
            low_bits = 32 - shift
            code = (code & (2**low_bits - 1)) | (runs[:, word + 1] << low_bits)
        codes[:, i] = (code & mask).to(torch.uint8)
    return codes.view(-1, width)


def dequantize(
    codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `quantkit.kernels.dequantize`."""
    scale, zero = per_channel(scale_OG, group_I), per_channel(zero_OG, group_I)
    weight_OI = codes_OI.to(torch.float32, memory_format=torch.contiguous_format)
    weight_OI.view(scale.shape).sub_(zero).mul_(scale)
    return weight_OI.to(dtype)


def per_channel(values_OG: Tensor, group_I: Tensor) -> Tensor:
    """The value of every channel's group: [O, G, I / G], no copy, where groups are runs of one length; else [O, I].

    Args:
        values_OG: one per row and group.
        group_I: integers [I], the group of every channel.
    """
    groups = values_OG.shape[1]
    length = max(len(group_I) // groups, 1)
    channels_I = torch.arange(len(group_I), device=group_I.device, dtype=group_I.dtype)
    if len(group_I) == groups * length and torch.equal(group_I, channels_I // length):
        return values_OG.unsqueeze(2).expand(-1, -1, length)
    return values_OG[:, group_I.long()]


def block_errors(x_LM: Tensor, w_LM: Tensor, step_CM: Tensor, less_CM: Tensor, offset: int, top: int) -> Tensor:
    """Weighted squared error [C, M] of the nearest codes on each candidate grid; all float32.

    Args:
        x_LM, w_LM: see `quantkit.kernels.fit_ranges`.
        step_CM, less_CM: the candidates; code q stands for step * (q - offset) - less.
        offset, top: see above; the largest code.
    """
    return torch.stack(
        [_block_error(x_LM, w_LM, step_M, less_M, offset, top) for step_M, less_M in zip(step_CM, less_CM, strict=True)]
    )


def fit_ranges(
    x_LM: Tensor, w_LM: Tensor, step_CM: Tensor, less_CM: Tensor, top: int, *, signed: bool, refits: int
) -> tuple[Tensor, Tensor]:
    """See `quantkit.kernels.fit_ranges`."""
    best = step_CM[0], less_CM[0]
    error_M = _block_error(x_LM, w_LM, *best, 0, top)
    xw_LM = x_LM * w_LM
    sum_w_M, sum_x_M = w_LM.sum(0), xw_LM.sum(0)
    # codes that a fit gives may call for another fit
    for start in chain(zip(step_CM[1:], less_CM[1:], strict=True), repeat(None, refits)):
        step_M, less_M = start or best
        code_LM = _block_codes(x_LM, step_M, less_M, 0, top)
        tried = _least_squares(code_LM, w_LM, xw_LM, sum_w_M, sum_x_M, signed=signed)
        tried_M = _block_error(x_LM, w_LM, *tried, 0, top)
        better_M = tried_M < error_M
        error_M = torch.where(better_M, tried_M, error_M)
        best = torch.where(better_M, tried[0], best[0]), torch.where(better_M, tried[1], best[1])
    return best


def fit_offset(x_LM: Tensor, w_LM: Tensor, largest_M: Tensor, code_C: Tensor, offset: int, top: int) -> Tensor:
    """See `quantkit.kernels.fit_offset`."""
    xw_LM = x_LM * w_LM
    best_M, gain_M = torch.zeros_like(largest_M), torch.zeros_like(largest_M)
    for code in code_C:
        inverse_M = torch.where(largest_M == 0, 0.0, code / largest_M)
        code_LM = (x_LM * inverse_M).round_().clamp_(-offset, top - offset)
        along_M = (xw_LM * code_LM).sum(0)
        length_M = code_LM.square_().mul_(w_LM).sum(0)
        tried_M = along_M.square() / length_M
        better_M = (length_M > 0) & (tried_M > gain_M)
        gain_M = torch.where(better_M, tried_M, gain_M)
        best_M = torch.where(better_M, along_M / length_M, best_M)
    return best_M


def _least_squares(
    code_LM: Tensor, w_LM: Tensor, xw_LM: Tensor, sum_w_M: Tensor, sum_x_M: Tensor, *, signed: bool
) -> tuple[Tensor, Tensor]:
    """The step and the subtrahend [M] that fit given codes best."""
    wl_LM = w_LM * code_LM
    sum_l_M, sum_ll_M = wl_LM.sum(0), (wl_LM * code_LM).sum(0)
    sum_xl_M = (xw_LM * code_LM).sum(0)
    determinant_M = sum_w_M * sum_ll_M - sum_l_M.square()
    solvable_M = determinant_M > 1e-7 * sum_w_M * sum_ll_M
    safe_M = torch.where(solvable_M, determinant_M, 1.0)
    step_M = (sum_w_M * sum_xl_M - sum_x_M * sum_l_M) / safe_M
    less_M = (sum_l_M * sum_xl_M - sum_ll_M * sum_x_M) / safe_M
    if not signed:
        # the min that the type cannot hold is left out, and the step fitted alone
        alone_M = torch.where(sum_ll_M > 0, sum_xl_M / sum_ll_M, 0.0).clamp(min=0)
        bad_M = (less_M < 0) | ~solvable_M
        step_M, less_M = torch.where(bad_M, alone_M, step_M), torch.where(bad_M, 0.0, less_M)
    else:
        step_M = torch.where(solvable_M, step_M, 0.0)
        less_M = torch.where(solvable_M, less_M, -sum_x_M / sum_w_M)
    return step_M, less_M


def _block_codes(x_LM: Tensor, step_M: Tensor, less_M: Tensor, offset: int, top: int) -> Tensor:
    """The nearest codes less the offset; 0 where the step is."""
    inverse_M = torch.where(step_M == 0, 0.0, 1.0 / torch.where(step_M == 0, 1.0, step_M))
    return ((x_LM + less_M) * inverse_M).round_().clamp_(-offset, top - offset)


def _block_error(x_LM: Tensor, w_LM: Tensor, step_M: Tensor, less_M: Tensor, offset: int, top: int) -> Tensor:
    off_LM = _block_codes(x_LM, step_M, less_M, offset, top).mul_(step_M).sub_(less_M).sub_(x_LM)
    return off_LM.square_().mul_(w_LM).sum(0)
