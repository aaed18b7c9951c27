"""Views of a masked layer's result: query, key and value, and where they lie in it.

A masked layer is called together with the views that are taken of its result first
(:class:`MaskedCall`). Where they are parts of it (:class:`Part`), gradients are read where they
lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from wfnet.fusion.trace import name_of

# Operations whose result is a view of their first argument, or a copy that stands for it.
_OPERATIONS = frozenset(
    ("chunk", "contiguous", "expand", "flatten", "getitem", "movedim", "narrow", "permute")
    + ("reshape", "select", "split", "squeeze", "swapaxes", "tensor_split", "transpose")
    + ("unbind", "unflatten", "unsqueeze", "view")
)


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` takes a view of a value."""
    return node.op != "call_module" and name_of(node) in _OPERATIONS


@dataclass(eq=False)
class MaskedCall:
    """A call of a masked layer, with the views of its result that are taken first.

    Attributes:
        index: of the layer.
        at_source: whether its input has one row per source image.
        constant: whether nobody changes the result in place.
        views: the result, in the shape of the layer's output, and sizes to a tuple of its views.
    """

    index: int
    at_source: bool
    constant: bool
    views: Callable[..., tuple]

    def __post_init__(self) -> None:
        self._tiled: dict[tuple, bool] = {}
        self._parts: dict[tuple, list[Part] | None] = {}

    def tiles(self, shape: tuple[int, ...], sizes: tuple) -> bool:
        """Whether the views are tensors that hold every element of the result exactly once."""
        if not self.constant or any(not isinstance(size, int) for size in sizes):
            return False
        if (shape, sizes) not in self._tiled:
            seen = torch.zeros(shape, dtype=torch.uint8)
            views = self.views(seen, *sizes)
            whole = all(isinstance(view, Tensor) for view in views)
            if whole and sum(view.numel() for view in views) == seen.numel():
                for view in views:
                    view.fill_(1)
            self._tiled[shape, sizes] = whole and bool(seen.all())
        return self._tiled[shape, sizes]

    def parts(self, plain: torch.Size, shape: torch.Size, sizes: tuple) -> list[Part] | None:
        """Where the views of :meth:`tiles` lie; None if a table has no such views of it.

        A table is the same for every token: a view that joins samples and tokens (windows among
        images, say) has no strides in it.

        Args:
            plain: ``(B, T, O)``.
            shape: of the same elements, as :attr:`views` take them, with ``sizes``.
        """
        key = (plain, shape, sizes)
        if key not in self._parts:
            self._parts[key] = self._find_parts(*key)
        return self._parts[key]

    def _find_parts(self, plain: torch.Size, shape: torch.Size, sizes: tuple) -> list[Part] | None:
        batch, tokens, columns = plain
        whole = torch.empty(shape, dtype=torch.uint8)
        wide = torch.empty((batch, 2 * columns + 1), dtype=torch.uint8)  # its rows tell themselves
        try:
            table = wide[:, None, :columns].expand(-1, tokens, -1).view(shape)
            views = zip(self.views(whole, *sizes), self.views(table, *sizes), strict=True)
            views = list(views)
        except RuntimeError:
            return None
        memory, row = wide.untyped_storage().data_ptr(), wide.stride(0)
        for _, of_table in views:
            steps = [s for n, s in zip(of_table.shape, of_table.stride(), strict=True) if n > 1]
            if of_table.untyped_storage().data_ptr() != memory or any(
                step >= columns and step != row for step in steps
            ):
                return None
        return [Part.of_views(*pair, row) for pair in views]


@dataclass(frozen=True)
class Part:
    """Where a view lies in ``[B, T, O]``, and in a table ``[B, O]`` that all tokens share.

    Attributes:
        size, stride, offset: in the contiguous result.
        steps: strides in a table; None for the stride of its rows.
        first: offset in a table's row.
        spread: dimensions of tokens, which have no stride in a table.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    steps: tuple[int | None, ...]
    first: int
    spread: tuple[int, ...]

    @classmethod
    def of_views(cls, view: Tensor, of_table: Tensor, row: int) -> Part:
        sizes_and_steps = list(zip(of_table.shape, of_table.stride(), strict=True))
        return cls(
            size=tuple(view.shape),
            stride=view.stride(),
            offset=view.storage_offset(),
            steps=tuple(None if step == row else step for _, step in sizes_and_steps),
            first=of_table.storage_offset(),
            spread=tuple(i for i, (n, step) in enumerate(sizes_and_steps) if n > 1 and step == 0),
        )

    def of(self, whole: Tensor) -> Tensor:
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)

    def of_table(self, table: Tensor) -> Tensor:
        row = table.stride(0)
        steps = [row if step is None else step for step in self.steps]
        return table.as_strided(self.size, steps, table.storage_offset() + self.first)

    def add_up(self, g: Tensor, table: Tensor) -> None:
        """Writes the sums of ``g`` over tokens."""
        into = self.of_table(table)
        if not self.spread:
            into.copy_(g)
            return
        for axis in reversed(self.spread):
            into = into.select(axis, 0)
        torch.sum(g, self.spread, dtype=table.dtype, out=into)
