"""Filters on the Hugging Face Hub: a folder with files and model card, and its upload.

:meth:`wfnet.WFNet.from_pretrained` loads such a folder, or the repository.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
from torch import nn

from wfnet.data import model_data_config
from wfnet.data.transforms import chosen_preprocessing
from wfnet.hugging_face import class_names, data_settings, hub_id, is_transformers
from wfnet.pretrained import CONFIG_NAME, FILTERS_NAME, read_config
from wfnet.report.contents import read_contents
from wfnet.report.page import view
from wfnet.services.extras import require
from wfnet.services.files import FilePath, write_json, write_text
from wfnet.version import __version__

CARD_NAME = "README.md"
_TEMPLATE = Path(__file__).parent / "report" / "model_card.md.jinja"
# Of the report's verdicts; "unknown" names folders of this machine.
_VERDICTS = {"good": "Withstood", "bad": "Not withstood", "alike": "As in a network without it"}


def push_to_hub(
    folder: FilePath,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    **card: Any,
) -> str:
    """Uploads filters with a model card, and makes the repository if there is none.

    Args:
        folder: of a run, or one that :meth:`wfnet.WFNet.save_pretrained` wrote. Filters, their
            configuration and the card are uploaded, nothing else of it.
        repo_id: ``user/repo``.
        private: whether a new repository is private; None: as the account's default is.
        token: of the Hub; None: that of ``hf auth login``.
        card: arguments of :func:`save_for_hub`.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError, ValueError: if the folder holds no filters, before anything is sent.
        ImportError: if huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", "hf")
    with TemporaryDirectory() as staged:
        save_for_hub(folder, staged, repo_id, **card)
        api = hub.HfApi(token=token, library_name="wfnet", library_version=__version__)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=staged, commit_message="Upload wfnet filters"
        )
    return str(repository)


def save_for_hub(
    folder: FilePath,
    target: FilePath,
    repo_id: str = "user/repo",
    *,
    model: nn.Module | None = None,
    base: str | None = None,
    license: str | None = None,
) -> None:
    """Writes what :func:`push_to_hub` uploads: the filters, their configuration, a model card.

    The card has the base and its fingerprint, preprocessing, class names, how to use it, and the
    accuracies and trust checks that the run has of these filters.

    Args:
        folder: of a run, or of filters.
        target: folder to write.
        repo_id: the repository's name, for the card.
        model: the base, for its preprocessing and names of classes.
        base: where it is, so that it need not be given to ``from_pretrained``: a name of
            timm with the tag of its weights (``resnet50.a1_in1k``), ``hf-hub:user/repo`` (timm) or
            ``hf:user/repo`` (transformers). None: as recorded.
        license: of the filters, by its name on the Hub, such as ``apache-2.0``.

    Raises:
        FileNotFoundError, ValueError: if the folder holds no filters, or a damaged file.
    """
    hub = require("huggingface_hub", "hf")
    folder, target = Path(folder), Path(target)
    filters = read_config(folder)
    base = filters["base"] = base or filters.get("base")
    contents = read_contents(folder, empty=True)
    shown = view(contents)
    names = contents.run.get("classes")
    if names is None and model is not None:
        names = class_names(model)
    data = hub.ModelCardData(
        license=license,
        library_name="wfnet",
        base_model=hub_id(base) if base else None,
        pipeline_tag="image-classification",
        tags=["machine-unlearning", "weight-filtering"],
    )
    templates = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["written"] = lambda who, row: "-" if row[who] is None else f"{row[who]:.3f}"
    text = templates.from_string(_TEMPLATE.read_text()).render(
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        kind=filters.get("model", "classifier"),
        count=filters["num_classes"],
        base=base,
        filters={"filter_dtype": "float32", "gate": "sigmoid", **filters},
        preprocessing=_preprocessing(model, contents.run.get("options", {})),
        percent=lambda share: f"{share:.2%}",
        result=shown["result"],
        verdicts=[(title, shown["verdicts"][key]) for key, title in _VERDICTS.items()],
        checks=shown["checks"],
        classes=[" ".join(name.split()) for name in names or ()],
    )
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / FILTERS_NAME, target / FILTERS_NAME)
    write_json(target / CONFIG_NAME, filters)
    write_text(target / CARD_NAME, str(hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")))


def _preprocessing(model: nn.Module | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared: as the base says, but for what the options of the run change."""
    found: dict[str, Any] = {}
    if model is not None:
        found = data_settings(model) if is_transformers(model) else model_data_config(model)
    chosen = chosen_preprocessing(options)
    if chosen:
        found.pop("transform", None)
    elif "transform" in found:
        found["transform"] = "that of the base"
    return {**found, **chosen}
