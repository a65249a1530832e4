"""A student as an ONNX file, and the proof that the file says what the student says.

The graph goes from images and calibrations to the head's maps. Boxes are decoded from these outside of it, by
:func:`decode`. Distillation modules are no part of a student, so none can be in the file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bevkd.config import parse
from bevkd.data.collate import Batch
from bevkd.errors import ConfigError, ContractError, report
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector
from bevkd.models.encoders.base import CameraMaps
from bevkd.models.heads import center
from bevkd.types import Boxes

Part = Literal["all", "dense"]

OPSETS = range(18, 24)
"""Versions of the operator set that the exporter writes; grid sampling and scatter with a sum came before the first."""

OUTPUTS = ("heatmap", "box_code")
METADATA = "bevkd"
"""Key of the file's metadata under which :class:`Description` stands, as JSON."""

TOLERANCE = 1e-4
"""Largest difference from torch that is no fault, relative to the largest absolute value of the map."""


class CameraGraph(nn.Module):
    """A camera detector as a function of tensors, for the exporter."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(
        self, images: Tensor, intrinsics: Tensor, bev_from_camera: Tensor, view_from_original: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return heatmap and box codes; see :class:`bevkd.data.collate.Batch` for the arguments."""
        B, N = images.shape[:2]
        if view_from_original is None:
            view_from_original = torch.eye(3).expand(B, N, 3, 3)
        batch = Batch(
            tokens=("",) * B,
            boxes=(Boxes.empty(),) * B,
            labelled=torch.zeros(B, dtype=torch.bool),
            affines=(BEVAffine.identity(),) * B,
            images=images,
            intrinsics=intrinsics,
            bev_from_camera=bev_from_camera,
            view_from_original=view_from_original,
        )
        head = self.detector(batch).head
        return head.heatmap, head.box_code


class DenseGraph(nn.Module):
    """What follows the encoder of any detector as a function of ``bev_low``."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.bev_encoder, self.head = detector.bev_encoder, detector.head

    def forward(self, bev_low: Tensor) -> tuple[Tensor, Tensor]:
        """Return heatmap and box codes."""
        head = self.head(self.bev_encoder(bev_low))
        return head.heatmap, head.box_code


@dataclass(frozen=True)
class Agreement:
    """How far onnxruntime's maps are from torch's.

    Attributes:
        difference: largest absolute difference, by output.
        scale: largest absolute value in torch's map, by output.
    """

    difference: Mapping[str, float]
    scale: Mapping[str, float]

    @property
    def relative(self) -> float:
        """The worst difference over its map's scale."""
        return max(self.difference[name] / max(self.scale[name], 1e-12) for name in self.difference)

    def joined(self, other: Agreement) -> Agreement:
        """Return the agreement on the frames of both."""
        return Agreement(
            {name: max(value, other.difference[name]) for name, value in self.difference.items()},
            {name: max(value, other.scale[name]) for name, value in self.scale.items()},
        )


def check_exportable(detector: Detector, part: Part, opset: int) -> None:
    """Refuse what cannot be exported.

    Raises:
        ContractError: lists the reasons.
    """
    encoder = detector.config.encoder
    faults = []
    if part == "all" and encoder.name != "lift_splat":
        faults.append(
            f"encoder '{encoder.name}' groups points by where they are, which ONNX cannot say: give --part dense for "
            "the graph from bev_low to the head's maps, and run the encoder in torch"
        )
    if not isinstance(detector.head, center.CenterHead):
        faults.append(f"head '{detector.config.head.name}': only the maps of 'center' can be exported")
    if opset not in OPSETS:
        faults.append(f"opset {opset}: choose one from {OPSETS.start} to {OPSETS.stop - 1}")
    if faults:
        raise report(ContractError, "this detector cannot be exported:", faults)


@torch.no_grad()
def inputs_of(detector: Detector, batch: Batch, part: Part) -> dict[str, Tensor]:
    """Return what the graph takes of a batch, by input name, in the graph's order."""
    if part == "dense":
        encoded = detector.encoder(batch)
        return {"bev_low": encoded.bev_low if isinstance(encoded, CameraMaps) else encoded}
    names = ["images", "intrinsics", "bev_from_camera"]
    if detector.config.encoder.depth_net == "camera_aware":
        names.append("view_from_original")
    return {name: getattr(batch, name) for name in names}


def export(detector: Detector, batch: Batch, path: Path, part: Part, opset: int, metadata: Mapping[str, Any]) -> None:
    """Write the graph of ``detector`` in eval mode as one ONNX file, for batches of the shape of ``batch``.

    Args:
        detector: on the CPU; channels-last weights or not makes no difference.
        part: ``dense`` leaves out the encoder.
        metadata: what the file says about itself beside what :func:`decode` needs, as JSON values.

    Raises:
        ContractError: the detector cannot be exported, see :func:`check_exportable`.
        ConfigError: the packages that export needs are not installed.
    """
    check_exportable(detector, part, opset)
    onnx = _onnx()
    detector.eval()
    inputs = inputs_of(detector, batch, part)
    graph = CameraGraph(detector) if part == "all" else DenseGraph(detector)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(OUTPUTS),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # the dynamo exporter always returns one
    model = program.model_proto
    # The exporter notes its own stack traces, with folders of this machine.
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        del node.metadata_props[:]
        node.doc_string = ""
    about = {
        **metadata,
        "part": part,
        "opset": opset,
        "classes": list(detector.classes),
        "grid": detector.config.grid.model_dump(mode="json"),
        "head": detector.config.scaled().head.model_dump(mode="json"),
    }
    onnx.helper.set_model_props(model, {METADATA: json.dumps(about, sort_keys=True)})
    onnx.checker.check_model(model)
    onnx.save_model(model, path)


def session(path: Path, threads: int = 1) -> Any:
    """Return an onnxruntime session of an exported file on the CPU."""
    _onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def agreement(detector: Detector, batch: Batch, running: Any, part: Part) -> Agreement:
    """Return how far the maps of a session are from those of the detector in eval mode on one batch."""
    output = detector.eval()(batch).head
    arrays = {name: tensor.numpy() for name, tensor in inputs_of(detector, batch, part).items()}
    found = dict(zip(OUTPUTS, running.run(list(OUTPUTS), arrays), strict=True))
    wanted = {name: getattr(output, name).numpy() for name in OUTPUTS}
    return Agreement(
        {name: float(np.abs(found[name] - wanted[name]).max()) for name in OUTPUTS},
        {name: float(np.abs(wanted[name]).max()) for name in OUTPUTS},
    )


def description(running: Any) -> dict[str, Any]:
    """Return what an exported file says about itself: part, opset, classes, grid, head, and what its writer added.

    Args:
        running: an onnxruntime session, see :func:`session`.

    Raises:
        ContractError: bevkd did not write it.
    """
    found = running.get_modelmeta().custom_metadata_map.get(METADATA)
    if found is None:
        raise ContractError(f"this ONNX file has no metadata '{METADATA}'. Give one that 'bevkd export' wrote.")
    content: dict[str, Any] = json.loads(found)
    return content


def decode(
    about: Mapping[str, Any], heatmap: npt.NDArray[np.float32], box_code: npt.NDArray[np.float32]
) -> list[Boxes]:
    """Return the boxes of each frame from the outputs of an exported graph.

    Args:
        about: see :func:`description`.
        heatmap: class logits, ``[B, K, Y, X]``.
        box_code: ``[B, T, 10, Y, X]``.
    """
    config = parse(center.Config, about["head"], "the metadata of an ONNX file")
    grid = parse(BEVGrid, about["grid"], "the metadata of an ONNX file")
    # Decoding needs the head's settings only; its weights are in the graph.
    head = center.build(config, 1, grid, tuple(about["classes"]))
    return head.decode(center.HeadOutput(torch.from_numpy(heatmap), torch.from_numpy(box_code)))


def _onnx() -> Any:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"export needs {error.name}, which is not installed: pip install 'bevkd[export]'.") from error
    return onnx


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes to its own developers away from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
