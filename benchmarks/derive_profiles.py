"""Writes the speed profiles that come with Quire, derived from data sheets (cluster/simulator/roofline.py).

python benchmarks/derive_profiles.py
"""

from __future__ import annotations

import sys

from quire.cluster.simulator.roofline import shipped
from quire.cluster.simulator.speed_profile import SHIPPED


def main() -> int:
    for profile in shipped():
        path = SHIPPED / f"{profile.name}.json"
        path.write_text(profile.to_json(), encoding="utf-8")
        step, replica = profile.step, profile.replica
        print(
            f"{path.name}: {1e3 * step.step_s(0, 0, 1, 1000, 1):.2f} ms a decode step alone, {1e6 * step.token_s:.1f} us a prompt token, "
            f"{replica.pages} pages of {replica.page_size} tokens"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
