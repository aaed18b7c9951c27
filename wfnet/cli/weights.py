"""Weights from files: safetensors, and checkpoints of training scripts that hold tensors and plain
values only; no code from them is run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.head import find_head
from wfnet.services.files import read_tensors

# Under these names training scripts put the weights into their checkpoints; averaged ones first.
_INSIDE = (
    ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
    + ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")
    + ("params",)
)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fills ``model`` from a safetensors file or from a checkpoint of ``torch.save``.

    Weights are looked for where training scripts put them (``state_dict``, ``model``, averaged
    weights first); prefixes of wrappers (``module.``) are removed.

    Raises:
        FileNotFoundError, ValueError: for a file that is missing, damaged, or does not fit the
            model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the weights {path} do not exist")
    wanted = model.state_dict()
    if path.suffix == ".safetensors":
        candidates = [read_tensors(path)]
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in many ways
            raise ValueError(
                f"{path} is truncated or no checkpoint of torch.save, or holds more than tensors "
                "and plain values, which could run any code: save model.state_dict() alone"
            ) from error
        candidates = list(_tensor_tables(content))
    if not candidates:
        raise ValueError(f"{path} holds no weights by name: save model.state_dict()")
    tables = [_without_prefix(path, table, wanted) for table in candidates]
    fitting = (table for table in tables if not _problem(path, table, model, wanted))
    tensors = next(fitting, None)
    if tensors is None:
        raise ValueError(_problem(path, tables[0], model, wanted))
    model.load_state_dict({name: tensors[name] for name in wanted if name in tensors}, strict=False)


def _tensor_tables(content: Any) -> Iterator[dict[str, Tensor]]:
    """Yields the tables of tensors by name in a checkpoint, the likeliest first."""
    if not isinstance(content, dict):
        return
    inside = [content[name] for name in _INSIDE if isinstance(content.get(name), dict)]
    others = [value for value in content.values() if isinstance(value, dict)]
    for table in (*inside, content, *others):
        tensors = {k: v for k, v in table.items() if isinstance(v, Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            yield tensors


def _without_prefix(
    path: Path, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the tensors under the prefix below which the model's own names stand.

    With a prefix, what has another one belongs to something else, such as a loss or a metric.
    """
    # The head's: no block of the network has one that ends like it.
    last = [name for name in wanted if not _is_counter(name)][-1]
    prefixes = {name.removesuffix(last) for name in tensors if f".{name}".endswith(f".{last}")}
    fits = {p: sum(p + name in tensors for name in wanted) for p in prefixes}
    best = [prefix for prefix, count in fits.items() if count == max(fits.values())]
    if not best or "" in best:
        return tensors
    if len(best) > 1:
        raise ValueError(
            f"{path} holds the weights of several networks ({', '.join(sorted(best))}): save the "
            "state_dict of one of them"
        )
    return {n.removeprefix(best[0]): t for n, t in tensors.items() if n.startswith(best[0])}


def _problem(
    path: Path, tensors: Mapping[str, Tensor], model: nn.Module, wanted: Mapping[str, Tensor]
) -> str | None:
    """Returns why the tensors do not fit the model, in a sentence; None if they do."""
    missing = [name for name in wanted if name not in tensors and not _is_counter(name)]
    extra = [name for name in tensors if name not in wanted and not _is_counter(name)]
    wrong = [n for n, t in tensors.items() if n in wanted and t.shape != wanted[n].shape]
    head = find_head(model)
    if head is not None and wrong and set(wrong) <= {f"{head[0]}.weight", f"{head[0]}.bias"}:
        return (
            f"{path} has weights for {len(tensors[wrong[0]])} classes, not for "
            f"{len(wanted[wrong[0]])}; use it with the data that it was trained on (is a class "
            "folder missing, or one too many? `wfnet untrain --classes` takes images of some)"
        )
    if wrong:
        sizes = f"{list(tensors[wrong[0]].shape)} in the file and {list(wanted[wrong[0]].shape)}"
        problem = f"{wrong[0]!r} is {sizes} in the model"
    elif missing:
        problem = f"it lacks {missing[0]!r}"
    elif extra:
        problem = f"it has {extra[0]!r}, unknown to the model"
    else:
        return None
    return (
        f"{path} does not fit this {type(model).__name__}: {problem}; is --model the network that "
        "was trained, and are --num-classes, --in-chans and --model-kwargs as they were then?"
    )


def _is_counter(name: str) -> bool:
    """BatchNorm's count of batches: of no use in a frozen network, and often left out."""
    return name.endswith("num_batches_tracked")
