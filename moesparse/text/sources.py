"""Sources of text as a command names them: files, datasets and published mixes, with domains and shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moesparse.documents import is_dataset, name_of
from moesparse.errors import CalibrationError, UsageError
from moesparse.presets import PRESETS

__all__ = ["TextSource", "check_domains", "domains_of", "named_sources", "parse_source"]


@dataclass(frozen=True)
class TextSource:
    """A source of text and the domain its figures are filed under.

    Attributes:
        path: a file, or a `datasets` name.
        domain: a short name such as "novel".
        share: of all tokens, above 0; those of all sources add up to 1. None beside sources without one: all give the
            same number of windows.
    """

    path: str
    domain: str
    share: float | None = None


def parse_source(argument: str) -> TextSource:
    """Read a command-line source, `FILE`, `FILE=DOMAIN` or `FILE=DOMAIN:SHARE`.

    Without a domain it is the file's name without its ending. A file whose own name holds "=" is taken whole when it
    exists.

    Raises:
        UsageError: the file or the domain is empty, or the share is no number.
    """
    path, mark, domain = argument.rpartition("=")
    share = None
    if not mark or Path(argument).is_file():
        path = argument
        domain = Path(argument.split(":")[0]).stem if is_dataset(argument) else name_of(argument)
    elif ":" in domain:
        domain, _, given = domain.partition(":")
        try:
            share = float(given)
        except ValueError as error:
            raise UsageError(
                f"the share of a text source must be a number, as in FILE=DOMAIN:0.4, got {argument!r}"
            ) from error
    if not path or not domain:
        raise UsageError(f"a text source must be FILE, FILE=DOMAIN or FILE=DOMAIN:SHARE, got {argument!r}")
    return TextSource(path, domain, share)


def named_sources(arguments: Sequence[str]) -> list[TextSource]:
    """The sources of calibration text, with the datasets of a published mix in the place of its name.

    A mix is one of `moesparse.presets.PRESETS`: `c4`, `reap-code=code:0.5`. A file of that name goes before. Its
    datasets are given a domain each where it has none, and equal parts of its share.

    Args:
        arguments: as `parse_source` takes them.

    Raises:
        UsageError: see `parse_source`.
    """
    found = []
    for argument in arguments:
        one = parse_source(argument)
        preset = None if Path(one.path).exists() else PRESETS.get(one.path)
        if preset is None:
            found.append(one)
            continue
        share = None if one.share is None else one.share / len(preset.datasets)
        found += [
            TextSource(each.name, one.domain if "=" in argument else each.domain, share) for each in preset.datasets
        ]
    return found


def check_domains(sources: Sequence[TextSource], samples: int) -> None:
    """Refuse fewer samples than domains, and no source at all."""
    if not sources:
        raise UsageError("source must be a file or a list of files, got an empty list")
    names = dict.fromkeys(one.domain for one in sources)
    if samples < len(names):
        raise UsageError(
            f"samples must be at least {len(names)}, a window for each domain ({', '.join(names)}), got {samples}"
        )


def domains_of(sources: Sequence[TextSource], origin: Sequence[int], samples: int, wanted: str, cure: str) -> list[str]:
    """The domain of each window; refused where one has none."""
    domains = [sources[number].domain for number in origin]
    for one in sources:
        if one.domain not in domains:
            raise CalibrationError(
                f"domain {one.domain!r} must give at least one {wanted}, got none from {one.path}: give it more text, "
                f"{cure}, or more samples than {samples}"
            )
    return domains
