"""Published mixes of calibration text by name: which datasets they are, and which files stand for them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PRESETS", "Preset", "PresetDataset", "files_that_do"]


class PresetDataset(NamedTuple):
    """A dataset of a published mix.

    Attributes:
        name: of it, as `datasets` knows it: NAME:CONFIG:SPLIT.
        domain: in the mix.
        file: of its repository on the hub, which gives the same text without network.
    """

    name: str
    domain: str
    file: str


class Preset(NamedTuple):
    """A published mix of calibration text, equal parts of its datasets.

    Attributes:
        datasets: of it.
        chats: whether their records are chats.
    """

    datasets: tuple[PresetDataset, ...]
    chats: bool = False


PRESETS = {
    # SparseGPT (arXiv 2301.00774) and MoE-Pruner (arXiv 2410.12013): 128 windows of 2048 tokens
    "c4": Preset((PresetDataset("allenai/c4:en:train", "c4", "en/c4-train.00000-of-01024.json.gz"),)),
    "wikitext": Preset(
        (
            PresetDataset(
                "Salesforce/wikitext:wikitext-2-raw-v1:train",
                "wikitext",
                "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            ),
        )
    ),
    # README of github.com/CerebrasResearch/reap: 4096 samples of each, windows of 16384 tokens
    "reap-code": Preset(
        (
            PresetDataset("theblackcat102/evol-codealpaca-v1:train", "code", "train.jsonl"),
            PresetDataset("open-r1/Mixture-of-Thoughts:code:train", "reasoning", "code/train-*.parquet"),
            PresetDataset("open-r1/Mixture-of-Thoughts:math:train", "reasoning", "math/train-*.parquet"),
            PresetDataset("open-r1/Mixture-of-Thoughts:science:train", "reasoning", "science/train-*.parquet"),
            PresetDataset("Salesforce/xlam-function-calling-60k:train", "tools", "xlam_function_calling_60k.json"),
            PresetDataset("SWE-bench/SWE-smith-trajectories:tool", "agent", "data/tool-*.parquet"),
        ),
        chats=True,
    ),
}
"""Published mixes of calibration text by name; `moesparse.text.named_sources` puts their datasets in their places."""


def files_that_do(spec: str) -> str:
    """The files that stand for the datasets of a published mix, to be named behind "give a file"."""
    for preset in PRESETS.values():
        if spec in (each.name for each in preset.datasets):
            files = [f"{each.file} of {each.name.split(':')[0]}" for each in preset.datasets]
            return f", downloaded elsewhere: {', '.join(files)}"
    return ""
