"""Shadow rounds: networks made as the run's were, each from a half of its training images.

Rounds come in pairs: round ``2 j`` has a random half of every class's training images, round
``2 j + 1`` the other half. Of ``N`` rounds exactly ``N / 2`` have seen an image (as in the code of
Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022), and more
rounds leave the earlier ones as they are. A round is a classifier trained from new weights and one
untraining of all classes at once, so it serves every class; networks retrained without a class,
and other methods, are made of the same half.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.baselines import METHODS, BaselineModels, Origin, unlearn
from wfnet.baselines.method import BaselineConfig
from wfnet.data import Dataset, Splits, labels_of, multi_hot_of, select
from wfnet.evaluation.partial import check_identity, data_identity
from wfnet.network import WFNet
from wfnet.services.files import FilePath, read_metadata, read_tensors, write_tensors
from wfnet.services.seeds import generator_for
from wfnet.training import fit_classifier
from wfnet.untraining import UntrainConfig, untrain
from wfnet.untraining.untrain_config import FREE_TO_CHANGE

FORGETFUL, ORIGINAL, RETRAINED = "forgetful", "original", "retrained"
_STREAM = 12
_FREE = FREE_TO_CHANGE | {"seed"}  # of the run's settings, in rounds that are reused


@dataclass(frozen=True)
class Recipe:
    """How the run's network was made.

    Attributes:
        fresh: seed -> the classifier with new weights.
        training: arguments of :func:`wfnet.training.fit_classifier`.
        wrap: the classifier with fresh filters.
        untraining: settings of untraining, whose seed and workers are replaced.
        about: what else describes network and filters, for the identity of files.
    """

    fresh: Callable[[int], nn.Module]
    training: Mapping[str, Any]
    wrap: Callable[[nn.Module], WFNet]
    untraining: UntrainConfig
    about: Mapping[str, Any]


class ShadowRounds:
    """The rounds, kept in a folder: each is made when first asked for, and read after that.

    Args:
        folder: a file ``round_<number>.safetensors`` for each round, and a folder beside it for
            models of single classes.
        data: training images are halved; validation images choose filters, as in the run.
        recipe: see :class:`Recipe`.
        device: where networks are trained.
        seed: of halves and networks; round ``k`` has the seed ``1000 (seed + 1) + k``.
        workers: processes that read images.

    Raises:
        ValueError: for data with several labels per image; when a round is asked for, for a file
            that is damaged or was made otherwise.
    """

    def __init__(
        self,
        folder: FilePath,
        data: Splits,
        recipe: Recipe,
        device: torch.device,
        seed: int = 0,
        workers: int = 0,
    ):
        if multi_hot_of(data.train) is not None:
            raise ValueError(f"{data.name} has several labels per image: shadows take one each")
        self.folder, self.data, self.recipe, self.device = Path(folder), data, recipe, device
        self.first_seed, self.workers = 1000 * (seed + 1), workers
        self.labels = labels_of(data.train)
        usual = UntrainConfig(steps=1)  # settings that are as usual are not named: new ones come
        same = {k: v for k, v in asdict(recipe.untraining).items() if v != getattr(usual, k)}
        same = {k: v for k, v in same.items() if k not in _FREE}
        about = {"training": dict(recipe.training), "untraining": same, **recipe.about}
        about = json.loads(json.dumps(about))  # as it is read again
        self.identity = {**about, **data_identity(data.train, "training data")}
        self._origins: dict[int, Origin] = {}
        self._nets: dict[int, WFNet] = {}

    def seen(self, number: int) -> Tensor:
        """Returns which training images a round has: ``[images]`` bool."""
        generator = generator_for(self.first_seed, _STREAM, number // 2)
        order = torch.randperm(len(self.labels), generator=generator)
        by_class = order[self.labels[order].argsort(stable=True)]
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[by_class[number % 2 :: 2]] = True
        return chosen

    def path(self, number: int) -> Path:
        """Where a round is kept."""
        return self.folder / f"round_{number}.safetensors"

    def net(self, number: int) -> WFNet:
        """Returns the untrained network of a round, in evaluation mode."""
        if number not in self._nets:
            seed, path = self.first_seed + number, self.path(number)
            identity = {**self.identity, "seed": seed}
            classifier = self.recipe.fresh(seed).to(self.device)
            if path.is_file():
                tensors = read_tensors(path)
                found = json.loads(read_metadata(path).get("identity", "{}"))
                check_identity(path, found, identity)
                net = self.recipe.wrap(classifier).to(self.device)
                net.load_state_dict(tensors)
            else:
                half = self.half(number)
                given = {"seed": seed, "workers": self.workers, "progress": False}
                fit_classifier(classifier, half, **{**self.recipe.training, **given})
                net = self.recipe.wrap(classifier).to(self.device)
                config = replace(self.recipe.untraining, seed=seed, workers=self.workers)
                untrain(net, half, self.data.validation, config, progress=False)
                metadata = {"format": "pt", "identity": json.dumps(identity)}
                write_tensors(path, net.state_dict(), metadata)
            self._nets[number] = net.eval()
        return self._nets[number]

    def model(self, number: int, method: str, label: int) -> nn.Module:
        """Returns the plain model of a round: of its filters (``FORGETFUL``), its classifier
        (``ORIGINAL``), or one that a baseline makes of this classifier and half for a class."""
        if method == FORGETFUL:
            return self.net(number).bake(label)
        if number not in self._origins:
            self._origins[number] = Origin(
                self.net(number).bake(None),
                self.half(number),
                self.recipe.training,
                self.recipe.fresh,
                self.workers,
            )
        origin = self._origins[number]
        if method == ORIGINAL:
            return origin.original
        config = replace(METHODS[method].defaults, seed=self.first_seed + 500 + number)
        if not _trains(method):
            return unlearn(method, origin, label, config)
        folder = self.folder / f"round_{number}" / method
        return BaselineModels(method, folder, origin, config)(label)

    def half(self, number: int) -> Dataset:
        """Returns the training images of a round."""
        return select(self.data.train, self.seen(number).nonzero().squeeze(1))


def _trains(method: str) -> bool:
    """Whether a method trains; one without any setting costs nothing, and is not kept."""
    return len(METHODS[method].unused) < len(vars(BaselineConfig()))
