"""The options that commands share, in the panels that --help shows, and what their values stand for.

A command's signature names them: `weights: options.Weights = ""`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesparse.errors import MissingFileError, UsageError
from moesparse.system.sizes import parse_size


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """A typer option in one of the panels."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


# the first panel is the one that typer shows first, with --help in it: what most runs are given
FIRST, WEIGHTS, EXPERTS, BYTES, TEXT, RUN, RESULT = (
    "Options",
    "Weights",
    "Experts",
    "Bytes to aim at",
    "Calibration text",
    "The run",
    "The result",
)

Model = Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo' for the embedded model.")]
PrunedModel = Annotated[
    str, typer.Argument(help="A local folder, a hub id, a GGUF file, or 'demo' for the embedded model.")
]

Recipe = Annotated[
    str,
    option(
        FIRST,
        "A YAML file with fields of moesparse.Recipe, or a published recipe: cpu, default, paper, reap-25. Options "
        "beside it override its fields.",
        metavar="FILE",
    ),
]
Weights = Annotated[
    str,
    option(
        FIRST,
        "n:m (n of every m inputs stay; 2:4 is what sparse tensor cores run), the ratio removed, or none. Default: "
        "2:4, or none when experts are removed or values rounded.",
    ),
]
Values = Annotated[
    str,
    option(
        WEIGHTS,
        "Round the weights that stay to a format: int8, int8:GROUP, int4:GROUP, int3:GROUP, int2:GROUP (GROUP 32, 64 "
        "or 128 weights of a row that share a scale; the last three also with :zero, a zero point for each group), "
        "fp8, fp8:128x128, mxfp4 or nvfp4. The result holds codes and scales, as compressed-tensors stores them.",
        metavar="FORMAT",
    ),
]
FakeQuantised = Annotated[
    bool,
    option(
        WEIGHTS,
        "With --values: store the rounded values in the dtype of the model, a plain checkpoint that is no smaller.",
    ),
]
ValueRule = Annotated[
    str,
    option(
        WEIGHTS,
        "How --values are found: rtn (the nearest), rtn-mse (under scales of least squared error), gptq, or "
        "gated-gptq, the default, in whose second moments every token counts by its gate.",
    ),
]
Mtp = Annotated[
    str,
    option(
        WEIGHTS,
        "Layers that predict tokens further ahead (model.layers.N behind the last, mtp.*): prune (like the others, by "
        "their own sums), keep, or drop (their count becomes 0). Default: keep, or drop where experts are removed and "
        "config.json has one count for all layers.",
    ),
]
AllowPruned = Annotated[bool, option(WEIGHTS, "Accept a model with pruned experts.", "--allow-pruned")]

Saliency = Annotated[
    str,
    option(
        FIRST,
        "Mask rule: magnitude, wanda, moe-pruner (|W| * ||X * gate||), sparsegpt, gated-sparsegpt, admm, gated-admm. "
        "When left out, gated-admm on a GPU and gated-sparsegpt, at a third of the time, on a CPU.",
    ),
]
Update = Annotated[
    str,
    option(
        FIRST,
        "Weight rule: none (the paper's), rescale (one scalar per expert), obs (SparseGPT's update), least-squares "
        "(kept weights re-solved; kept experts too, after others were removed), asymmetric (the same, and down "
        "answers for gate and up), or one of them with +rescale, or with +tune: then all kept weights of an expert are "
        "trained together for its output. When left out, asymmetric+tune where text goes through the layers, and "
        "least-squares+rescale from saved sums.",
    ),
]
Propagate = Annotated[
    bool | None,
    option(
        WEIGHTS, "Feed each block what the pruned blocks before it give (the default).", "--propagate/--no-propagate"
    ),
]

Experts = Annotated[float | None, option(FIRST, "Remove this share of the experts of every block, for example 0.25.")]
KeepExperts = Annotated[int | None, option(EXPERTS, "Or: how many experts of every block stay.")]
DivisibleBy = Annotated[
    int | None,
    option(
        EXPERTS,
        "How many stay must be a multiple of this, such as the size of an expert-parallel group. --experts is rounded "
        "so that fewer go; another count of --keep-experts or of --plan is refused.",
        metavar="N",
    ),
]
Budget = Annotated[
    str,
    option(
        EXPERTS,
        "per-layer (the default): every layer keeps equally many; or global: the experts of all layers are ranked "
        "together, and --experts and --keep-experts are meant on average. Takes --allow-non-uniform.",
    ),
]
ExpertFloor = Annotated[
    int | None,
    option(EXPERTS, "Fewest experts of a layer under the global budget. Default: as many as a token uses."),
]
AllowNonUniform = Annotated[
    bool,
    option(
        EXPERTS,
        "Layers may keep different numbers of experts, by --budget global or a --plan. config.json says them as "
        "per_layer_config, which few programs read; the run says which of those here do.",
        "--allow-non-uniform",
    ),
]
ExpertSaliency = Annotated[
    str,
    option(
        EXPERTS,
        "Expert criterion: frequency, gate-sum, ean, reap (the default), man, msan, gated-norm, gated-energy, easy-ep,"
        " random, or aimer, which reads the weights alone (the default where no text is given).",
    ),
]
ExpertMethod = Annotated[
    str,
    option(
        EXPERTS,
        "What becomes of the other experts: remove (the default), or ream, m-smoe or hc-smoe, by which they are merged"
        " into those that stay. Merged experts of a quantised checkpoint are quantised again.",
    ),
]
RefineExperts = Annotated[
    bool, option(EXPERTS, "Swap experts while the block's output error falls; slower.", "--refine-experts")
]
MIX_HELP = (
    "Several domains become one choice of experts by the sums of all text (pooled, the default), or by the mean of "
    "their scores, each normalised to sum 1 in every block (equal)."
)
Mix = Annotated[str, option(EXPERTS, MIX_HELP)]
ProtectSuperExperts = Annotated[
    bool,
    option(
        EXPERTS,
        "Keep super-experts, those with extreme outputs (arXiv 2507.23279), whatever their score.",
        "--protect-super-experts",
    ),
]

Plan = Annotated[
    Path | None,
    option(
        EXPERTS,
        "Or: which experts stay, as moesparse_plan.json of another result or moesparse calibrate --plan names them, of "
        "this model or a copy of it in another dtype. Runs no text, and refits where --calibration gives some.",
        metavar="FILE",
    ),
]
Scores = Annotated[
    Path | None,
    option(
        EXPERTS,
        "With --experts or --keep-experts: choose by the scores of this file, of moesparse calibrate --scores or other "
        "programs. Runs no text, and refits where --calibration gives some.",
        metavar="FILE",
    ),
]

TargetBytes = Annotated[
    str,
    option(
        BYTES,
        "What the expert matrices may take once packed: a share of their dense bytes (0.4), or bytes (3.2GB, 3GiB). A "
        "search then chooses how many experts stay and a pattern for each block, by estimated loss.",
    ),
]
Choices = Annotated[
    str,
    option(
        BYTES,
        "Of the search for --target-bytes: drop (whole experts), dense and n:m, by commas. Default: "
        "drop,2:4,3:8,4:8,5:8,6:8,dense.",
    ),
]
CompareUniform = Annotated[
    bool | None,
    option(
        BYTES,
        "With --target-bytes: prune a copy to the best uniform choice at no more bytes too, measure both on "
        "calibration windows kept aside, keep the better (the default). Twice the time, and memory for the copy.",
        "--compare-uniform/--no-compare-uniform",
    ),
]

Calibration = Annotated[
    list[str] | None,
    option(
        FIRST,
        "Text: FILE.txt, .jsonl or .parquet (field 'text'), in gzip too, or a datasets name. FILE=DOMAIN names its "
        "domain, FILE=DOMAIN:0.4 its share of all tokens too. Repeat. Or a published mix: c4, wikitext, reap-code. A "
        "model for images and text also takes records of both: .jsonl or .parquet with 'image' or "
        "'images' beside 'text' or 'messages'.",
    ),
]
CHAT_HELP = "Records may be chats ('messages' or 'conversations'): the tokenizer's chat template makes text of them."
Chat = Annotated[bool, option(TEXT, CHAT_HELP, "--chat")]
SCORED = "Text"
"""The panel of commands that score text."""
ScoredChat = Annotated[bool, option(SCORED, CHAT_HELP, "--chat")]
ScoredLength = Annotated[
    int | None,
    option(SCORED, "Tokens in a window (2048; 256 for the embedded text); bounded by the context.", min=2),
]
Pack = Annotated[
    bool,
    option(
        TEXT,
        "Lay documents end to end and cut windows out of them (the default); or one document a window, cut where it is "
        "longer and padded where it is shorter, which counts for nothing.",
        "--pack/--no-pack",
    ),
]
Statistics = Annotated[
    list[str] | None,
    option(
        TEXT,
        "Instead of text, to remove experts with --update none: FILE or FILE=DOMAIN that moesparse calibrate wrote. "
        "Repeat.",
    ),
]
FromModel = Annotated[
    int | None,
    option(
        TEXT,
        "Give the last N tokens of each window to the model: it continues the text before them itself, and is "
        "calibrated on both (EASY-EP).",
        metavar="N",
    ),
]
Temperature = Annotated[
    float,
    option(TEXT, "Of what the model writes: 0 takes the likeliest token, above 0 tokens are drawn by --seed."),
]
Samples = Annotated[int, option(FIRST, "Calibration windows.", min=1)]
Length = Annotated[int, option(FIRST, "Tokens in a window; bounded by the model's context.", min=2)]

BatchSize = Annotated[int, option(RUN, "Windows in one forward.", min=1)]
Device = Annotated[str, option(RUN, "auto, cpu, cuda, cuda:1: where the layer at work goes.")]
Resume = Annotated[
    bool,
    option(
        FIRST, "Go on with the unfinished run that was left there; where it is finished, say what it holds.", "--resume"
    ),
]
DryRun = Annotated[bool, option(FIRST, "Only print the plan: memory, bytes, time. config.json is enough.", "--dry-run")]
MaxMemory = Annotated[
    str,
    option(
        RUN,
        "RAM to stay within, such as 24GiB or 24GB, beside what Python and torch take; refused when it cannot be. "
        "Under torchrun of each process.",
        metavar="SIZE",
    ),
]
Whole = Annotated[
    bool,
    option(
        RUN,
        "Load the whole model at once instead of layer by layer: for a checkpoint whose tensors transformers renames "
        "when it loads them. Not with --resume, --dry-run and --max-memory.",
        "--whole",
    ),
]
OutputDtype = Annotated[
    str,
    option(
        RESULT,
        "Of a quantised checkpoint, write a plain one: bfloat16, float16 or float32. Default: in its own formats.",
    ),
]
PushToHub = Annotated[
    str,
    option(
        RESULT,
        "Then upload OUT to this repository of the hub, NAME or OWNER/NAME; a new one is private.",
        metavar="REPOSITORY",
    ),
]
BaseModel = Annotated[
    str,
    option(
        RESULT,
        "What the card calls the model that was pruned, OWNER/NAME on the hub. Default: MODEL where it is such a name "
        "or was downloaded by it, else none.",
        metavar="ID",
    ),
]
AsJson = Annotated[bool, option(RESULT, "Print the report as one JSON object.", "--json")]


def model_source(name: str) -> str:
    """Folder or hub id of MODEL."""
    from moesparse.models.meta import source_of

    return str(source_of(name))


def parse_limit(text: str) -> int | None:
    """--max-memory: "24GiB", "8GB", "8G"; None for ""."""
    if not text:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        number = int(text) if text.strip().isdigit() else 0
        raise UsageError(
            f"--max-memory must be a size with a unit, such as {number or 24}GiB or {number or 24}GB, got {text!r}"
        ) from error


def check_input_file(option: str, path: Path) -> None:
    """Refuse a file to read that is not there, before any work.

    Raises:
        MissingFileError: names the option.
    """
    if not path.is_file():
        got = f"the folder {path}" if path.is_dir() else f"{path}: there is no such file"
        raise MissingFileError(f"{option} must be a file to read, got {got}")


def check_output_file(option: str, path: Path) -> None:
    """Refuse a place that no file can be written to, before the work whose result goes there.

    Raises:
        UsageError: it is a folder. CheckpointError: it lies in none that can be written.
    """
    from moesparse.system.folders import check_writable

    if path.is_dir():
        raise UsageError(f"{option} must be a file to write, got the folder {path}")
    check_writable(option, path)


def load_scores(path: Path | None, asked: str) -> tuple[Any, str]:
    """Scores of --scores, or None; and --expert-saliency: as asked, the only one they hold, or the default.

    Raises:
        UsageError: they do not hold it.
    """
    from moesparse.experts.scores_file import ExpertScores
    from moesparse.pruning.recipe import EXPERT_SALIENCY_OF_TEXT

    if path is None:
        return None, asked
    scores = ExpertScores.load(path)
    held = list(scores.criteria)
    name = asked or (held[0] if len(held) == 1 else EXPERT_SALIENCY_OF_TEXT)
    if name not in held:
        raise UsageError(f"--expert-saliency must be one that --scores holds, {', '.join(held)}, got {name}")
    return scores, name


def resolve_device(name: str) -> Any:
    """torch device of --device; None for auto: the GPU when there is one."""
    import torch

    if name == "auto":
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
        raise UsageError(f"--device must be one this machine has, got {name!r} and torch sees {found}")
    return device
