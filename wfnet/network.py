"""WFNet: a frozen classifier whose convolutions or linear maps are masked layers."""

import copy
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from wfnet import export, fusion, pretrained
from wfnet.backends.autotune import tuning_seconds
from wfnet.bypass import WeightWatch, check_labels_stay_in_samples
from wfnet.compact import compact as compact_network
from wfnet.durable_layers import SOFT_INIT, DurableLayer, GateMode
from wfnet.gates import gather_samples
from wfnet.head import check_head, check_logits, find_head, first_output
from wfnet.labels import (
    DeferredLabelCheck,
    ForgetLabels,
    Selection,
    check_range,
    check_source,
    forgetting,
    labels_in_checkpoints,
    select,
)
from wfnet.layers import MaskedLayer
from wfnet.services.files import FilePath
from wfnet.targets import (
    MaskFrom,
    Targets,
    check_samples_are_independent,
    choose_targets,
    layer_type,
)

GATES = ("sigmoid", "durable")


class WFNet(nn.Module):
    """A frozen classifier with filter matrices: one network that can forget any class on demand.

    The model is copied, frozen and kept in evaluation mode; only filter matrices can be trained.
    Module tree and state-dict keys of the model stay as they are, below ``model.``.

    Args:
        model: any classifier. If it already contains WF layers, they are used as they are.
        num_classes: classes of the classifier, and rows of every filter matrix.
        targets: layers to mask: module names, shell-style patterns or layer types (or a list of
            them). By default the linear maps of a transformer's blocks (``attn.qkv``,
            ``attn.proj``, ``mlp.fc1``, ``mlp.fc2``), else all convolutions; never the head,
            ``pre_logits`` or the patch embedding. The paper masks "qkv" alone.
        alpha_init, normalize_gate, filter_dtype: see :class:`wfnet.WFConv2d`. With durable gates,
            ``alpha_init`` is the start of the hard ones.
        backend: backend of all masked layers.
        fuse: True: fold each convolution with its BatchNorm, residual sum and ReLU and run the
            network as one autograd node (:mod:`wfnet.fusion`). A transformer keeps its own
            operations: what comes before the first mask (patch embedding, positions, first norm)
            runs once per source image, and on a CUDA device the rest is compiled. "compile": the
            same with ``torch.compile`` of what lies between the convolutions (backend eager;
            kernels of the others leave nothing between them), or of a transformer's rest on any
            device; every size of a batch is compiled once. The result is compared with the unfused
            network once; where fusing is not possible, the network runs unfused, with a line in
            the log. Can be set later: ``net.fuse = True``.
        head: name of the layer that gives the logits, where the model has several that could.
        gate: "sigmoid": gates in front of BatchNorm, as in the paper. "durable": gates behind it
            that can be exactly 0, with statistics per row (:mod:`wfnet.durable_layers`): baked
            networks then withstand the re-estimation of BatchNorm.
        soft_init: start of durable soft gates, which range up to ``1 / sigmoid(soft_init)``; None:
            3, so that they attenuate.
        tune: with ``fuse`` and no backend named, on a CUDA device: whether each kind of call is
            given to the backend that measured fastest there (:mod:`wfnet.backends.autotune`), and
            the seconds that measuring may take, for each size of a batch. True: 20. Can be set
            later.
        mask_from: mask late layers alone: from a module on (``"layer3"``), the last so many stages
            (``1``), or a part of them (``0.25``); see :func:`wfnet.targets.last_stages`.

    Raises:
        ValueError: if nothing can be masked, a target does not exist, a layer cannot be masked
            correctly, or ``num_classes`` does not match the head. The message names the layer. Also
            for another ``fuse`` or ``tune``.

    Example::

        net = wfnet.WFNet(timm.create_model("resnet18", pretrained=True), num_classes=1000)
        logits = net(images, forget=labels)
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        targets: Targets = None,
        alpha_init: float = 3.0,
        normalize_gate: bool = True,
        backend: str = "auto",
        filter_dtype: torch.dtype | None = None,
        fuse: bool | str = False,
        head: str | None = None,
        gate: str = "sigmoid",
        soft_init: float | None = None,
        tune: bool | float = True,
        mask_from: MaskFrom = None,
    ):
        super().__init__()
        if isinstance(model, WFNet):
            raise ValueError("model is a WFNet already; pass the original classifier")
        _check_weights(model)
        check_head(model, num_classes, head)
        check_samples_are_independent(model)
        if gate not in GATES:
            raise ValueError(f"gate={gate!r} is none of {', '.join(GATES)}")
        durable = gate == "durable"
        if soft_init is not None and not durable:
            raise ValueError("soft_init is the start of durable gates; give gate='durable'")
        if durable and soft_init is None:
            soft_init = SOFT_INIT
        fusion.check_mode(fuse)
        tuning_seconds(tune)
        self.num_classes = num_classes = int(num_classes)
        self.alpha_init = float(alpha_init)
        self.normalize_gate = normalize_gate
        self.gate, self.soft_init, self.head, self.fuse = gate, soft_init, head, fuse
        self.tune = tune
        self.gate_mode = GateMode()
        options = {
            "alpha_init": alpha_init,
            "normalize_gate": normalize_gate,
            "backend": backend,
            "filter_dtype": filter_dtype,
            **({"soft_init": soft_init} if durable else {}),
        }
        chosen = choose_targets(model, targets, num_classes, durable, mask_from)
        self.model = copy.deepcopy(model).requires_grad_(False)
        for name in chosen:
            layer = self.model.get_submodule(name)
            try:
                kind = layer_type(self.model, name, durable)
                masked = kind.adopt(layer, num_classes, **options)
            except ValueError as error:
                raise ValueError(f"layer {name!r} cannot be masked: {error}") from error
            export.replace_module(self.model, layer, masked)
        self.masked_layers: dict[str, MaskedLayer] = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, MaskedLayer):
                self._check_settings(name, layer)
                layer.layer_name = name
                layer.mode = self.gate_mode
                self.masked_layers[name] = layer
                for parameter in layer.named_filters().values():
                    parameter.requires_grad_(True)
        self._all_called = self._labels_checked = False
        # Kept apart from num_classes, which is that of the rows where filters are replaced.
        self._logits = num_classes if find_head(model, num_classes, head) is not None else None
        self.image_shape: tuple[int, ...] | None = None  # (C, H, W) of the last images
        self._fusion = fusion.Fusion()
        self._label_check = DeferredLabelCheck()
        self.train()

    # -- running ----------------------------------------------------------------------------------

    def forward(
        self, images: Tensor, forget: ForgetLabels | Selection = None, source: Tensor | None = None
    ) -> Tensor:
        """Logits of the network as if it had never known the classes in ``forget``.

        Args:
            images: ``[N, C, H, W]``.
            forget: int (all samples), LongTensor ``[B]`` or ``[B, J]`` (several classes at once,
                padded with -1), or None for the original network. -1 selects no row.
            source: LongTensor ``[B]``: sample ``b`` is ``images[source[b]]`` under ``forget[b]``,
                for batches in which an image occurs under several labels.

        Returns:
            ``[B, num_classes]``; of a model that returns more, its logits
            (:func:`wfnet.head.first_output`).

        Raises:
            TypeError, ValueError: for labels that do not fit. Labels on a device are checked
                without a synchronisation: a wrong one gives NaN, and an error at a later call or
                at :meth:`check_labels`.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel splits neither forget labels nor filters correctly; "
                "use DistributedDataParallel"
            )
        selection = select(forget)
        if torch.compiler.is_compiling():
            if isinstance(forget, int):
                check_range(forget, forget, self.num_classes)
            with forgetting(selection):
                return first_output(self.model(_expand(images, source)))
        self.image_shape = tuple(images.shape[1:])
        batch = images.shape[0]
        if source is not None:
            check_source(source, batch)
            batch = source.shape[0]
        self._check(selection, batch)
        if self.fuse and selection.rows is not None and not images.requires_grad:
            network = self.fused_network(images)
            if network is not None:
                rows = selection.expand(batch, images.device, self.num_classes)
                return network(images, rows, source if source is None else source.to(images.device))
        return self._unfused(images, selection, source)

    def _unfused(
        self, images: Tensor, selection: Selection, source: Tensor | None = None
    ) -> Tensor:
        checkpoints = labels_in_checkpoints() if torch.is_grad_enabled() else nullcontext()
        watch = stance = nullcontext()
        images = _expand(images, source)
        of_samples = selection.rows is not None and not selection.uniform and len(images) > 1
        check_labels = of_samples and not self._labels_checked
        if "torch._dynamo" in sys.modules and (check_labels or not self._all_called):
            stance = torch.compiler.set_stance("force_eager")  # compiled parts, while watched
        if not self._all_called:  # who computes with a masked layer's weight itself is refused
            watch = WeightWatch(self.model, self.masked_layers)
        with stance:
            with forgetting(selection), checkpoints, watch:
                logits = first_output(self.model(images))
                if self._logits is not None:
                    check_logits(logits, self._logits, type(self.model).__name__)
            if check_labels:
                check_labels_stay_in_samples(self.model, self.masked_layers, images)
        self._all_called = True
        self._labels_checked |= check_labels
        return logits

    def fused_network(self, images: Tensor) -> fusion.FusedNetwork | None:
        """Returns the fused network, made and checked with two of ``images`` on first use.

        It is made anew where modules, hooks, modes or settings have changed since. None where it
        cannot be made, and without ``fuse``.
        """
        if not self.fuse:
            return None
        return self._fusion.of(
            self.model,
            list(self.masked_layers.values()),
            self.fuse,
            images,
            lambda few, rows: self._unfused(few, select(rows)),
            self.tune,
        )

    def check_labels(self) -> None:
        """Waits for the range checks of labels that were given on a device.

        Raises:
            ValueError: if one of them was out of range.
        """
        self._label_check.wait()

    def _check(self, selection: Selection, batch: int) -> None:
        if selection.rows is not None:
            check_range(selection.low, selection.high, self.num_classes)
            selection.expand(batch, selection.rows.device, self.num_classes)
            self._label_check.poll()
            self._label_check.submit(selection.rows, self.num_classes)

    def _check_settings(self, name: str, layer: MaskedLayer) -> None:
        """WF layers that came with the model must have the settings that a checkpoint records."""
        for setting in ("num_classes", "alpha_init", "normalize_gate"):
            own, wanted = getattr(layer, setting), getattr(self, setting)
            if own != wanted:
                raise ValueError(
                    f"layer {name!r} was made with {setting}={own}, but the network with "
                    f"{setting}={wanted}; give WFNet the same"
                )

    def train(self, mode: bool = True) -> "WFNet":
        """Sets training mode of the filters; the frozen base always stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    # -- filters ----------------------------------------------------------------------------------

    def named_filters(self) -> dict[str, nn.Parameter]:
        """Filter matrices ``[num_classes, out_channels]`` by name, in the order of the network."""
        return {
            f"{name}.{kind}": parameter
            for name, layer in self.masked_layers.items()
            for kind, parameter in layer.named_filters().items()
        }

    def named_statistics(self) -> dict[str, Tensor]:
        """Tables ``[num_classes, O]`` of durable layers that are measured, not learned."""
        return {
            f"{name}.{kind}": table
            for name, layer in self.masked_layers.items()
            if isinstance(layer, DurableLayer)
            for kind, table in layer.named_statistics().items()
        }

    def filter_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, for any optimiser."""
        return list(self.named_filters().values())

    def gates(self) -> dict[str, Tensor]:
        """Gates ``[num_classes, out_channels]`` per filter matrix, in the order of the network."""
        if self.gate == "durable":
            return {f"{name}.gate": layer.gates() for name, layer in self.masked_layers.items()}
        return {
            f"{name}.{kind}": layer.gates(kind.removeprefix("alpha_"))
            for name, layer in self.masked_layers.items()
            for kind in layer.named_filters()
        }

    # -- export and storage -----------------------------------------------------------------------

    def bake(
        self,
        forget: int | Sequence[int] | None,
        prune_below: float = 0.0,
        cut_output: bool = False,
        compact: bool = False,
        images: Tensor | None = None,
    ) -> nn.Module:
        """A plain model of the original class with the gates of ``forget`` multiplied in.

        Args:
            forget: one label, several (their gates are multiplied), or None for the original
                network. An empty list, or -1 alone, is refused.
            prune_below: gates below this become exactly 0, so that what they scaled cannot be
                read out of the export by scaling it back; nothing is pruned by default.
            cut_output: also cut the classes of ``forget`` from the head, ``head.weight[c] = 0``
                and ``head.bias[c] = CUT_LOGIT``. Re-estimated BatchNorm statistics, rescaled rows
                and fine-tuning on the other classes then find nothing to bring back at the
                output. The logits of these classes are a constant, in which the export differs
                from a model retrained without them. It can be undone: what features hold stays,
                so whoever has images of a class can teach it again, a constant added to its logit
                makes it the answer where no other class fits, and the base has the row.
            compact: also take out of the network the channels that are exactly 0
                (:func:`wfnet.compact.compact`; needs torch-pruning): durable filters close some
                in every row, ``prune_below`` any. Weights then have other shapes than the base's.
            images: ``[n, C, H, W]``, images of other classes, of all that the base knows. Durable
                filters know BatchNorm's statistics under one row; under several they are put
                together from these, which costs accuracy. With images they are measured instead.

        Returns:
            A copy in evaluation mode, without filters; all its parameters can be trained again.
            Without pruning it equals the filtered network within rounding, but for cut logits and
            measured statistics.

        Raises:
            TypeError, ValueError: for labels that do not fit or name no class, a threshold outside
                [0, 1], or ``cut_output`` without a class to cut, a linear head or its bias.
        """
        plain = export.bake(self, forget, prune_below, cut_output, images)
        return compact_network(plain, self.image_shape) if compact else plain

    def save_pretrained(self, folder: FilePath) -> None:
        """Writes ``wf_config.json`` and ``wf_model.safetensors``: the filters, not the base.

        Files are written beside their place and moved in, so that an interrupted save loses
        nothing that was there.
        """
        pretrained.save_filters(self, folder)

    @classmethod
    def from_pretrained(
        cls, folder: FilePath, base_model: nn.Module | None = None, backend: str = "auto"
    ) -> "WFNet":
        """Wraps ``base_model`` and loads the filters that :meth:`save_pretrained` wrote.

        Args:
            folder: with the files, or ``user/repo`` of the Hugging Face Hub
                (:func:`wfnet.hub.save_for_hub`), which is downloaded.
            base_model: None: what the files name, from timm or transformers (may download).
            backend: of all masked layers.

        Raises:
            FileNotFoundError: if ``folder`` holds no such files.
            ValueError: if the files are damaged or of another format, or ``base_model`` is not
                the one that the filters were trained on.
        """
        return pretrained.load_filters(cls, folder, base_model, backend)


def _expand(images: Tensor, source: Tensor | None) -> Tensor:
    return images if source is None else gather_samples(images, source.to(images.device))


def _check_weights(model: nn.Module) -> None:
    """Refuses parameters without a shape, weights that are not finite and negative variances."""
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise ValueError(
                f"parameter {path!r} is lazy and has no shape yet; run the model once before "
                "wrapping it"
            )
        parent, _, name = path.rpartition(".")
        kept = name not in model.get_submodule(parent)._non_persistent_buffers_set
        if not kept or not tensor.is_floating_point() or tensor.is_meta:
            continue
        wrong, what = ~torch.isfinite(tensor), "that are NaN or infinite"
        if name == "running_var" and not wrong.any():
            wrong, what = tensor.lt(0), "that are negative, which no variance is"
        if wrong.any():
            raise ValueError(
                f"{path!r} of the model holds {int(wrong.sum())} values {what}; load weights of a "
                "training that did not diverge"
            )
