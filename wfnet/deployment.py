"""Networks as files that run without this package: torch.export, AOTInductor, ONNX, 8 bits.

A plain network (:meth:`wfnet.WFNet.bake`, compact or not) has one input, ``images``. A
:class:`wfnet.WFNet` has a second one, ``forget``, so that a server chooses per request which class
each image forgets. The batch has any size; every file is read again and compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from wfnet.head import check_same_logits, first_output
from wfnet.network import WFNet
from wfnet.services.extras import require
from wfnet.services.files import write_atomically
from wfnet.services.modes import evaluation_mode

TOLERANCE = 1e-4  # of the largest logit; compilers and runtimes add in another order
NAMES = "images", "forget"


class Deployment:
    """A network, exported, and the files that can be written of it.

    Args:
        network: ``[B, C, H, W] -> [B, K]``; of a WFNet the filtered network, whose second input is
            ``forget``, int64 ``[B]``: the label of each image, -1 for the original. A label out of
            range gives NaN.
        images: ``[N, C, H, W]``, N of 2 or more, to trace and to compare with.

    Attributes:
        program: the ``torch.export.ExportedProgram``, in PyTorch's own operators.
        inputs, expected: tensors by name, and the network's logits of them.

    Raises:
        ValueError: for fewer images.
    """

    def __init__(self, network: nn.Module, images: Tensor):
        if len(images) < 2:
            raise ValueError(f"{len(images)} image is not enough to export for any batch: give 2")
        weight = next(network.parameters())
        images = images.to(weight.device, weight.dtype)
        self.inputs = {"images": images}
        if isinstance(network, WFNet):
            labels = torch.arange(-1, len(images) - 1, device=images.device)
            self.inputs["forget"] = labels.remainder(network.num_classes + 1) - 1
        with evaluation_mode(network), torch.no_grad():
            # Before the export: the first call finds layers that are bypassed.
            self.expected = first_output(network(*self.inputs.values()))
            one_less = tuple(x[:-1] if len(x) > 2 else x for x in self.inputs.values())
            shapes = {name: {0: torch.export.Dim("batch")} for name in self.inputs}
            self.program = torch.export.export(_Logits(network), one_less, dynamic_shapes=shapes)

    def save_program(self, path: Path) -> float:
        """Writes ``path`` for ``torch.export.load``; returns the largest difference of logits.

        Raises:
            RuntimeError: if the file computes something else; so for the other formats.
        """
        _write(path, lambda file: torch.export.save(self.program, file))
        return self._check(path, torch.export.load(path).module())

    def save_package(self, path: Path) -> float:
        """Writes ``path`` (.pt2) for ``torch._inductor.aoti_load_package``: compiled code.

        It is for the kind of device that the network is on, and for processors such as this one.

        Raises:
            RuntimeError: without a C++ compiler, too.
        """
        from torch._inductor import aoti_compile_and_package, aoti_load_package, cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise RuntimeError(
                f"AOTInductor needs a C++ compiler that works, g++ or that of CXX: {error}"
            ) from error
        _write(path, lambda file: aoti_compile_and_package(self.program, package_path=file))
        return self._check(path, aoti_load_package(str(path)))

    def save_onnx(self, path: Path) -> float | None:
        """Writes ``path`` as ONNX, output ``logits``; returns None without onnxruntime."""
        write_atomically(path, lambda temporary: self._onnx.save(str(temporary)))
        try:
            run = onnx_logits(path)
        except ImportError:
            return None
        return self._check(path, lambda *inputs: run(*(x.cpu() for x in inputs)))

    def save_int8(self, path: Path, images: Tensor) -> None:
        """Writes ``path`` as ONNX with weights and activations of 8 bits.

        By ONNX Runtime's static quantiser: scales per output channel for weights, and from the
        activations of ``images [n, C, H, W]`` for these. Not compared: it computes something else.

        Raises:
            ImportError: without onnxruntime.
            ValueError: for a filtered network, whose gates would share one scale.
        """
        if "forget" in self.inputs:
            raise ValueError(
                "the filtered network is not quantised: the activations of all classes would share "
                "one scale; bake it, and quantise the export of one class"
            )
        quantization = require("onnxruntime.quantization", "onnx")
        parts = [{"images": part.cpu().numpy()} for part in images.split(64)]

        class Reader(quantization.CalibrationDataReader):
            def get_next(self) -> dict | None:
                return parts.pop(0) if parts else None

        with tempfile.TemporaryDirectory() as folder:
            plain, fused = Path(folder, "plain.onnx"), Path(folder, "fused.onnx")
            self.save_onnx(plain)
            quantization.quant_pre_process(str(plain), str(fused))
            write_atomically(
                path,
                lambda temporary: quantization.quantize_static(
                    str(fused), str(temporary), Reader(), per_channel=True
                ),
            )

    @cached_property
    def _onnx(self) -> torch.onnx.ONNXProgram:
        require("onnxscript", "onnx")
        names = {"input_names": list(self.inputs), "output_names": ["logits"]}
        return torch.onnx.export(self.program, dynamo=True, verbose=False, **names)

    def _check(self, path: Path, run: Callable[..., Tensor]) -> float:
        """Compares a file on a batch of one more image than was traced."""
        with torch.no_grad():
            found = run(*self.inputs.values()).to(self.expected)
        return check_same_logits(found, self.expected, TOLERANCE, str(path))[0]


def onnx_logits(path: Path) -> Callable[..., Tensor]:
    """A function of ``images`` (and ``forget``) that runs an ONNX file in ONNX Runtime, on the CPU.

    Raises:
        ImportError: if onnxruntime is not installed.
    """
    session = require("onnxruntime", "onnx").InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )

    def run(*inputs: Tensor) -> Tensor:
        named = {name: x.numpy() for name, x in zip(NAMES, inputs, strict=False)}
        return torch.from_numpy(session.run(["logits"], named)[0])

    return run


class _Logits(nn.Module):
    """What is exported: logits alone, of as many images as labels."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, forget: Tensor | None = None) -> Tensor:
        if forget is None:
            return first_output(self.network(images))
        torch._check(images.shape[0] == forget.shape[0])
        return self.network(images, forget)


def _write(path: Path, save: Callable) -> None:
    """Calls ``save`` with an open file: of a path torch asks for the suffix .pt2."""

    def into(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            save(file)

    write_atomically(path, into)
