"""The two rates that bound every kernel of a device, a large copy and a large bf16 matmul, and its record.

make gpu PART=ceilings                      # into ceilings.json
python -m benchmarks.speed.ceilings --dry --results out/dry
"""

from __future__ import annotations

import json

from benchmarks.speed.common import parser, start

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    results = start(parser(__doc__).parse_args(arguments)).file("ceilings")
    results.put([{"part": "ceilings", "contender": "measured"}])
    print(json.dumps(results.rows[-1], indent=1))


if __name__ == "__main__":
    main()
