"""Optimisers for filter matrices: Adam that leaves alone the rows that did not occur in a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from wfnet import backends
from wfnet.gate_tables import flat_matrix, side_by_side
from wfnet.services.device_copies import to_device_async

logger = logging.getLogger("wfnet")

_ROWS_AT_A_TIME = 256  # of 16-bit filters: bounds the fp32 copies


class RowAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba, algorithm 1) over matrices ``[K, O_i]`` that share their rows.

    A step moves only the rows that occurred in it; their moments and their step counts are their
    own. Dense Adam keeps pushing absent rows along old gradients, which costs retained accuracy as
    soon as classes outnumber the batch. Where all rows occur in every step it is ordinary Adam.

    All matrices are updated together as one ``[K, sum O_i]`` matrix: a dozen tensor operations for
    any number of layers, none of which waits for a device. Nothing is copied for it where they are
    views of such a matrix (:func:`wfnet.gate_tables.flatten_filters`); on a CUDA device a captured
    step is then one pass over the rows that occurred (:mod:`wfnet.kernels.row_adam`).

    Filters in bfloat16 have moments in bfloat16. A step is computed in fp32, some rows at a time,
    and rounded stochastically: an update of less than half a unit in the last place, which
    rounding to nearest would lose for good, counts in the mean. The random bits are a function of
    row, column and the row's step count, so runs repeat and resume bit by bit.

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

    Raises:
        ValueError: for values out of range, or parameters of different rows, dtype or device.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        shrink: float = 0.0,
        starts: Sequence[float] | None = None,
    ):
        if lr < 0 or eps < 0 or shrink < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps} or shrink={shrink} is out of range"
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "shrink": shrink})
        if len(self.param_groups) != 1:
            raise ValueError("RowAdam takes one list of parameters, not parameter groups")
        self._params: list[nn.Parameter] = self.param_groups[0]["params"]
        kinds = {(p.shape[0], p.dtype, p.device) for p in self._params if p.dim() == 2}
        if len(kinds) != 1 or any(p.dim() != 2 for p in self._params):
            shapes = sorted({str(list(p.shape)) for p in self._params})
            raise ValueError(
                "filter matrices must be [K, O] with the same K, dtype and device; got "
                f"{', '.join(shapes)}"
            )
        self._widths = [p.shape[1] for p in self._params]
        rows, (first, width) = self._params[0].shape[0], (self._params[0], sum(self._widths))
        self._exp_avg = first.new_zeros((rows, width), requires_grad=False)
        self._exp_avg_sq = torch.zeros_like(self._exp_avg)
        self._wide = torch.promote_types(first.dtype, torch.float32)
        self._kernel_works = True
        self._start: Tensor | None = None  # [sum O_i]; None: nothing shrinks
        if shrink:
            if starts is None or len(starts) != len(self._params):
                raise ValueError("shrink needs one start for each filter matrix")
            of_column = [s for s, w in zip(starts, self._widths, strict=True) for _ in range(w)]
            self._start = torch.tensor(of_column, dtype=self._wide, device=first.device)
        # 8 bits of bfloat16 count to 256.
        self._steps = first.new_zeros((rows, 1), dtype=self._wide, requires_grad=False)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        rows: Tensor | None = None,
        occurred: Tensor | None = None,
    ) -> None:
        """Moves the rows that occurred.

        Args:
            closure: re-evaluates the loss, as in every torch optimiser.
            rows: ``[R]`` int64, distinct rows that occurred in the batch, on the host or the
                device; pass them where labels are on the host, and only these rows are read. By
                default the rows with a gradient other than 0, found without waiting for a device.
            occurred: ``[K]`` bool on the device, instead of ``rows``: all rows are read, nothing
                depends on how many occurred (a captured step).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad = side_by_side(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        )
        if self._wide != grad.dtype:
            if occurred is None and rows is None:
                occurred = (grad != 0).any(1)
            self._step_rounded(grad, rows, occurred)
        elif occurred is not None:
            self._step_masked(grad, occurred.view(-1, 1))
        elif rows is None:
            self._step_masked(grad, (grad != 0).any(1, keepdim=True))
        elif rows.numel() == grad.shape[0]:
            self._step_masked(grad, None)
        else:
            self._step_rows(grad, to_device_async(rows, grad.device))
        return loss

    def _step_masked(self, grad: Tensor, occurred: Tensor | None) -> None:
        if occurred is not None and self._fused(grad) and self._step_fused(grad, occurred):
            return
        update = self._advance(grad, self._exp_avg, self._exp_avg_sq, self._steps, occurred)
        if occurred is not None:
            update = torch.where(occurred, update, 0)
        flat = flat_matrix(self._params)
        if flat is not None:
            flat.sub_(update)
        else:
            torch._foreach_sub_(self._params, list(update.split(self._widths, 1)))
        if self._start is not None:
            self._shrink_all(flat, occurred)

    def _shrink_all(self, flat: Tensor | None, occurred: Tensor | None) -> None:
        """Draws the rows that occurred, or all of them, towards their start."""
        whole = [flat] if flat is not None else self._params
        starts = [self._start] if flat is not None else self._start.split(self._widths)
        for matrix, start in zip(whole, starts, strict=True):
            shrunk = soft_shrink(matrix, start, self._threshold())
            matrix.copy_(shrunk if occurred is None else torch.where(occurred, shrunk, matrix))

    def _threshold(self) -> float | Tensor:
        return self.param_groups[0]["lr"] * self.param_groups[0]["shrink"]

    def _fused(self, grad: Tensor) -> bool:
        """Whether one kernel can do it: fp32 filters that are one matrix, where Triton runs."""
        if not self._kernel_works or not grad.is_cuda or grad.dtype != torch.float32:
            return False
        kernels_run = backends.get("triton").refuse_linear(grad[None], grad) is None
        return kernels_run and flat_matrix(self._params) is not None

    def _step_fused(self, grad: Tensor, occurred: Tensor) -> bool:
        """One pass over the rows that occurred; False, and nothing done, if it does not run."""
        from wfnet.kernels.row_adam import row_adam  # where Triton may be missing

        group, lr = self.param_groups[0], self.param_groups[0]["lr"]
        if not isinstance(lr, Tensor) or lr.device != grad.device:
            lr = grad.new_full((), float(lr))  # filled there: nothing is sent, nothing waits
        threshold = None
        if self._start is not None:
            threshold = lr * group["shrink"]
        steps = self._steps + occurred
        corrections = [(1 - beta**steps).flatten() for beta in group["betas"]]
        try:
            row_adam(
                flat_matrix(self._params),
                grad.contiguous(),
                self._exp_avg,
                self._exp_avg_sq,
                *corrections,
                occurred.flatten(),
                lr,
                group["betas"],
                group["eps"],
                self._start,
                threshold,
            )
        except Exception as error:  # Triton cannot compile: no C compiler, a broken cache
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            logger.warning("the optimiser runs as tensor operations: %s", reason)
            self._kernel_works = False
            return False
        self._steps.copy_(steps)
        return True

    def _step_rows(self, grad: Tensor, rows: Tensor) -> None:
        exp_avg, exp_avg_sq = self._exp_avg[rows], self._exp_avg_sq[rows]
        steps = self._steps[rows]
        update = self._advance(grad[rows], exp_avg, exp_avg_sq, steps, None)
        self._exp_avg[rows] = exp_avg
        self._exp_avg_sq[rows] = exp_avg_sq
        self._steps[rows] = steps
        flat = flat_matrix(self._params)
        if self._start is not None:
            value = side_by_side([p[rows] for p in self._params]) if flat is None else flat[rows]
            self._put(flat, rows, soft_shrink(value - update, self._start, self._threshold()))
        elif flat is not None:
            flat.index_add_(0, rows, update, alpha=-1)  # distinct rows: a plain subtraction
        else:
            for parameter, part in zip(self._params, update.split(self._widths, 1), strict=True):
                parameter.index_add_(0, rows, part, alpha=-1)

    def _put(self, flat: Tensor | None, rows: Tensor, value: Tensor) -> None:
        """Writes ``value [R, sum O_i]`` into rows of the filters."""
        if flat is not None:
            flat[rows] = value
            return
        for parameter, part in zip(self._params, value.split(self._widths, 1), strict=True):
            parameter[rows] = part

    def _step_rounded(self, grad: Tensor, rows: Tensor | None, occurred: Tensor | None) -> None:
        """A step of 16-bit filters and moments, in fp32 for a block of rows at a time."""
        if rows is None:
            rows = torch.arange(grad.shape[0], device=grad.device)
        flat = flat_matrix(self._params)
        for index in to_device_async(rows, grad.device).split(_ROWS_AT_A_TIME):
            old = [self._exp_avg, self._exp_avg_sq]
            exp_avg, exp_avg_sq = (matrix[index].to(self._wide) for matrix in old)
            steps = self._steps[index]
            there = None if occurred is None else occurred.view(-1, 1)[index]
            update = self._advance(grad[index].to(self._wide), exp_avg, exp_avg_sq, steps, there)
            if there is not None:
                update = torch.where(there, update, 0)
            self._steps[index] = steps
            value = side_by_side([p[index] for p in self._params]) if flat is None else flat[index]
            value = value.to(self._wide) - update
            if self._start is not None:
                shrunk = soft_shrink(value, self._start, self._threshold())
                value = shrunk if there is None else torch.where(there, shrunk, value)
            key = index.unsqueeze(1), steps
            for number, (matrix, exact) in enumerate(zip(old, (exp_avg, exp_avg_sq), strict=True)):
                matrix[index] = stochastic_round(exact, matrix.dtype, *key, number)
            self._put(flat, index, stochastic_round(value, grad.dtype, *key, len(old)))

    def _advance(
        self,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        steps: Tensor,
        occurred: Tensor | None,
    ) -> Tensor:
        """Advances moments and step counts in place; what to subtract from the rows."""
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        weight1, weight2 = 1 - beta1, 1 - beta2
        if occurred is None:
            steps.add_(1)
            exp_avg.lerp_(grad, weight1)
            exp_avg_sq.lerp_(grad * grad, weight2)
        else:
            occurred = occurred.to(grad.dtype)
            steps.add_(occurred)
            exp_avg.lerp_(grad, weight1 * occurred)
            exp_avg_sq.lerp_(grad * grad, weight2 * occurred)
        # A row that never occurred has 0 steps: its correction is 0 and its update is masked.
        correction1 = 1 - beta1**steps
        correction2 = 1 - beta2**steps
        denominator = (exp_avg_sq / correction2).sqrt_().add_(group["eps"])
        return exp_avg.div(correction1).div_(denominator).mul_(group["lr"])

    def moments(self) -> dict[str, Tensor]:
        """The state by name: ``exp_avg``, ``exp_avg_sq`` ``[K, sum O_i]``, ``steps`` ``[K, 1]``."""
        return {
            "exp_avg": self._exp_avg,
            "exp_avg_sq": self._exp_avg_sq,
            "steps": self._steps,
        }

    @torch.no_grad()
    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Restores :meth:`moments`.

        Raises:
            ValueError: if names or shapes differ.
        """
        for name, own in self.moments().items():
            given = moments.get(name)
            if given is None or given.shape != own.shape:
                found = "nothing" if given is None else list(given.shape)
                raise ValueError(
                    f"optimiser state {name!r} does not fit: expected {list(own.shape)}, got "
                    f"{found}"
                )
            own.copy_(given)

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "moments": {k: v.clone() for k, v in self.moments().items()},
        }

    def load_state_dict(self, state_dict: dict) -> None:
        state_dict = dict(state_dict)
        self.load_moments(state_dict.pop("moments"))
        super().load_state_dict(state_dict)


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


@torch.no_grad()
def clip_filters(params: Iterable[nn.Parameter], bound: float) -> None:
    """Clips all entries to ``[-bound, bound]`` (recipe ``paper`` after every SGD step: 3)."""
    params = list(params)
    torch._foreach_clamp_min_(params, -bound)
    torch._foreach_clamp_max_(params, bound)
