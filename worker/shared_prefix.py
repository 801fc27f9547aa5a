"""When a step's decode rows begin with the same pages: how many, and whether reading those once for all pays. Pure but for NumPy.

Keys of a shared prefix are read once for several rows (`kernels.cascade`) at the price of two more launches a layer, and of the CUDA
graph, whose grid cannot know how long a prefix is: such a decode step runs eagerly. Both prices are estimates, not measurements.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

EAGER_BYTES = 2**30  # that must be saved in a step that runs eagerly anyway
GRAPH_BYTES = 8 * 2**30  # that must be saved for a step to leave its graph: about 3 ms of an H100's memory


def shared_pages(tables: npt.NDArray[np.int32], kv_lens: npt.NDArray[np.int64], page_size: int) -> int:
    """Whole pages with which all rows begin.

    Args:
        tables: [R, W] block tables; entries past a row's last page may hold anything.
        kv_lens: [R] keys of each row.
    """
    if len(tables) < 2:
        return 0
    whole = int(kv_lens.min()) // page_size
    if not whole or (tables[:, 0] != tables[0, 0]).any():  # as in most steps: the rest need not be read
        return 0
    alike = (tables[:, :whole] == tables[0, :whole]).all(axis=0)
    return whole if alike.all() else int(alike.argmin())


def worth_sharing(rows: int, pages: int, page_bytes: int, graphed: bool) -> bool:
    """Whether `rows` decode rows should read a prefix of `pages` pages together. `graphed`: their step would be a graph's."""
    return (rows - 1) * pages * page_bytes >= (GRAPH_BYTES if graphed else EAGER_BYTES)
