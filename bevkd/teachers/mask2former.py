"""Mask2Former (Cheng et al., arXiv 2112.01527) of transformers as teacher of instance masks.

Its weights come from a local folder in the hub's layout: config.json, model.safetensors and, for the normalisation,
preprocessor_config.json. Any network trained for instances or panoptics on COCO, Cityscapes or nuImages will do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, JsonValue
from torch import Tensor, nn
from torch.nn import functional

from bevkd.cache.manifest import TeacherIdentity
from bevkd.config import PluginConfig
from bevkd.errors import CheckpointError, ContractError, report
from bevkd.geometry.masks import tighten
from bevkd.grid import BEVGrid
from bevkd.teachers._masks import MaskTeacher
from bevkd.teachers._runs import weights_digest
from bevkd.teachers.base import Teacher
from bevkd.types import Instances

ALIASES: Mapping[str, tuple[str, ...]] = {
    "car": ("vehicle.car",),
    "truck": ("vehicle.truck",),
    "bus": ("vehicle.bus.rigid", "vehicle.bus.bendy"),
    "trailer": ("vehicle.trailer",),
    "construction_vehicle": ("vehicle.construction",),
    "pedestrian": (
        "person",
        "human.pedestrian.adult",
        "human.pedestrian.child",
        "human.pedestrian.construction_worker",
        "human.pedestrian.police_officer",
    ),
    "motorcycle": ("vehicle.motorcycle", "motorbike"),
    "bicycle": ("vehicle.bicycle", "bike"),
    "traffic_cone": ("movable_object.trafficcone",),
    "barrier": ("movable_object.barrier",),
}
"""Names that COCO, Cityscapes and nuImages have for each class, beside the class's own.

Left out on purpose: ``rider`` of Cityscapes, who belongs to the bicycle or motorcycle in nuScenes, and its ``train``.
"""

_IMAGENET: dict[str, list[float]] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


class Config(PluginConfig):
    """A Mask2Former in a local folder.

    Attributes:
        folder: in the hub's layout, e.g. what ``save_pretrained`` wrote.
        grid: of the students that read the cache, which is compared with it; masks do not depend on it.
        image_height, image_width: of the images that the network sees, pixels.
        labels: further names of the network's labels, and the class that each means.
        score_threshold: instances must score above it.
        max_instances: kept per image.
    """

    name: Literal["mask2former"] = "mask2former"
    folder: Path
    grid: BEVGrid
    image_height: int = Field(default=800, gt=0, multiple_of=32)
    image_width: int = Field(default=1440, gt=0, multiple_of=32)
    labels: dict[str, str] = Field(default_factory=dict)
    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    max_instances: int = Field(default=100, gt=0)


def class_of_labels(
    labels: Mapping[int, str], classes: tuple[str, ...], further: Mapping[str, str]
) -> Float[Tensor, "L K"]:
    """Return 1 where a label of a network means a class of the data set; a label means at most one.

    Args:
        labels: name of each label of the network.
        further: class that a label means beside :data:`ALIASES`.

    Raises:
        ContractError: ``further`` names a label or class that there is not, or no label means any class.
    """
    faults = [f"labels: the network has no label '{name}'" for name in further if name not in labels.values()]
    faults += [f"labels.{name}: '{value}' is no class" for name, value in further.items() if value not in classes]
    meaning = {alias: index for index, name in enumerate(classes) for alias in (_plain(name), *ALIASES.get(name, ()))}
    meaning |= {_plain(name): classes.index(value) for name, value in further.items() if value in classes}
    table = torch.zeros(len(labels), len(classes))
    for label, name in labels.items():
        if _plain(name) in meaning:
            table[label, meaning[_plain(name)]] = 1
    if not table.any():
        faults.append(f"no label means a class; labels are {', '.join(labels.values())}")
    if faults:
        headline = f"this Mask2Former does not fit the classes {', '.join(classes)}. Correct teacher.labels:"
        raise report(ContractError, headline, faults)
    return table


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")


class _Mask2Former(nn.Module):
    """Network, normalisation and instance post-processing; see :func:`build`."""

    mean: Tensor
    std: Tensor
    table: Tensor

    def __init__(
        self, network: nn.Module, table: Tensor, normalisation: Mapping[str, list[float]], config: Config
    ) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.register_buffer("mean", torch.tensor(normalisation["image_mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(normalisation["image_std"]).view(3, 1, 1))
        self.register_buffer("table", table)

    def forward(self, images: UInt8[Tensor, "M 3 H W"]) -> Instances:
        """Return the instances of all images, image by image, best first; their camera is the number of the image."""
        output = self.network(pixel_values=(images.float() / 255 - self.mean) / self.std)
        # The last label is "no object". A class may have several labels, whose probabilities add up.
        scores = output.class_queries_logits.float().softmax(dim=-1)[..., :-1] @ self.table
        found = [
            self._instances(image, score, masks.float(), (images.shape[2], images.shape[3]))
            for image, (score, masks) in enumerate(zip(scores, output.masks_queries_logits, strict=True))
        ]
        return Instances(
            torch.cat([each.cameras for each in found]),
            torch.cat([each.boxes for each in found]),
            torch.cat([each.labels for each in found]),
            torch.cat([each.scores for each in found]),
            tuple(mask for each in found for mask in each.masks),
        )

    def _instances(
        self, image: int, scores: Float[Tensor, "Q K"], masks: Float[Tensor, "Q h w"], size: tuple[int, int]
    ) -> Instances:
        """Return one image's instances: the best pairs of query and class, scored as the paper's section 4.1 says."""
        best = scores.flatten().topk(min(self.config.max_instances, scores.numel()))
        kept, boxes, found, finals = [], [], [], []
        for index, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            if score <= self.config.score_threshold:
                break
            logits = masks[index // scores.shape[1]]
            whole = functional.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]
            tight = tighten(whole > 0)
            if tight is None:
                continue
            final = score * float(whole.sigmoid()[whole > 0].mean())
            if final > self.config.score_threshold:
                kept.append(index % scores.shape[1])
                found.append(tight[0])
                boxes.append(tight[1])
                finals.append(final)
        device = scores.device
        instances = Instances(
            torch.full((len(kept),), image, device=device),
            torch.tensor(boxes, dtype=torch.float32, device=device).view(-1, 4),
            torch.tensor(kept, dtype=torch.int64, device=device),
            torch.tensor(finals, dtype=torch.float32, device=device),
            tuple(found),
        )
        return instances[instances.scores.argsort(descending=True, stable=True)]


def build(config: Config, classes: tuple[str, ...], device: torch.device) -> Teacher:
    """Return the teacher for a data set's classes; those that it has no label for are named in its identity.

    Raises:
        CheckpointError: the folder is not there, or holds another network; or names every tensor that is missing, extra
            or misshapen.
        ContractError: its labels have nothing to do with the classes.
    """
    network, normalisation = _load(config.folder)
    names: Mapping[int, str] = {int(label): name for label, name in network.config.id2label.items()}
    table = class_of_labels(names, classes, config.labels)
    meanings: dict[str, JsonValue] = {
        name: classes[int(table[label].argmax())] for label, name in names.items() if table[label].any()
    }
    size = (config.image_height, config.image_width)
    identity = TeacherIdentity(
        name=config.name,
        architecture={**config.model_dump(mode="json", exclude={"folder", "grid"}), "network": _described(network)},
        weights_sha256=weights_digest(network),
        preprocessing={
            "sensors": ["camera"],
            "augmentation": None,
            "normalisation": {key: [*values] for key, values in normalisation.items()},
            "labels": meanings,
            "classes_absent": [name for index, name in enumerate(classes) if not table[:, index].any()],
        },
        origin=config.folder.name,
    )
    model = _Mask2Former(network, table, normalisation, config).to(device).eval()
    return MaskTeacher(model, identity, size, config.grid, classes, device)


def _described(network: Any) -> dict[str, Any]:
    """Return the network's config as far as it is not chance: paths and versions of libraries say nothing of it."""
    values: dict[str, Any] = json.loads(network.config.to_json_string(use_diff=True))
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def _load(folder: Path) -> tuple[Any, dict[str, list[float]]]:
    """Return the network of a folder and its normalisation, strictly: every tensor is used and every weight found."""
    from transformers import AutoConfig, Mask2FormerForUniversalSegmentation

    absent = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"teacher.folder: {folder} lacks {' and '.join(absent)}. Give a folder in the hub's layout, e.g. one that "
            "save_pretrained wrote or that 'hf download' fetched; weights must be safetensors."
        )
    settings = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if settings.model_type != "mask2former":
        raise CheckpointError(f"teacher.folder: {folder} holds a '{settings.model_type}', not a Mask2Former.")
    kind: Any = Mask2FormerForUniversalSegmentation
    network, found = kind.from_pretrained(
        str(folder),
        config=settings,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are reported with all other faults
    )
    faults = [f"missing: {name}" for name in sorted(found["missing_keys"])]
    faults += [f"not in the model: {name}" for name in sorted(found["unexpected_keys"])]
    faults += [f"shape of {each[0]}: file {list(each[1])}, model {list(each[2])}" for each in found["mismatched_keys"]]
    if faults:
        shown = [*faults[:12], *([f"and {len(faults) - 12} more"] if len(faults) > 12 else [])]
        raise report(CheckpointError, f"the weights in {folder} do not fit its config.json:", shown)
    return network, _normalisation(folder)


def _normalisation(folder: Path) -> dict[str, list[float]]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return dict(_IMAGENET)
    settings = json.loads(path.read_text(encoding="utf-8"))
    return {key: [float(value) for value in settings.get(key, usual)] for key, usual in _IMAGENET.items()}
