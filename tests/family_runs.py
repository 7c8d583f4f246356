"""Everything that makes a folder of a folder, over planted checkpoints: from layer to layer, and with whole models."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from planted import FAMILIES, Planted

import moesparse
from moesparse.checkpoints.config_text import CONFIG_KEY
from moesparse.checkpoints.history import REPORT_FILE
from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
from moesparse.checkpoints.repack import pack_folder, unpack_folder
from moesparse.distillation import Settings, distill, distill_checkpoint

WEIGHTS = moesparse.Recipe(saliency="magnitude", update="none")
EXPERTS = moesparse.Recipe(weights=None, update="none", experts=0.5)
BOTH = moesparse.Recipe(saliency="magnitude", update="none", experts=0.5)
TRAINING = Settings(learning_rate=1e-2, epochs=1, batch_size=4, micro_batch=4)
WAYS = ("by layer", "whole")
EVERYTHING = "MOESPARSE_EVERY_WAY" in os.environ
"""Set it to run every operation on every family in both ways; without, the ways take turns."""


def turns(*operations: str) -> list[tuple[str, str, str]]:
    """Family, operation and way of every test; global distillation takes whole models alone."""
    return [
        (family, operation, way)
        for f, family in enumerate(FAMILIES)
        for o, operation in enumerate(operations)
        for w, way in enumerate(WAYS)
        if (way == "whole" if operation == "global" else EVERYTHING or (f + o + w) % 2 == 0)
    ]


def windows() -> torch.Tensor:
    return torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))


def card(_report: object) -> str:
    return "# a card\n"


def load(folder: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        # of tensors that the model has no place for
        warnings.simplefilter("ignore", UserWarning)
        return load_pretrained(folder)[0]


def prune(planted: Planted, source: Path, out: Path, recipe: moesparse.Recipe, way: str) -> Path:
    text = windows() if recipe.experts else None
    if way == "by layer":
        moesparse.prune_checkpoint(source, out, text, recipe, card=card)
        return out
    model = load(source)
    data = text
    if planted.family == "zaya" and text is not None:
        # whose layers hand on more than hidden states: what is measured in its own forward takes their place
        data = moesparse.calibrate(model, text)
    report = moesparse.prune(model, data, recipe)
    files = {"card": card(report), "report": report.to_dict(), "plan": report.plan}
    save_pretrained(model, out, source=source, recipe=report.recipe, **files)
    return out


def train(student: Path, teacher: Path, out: Path, mode: str, way: str) -> Path:
    if way == "by layer":
        distill_checkpoint(student, teacher, out, windows(), settings=TRAINING, card=card)
        return out
    model = load(student)
    report = distill(model, load(teacher), windows(), mode, settings=TRAINING)
    recipe = {**getattr(model.config, CONFIG_KEY)["recipe"], "distillation": report.summary(4)}
    save_pretrained(model, out, source=student, recipe=recipe, card=card(report), report=report.beside(student, 4))
    return out


def pack(folder: Path, out: Path, way: str) -> Path:
    if way == "by layer":
        pack_folder(folder, out)
    else:
        save_pretrained(load(folder), out, packed=True, source=folder, **beside(folder))
    return out


def unpack(folder: Path, out: Path, way: str) -> Path:
    if way == "by layer":
        unpack_folder(folder, out)
    else:
        save_pretrained(load(folder), out, source=folder, **beside(folder))
    return out


def beside(folder: Path) -> dict[str, Any]:
    """Card and report of a result, for the next one."""
    report = json.loads((folder / REPORT_FILE).read_text())
    return {"card": (folder / "README.md").read_text(), "report": report}
