"""Optimisers for filter matrices: Adam that leaves alone the rows that did not occur in a step."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from wfnet import backends
from wfnet.gate_tables import flat_matrix, side_by_side
from wfnet.services.device_copies import to_device_async
from wfnet.services.log import logger

_ROWS_AT_A_TIME = 256  # bounds the copies of rows in fp32


class RowAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba, algorithm 1) over matrices ``[K, O_i]`` that share their rows.

    A step moves only the rows that occurred in it; their moments and their step counts are their
    own. Dense Adam keeps pushing absent rows along old gradients, which costs retained accuracy as
    soon as classes outnumber the batch. Where all rows occur in every step it is ordinary Adam.

    All matrices are updated together as the one ``[K, sum O_i]`` matrix whose columns they are
    while steps are made (:func:`wfnet.gate_tables.flatten_filters`). On a CUDA device a captured
    step is one pass over the rows that occurred (:mod:`wfnet.kernels.row_adam`).

    Filters in bfloat16 have moments in bfloat16. A step is computed in fp32 and rounded
    stochastically: an update of less than half a unit in the last place, which rounding to nearest
    would lose for good, counts in the mean. The random bits are a function of row, column and the
    row's step count, so runs repeat and resume bit by bit.

    With ``shrink``, a step ends with a soft shrinkage of the rows that it moved towards their start
    (:func:`soft_shrink`), by ``lr * shrink``: entries that the gradient does not hold away from it
    lie there exactly, so their gates are exactly 1.

    Args:
        params: matrices with the same number of rows, dtype and device.
        lr, betas, eps: as in ``torch.optim.Adam``; ``lr`` may be a scalar tensor, which a captured
            CUDA graph reads anew at every replay.
        shrink: 0 for none; otherwise ``param_groups[0]["shrink"]`` may be changed from step to
            step, and be a scalar tensor as ``lr``.
        starts: where the entries of each matrix are drawn to; needed with ``shrink``.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        shrink: float = 0.0,
        starts: Sequence[float] = (),
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "shrink": shrink})
        self._params: list[nn.Parameter] = self.param_groups[0]["params"]
        first, widths = self._params[0], [p.shape[1] for p in self._params]
        self._wide = torch.promote_types(first.dtype, torch.float32)
        self._exp_avg = first.new_zeros((len(first), sum(widths)), requires_grad=False)
        self._exp_avg_sq = torch.zeros_like(self._exp_avg)
        # 8 bits of bfloat16 count to 256.
        self._steps = first.new_zeros((len(first), 1), dtype=self._wide, requires_grad=False)
        self._start: Tensor | None = None  # [sum O_i]; None: nothing shrinks
        if shrink:
            columns = [s for s, w in zip(starts, widths, strict=True) for _ in range(w)]
            self._start = torch.tensor(columns, dtype=self._wide, device=first.device)
        self._kernel_works = True

    @torch.no_grad()
    def step(self, rows: Tensor | None = None, occurred: Tensor | None = None) -> None:
        """Moves the rows that occurred.

        Args:
            rows: ``[R]`` int64, distinct rows that occurred in the batch, on the host or the
                device; pass them where labels are on the host, and only these rows are read.
            occurred: ``[K]`` bool on the device, instead of ``rows``: nothing depends on how many
                occurred (a captured step). With neither, all rows have.

        Raises:
            ValueError: if the filters are not columns of one matrix.
        """
        flat = flat_matrix(self._params)
        if flat is None:
            raise ValueError("RowAdam moves filters inside `with flatten_filters(params):` alone")
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        grad = side_by_side(grads)
        if occurred is not None and self._fused(grad) and self._step_fused(flat, grad, occurred):
            return
        if rows is None:
            rows = torch.arange(len(grad), device=grad.device)
        for index in to_device_async(rows, grad.device).split(_ROWS_AT_A_TIME):
            there = None if occurred is None else occurred[index].unsqueeze(1)
            self._step_rows(flat, grad, index, there)

    def _step_rows(self, flat: Tensor, grad: Tensor, index: Tensor, there: Tensor | None) -> None:
        """Moves some rows; ``there [R, 1]`` says which of them occurred, None: all."""
        group, (beta1, beta2) = self.param_groups[0], self.param_groups[0]["betas"]
        moments = [self._exp_avg, self._exp_avg_sq]
        exp_avg, exp_avg_sq = (matrix[index].to(self._wide) for matrix in moments)
        part, steps = grad[index].to(self._wide), self._steps[index]
        one = 1 if there is None else there.to(self._wide)
        steps += one
        exp_avg.lerp_(part, (1 - beta1) * one)
        exp_avg_sq.lerp_(part * part, (1 - beta2) * one)
        # A row that never occurred has 0 steps: its correction is 0 and its update is masked.
        denominator = (exp_avg_sq / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        update = exp_avg.div(1 - beta1**steps).div_(denominator).mul_(group["lr"])
        old = flat[index].to(self._wide)
        value = old - update
        if self._start is not None:
            value = soft_shrink(value, self._start, group["lr"] * group["shrink"])
        if there is not None:
            value = torch.where(there, value, old)
        self._steps[index] = steps
        key = index.unsqueeze(1), steps
        exact = exp_avg, exp_avg_sq, value
        for number, (matrix, result) in enumerate(zip((*moments, flat), exact, strict=True)):
            matrix[index] = stochastic_round(result, matrix.dtype, *key, number)

    def _fused(self, grad: Tensor) -> bool:
        """Whether one kernel can do it: fp32 filters on a device where Triton runs."""
        if not self._kernel_works or not grad.is_cuda or grad.dtype != torch.float32:
            return False
        return backends.get("triton").refuse_linear(grad[None], grad) is None

    def _step_fused(self, flat: Tensor, grad: Tensor, occurred: Tensor) -> bool:
        """One pass over the rows that occurred; False, and nothing done, if it does not run."""
        from wfnet.kernels.row_adam import row_adam  # where Triton may be missing

        group, lr = self.param_groups[0], self.param_groups[0]["lr"]
        if not isinstance(lr, Tensor) or lr.device != grad.device:
            lr = grad.new_full((), float(lr))  # filled there: nothing is sent, nothing waits
        steps = self._steps + occurred.unsqueeze(1)
        try:
            row_adam(
                flat,
                grad.contiguous(),
                self._exp_avg,
                self._exp_avg_sq,
                *[(1 - beta**steps).flatten() for beta in group["betas"]],
                occurred,
                lr,
                group["betas"],
                group["eps"],
                self._start,
                None if self._start is None else lr * group["shrink"],
            )
        except Exception as error:  # Triton cannot compile: no C compiler, a broken cache
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            logger.warning("the optimiser runs as tensor operations: %s", reason)
            self._kernel_works = False
            return False
        self._steps.copy_(steps)
        return True

    def moments(self) -> dict[str, Tensor]:
        """The state by name: ``exp_avg``, ``exp_avg_sq`` ``[K, sum O_i]``, ``steps`` ``[K, 1]``."""
        return {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "steps": self._steps}

    @torch.no_grad()
    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Restores :meth:`moments`."""
        for name, own in self.moments().items():
            own.copy_(moments[name])


def soft_shrink(values: Tensor, start: Tensor, threshold: float | Tensor) -> Tensor:
    """Draws ``values`` towards ``start`` by ``threshold``; those nearer than that end there.

    ``start + sign(d) * max(|d| - threshold, 0)`` with ``d = values - start``, without rounding
    where the result is ``start``, or where the threshold is 0.
    """
    distance = values - start
    moved = values - distance.sign() * threshold
    return torch.where(distance.abs() <= threshold, start, moved)


def stochastic_round(
    values: Tensor, dtype: torch.dtype, rows: Tensor, steps: Tensor, stream: int
) -> Tensor:
    """Rounds to bfloat16, up or down at random, so that the mean is ``values``.

    Args:
        values: ``[R, C]`` fp32.
        dtype: torch.bfloat16; any other is rounded to nearest.
        rows, steps: ``[R, 1]``, integers and whole numbers that decide the random bits, together
            with the column.
        stream: other random bits for every number.

    Returns:
        ``[R, C]``. A value that bfloat16 holds stays as it is; so do NaN and infinity.
    """
    if dtype != torch.bfloat16 or values.dtype != torch.float32:
        return values.to(dtype)
    key = _mixed(rows.to(torch.int32) * _signed(0x9E3779B1) + stream)
    key = _mixed(key ^ steps.to(torch.int32))
    columns = torch.arange(values.shape[1], dtype=torch.int32, device=values.device)
    noise = _mixed(key + columns * _signed(0x85EBCA77)).bitwise_and_(0xFFFF)
    # A bfloat16 is the upper half of an fp32: the lower half carries over in proportion to it.
    rounded = (values.contiguous().view(torch.int32) + noise).bitwise_and_(_signed(0xFFFF0000))
    return torch.where(values.isfinite(), rounded.view(torch.float32), values).to(dtype)


def _mixed(bits: Tensor) -> Tensor:
    """A hash of 32 bits (lowbias32 of C. Wellons' hash prospector); ``bits`` is int32."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return bits ^ ((bits >> 16) & 0xFFFF)


def _signed(bits: int) -> int:
    """32 bits as PyTorch's int32 takes them."""
    return bits - (1 << 32) if bits >> 31 else bits
