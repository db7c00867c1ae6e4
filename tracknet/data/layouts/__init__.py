"""How datasets lie on disk: one module each, with ``list_games``, ``read_game``, ``published_splits``, ``EXPECTED``,
``PREFIX`` and ``OPTIONS``.

Each reads what is there in place. A game is the unit of splits; ``PREFIX`` is what a bare number in a split stands
behind.
"""

from tracknet.data.layouts import (
    blurball,
    coco,
    csv,
    racketvision,
    tracknet,
    tracknetv2,
    wasb_basketball,
    wasb_soccer,
    wasb_volleyball,
)

LAYOUTS = {
    "tracknet": tracknet,
    "tracknetv2": tracknetv2,
    "wasb_soccer": wasb_soccer,
    "wasb_volleyball": wasb_volleyball,
    "wasb_basketball": wasb_basketball,
    "blurball": blurball,
    "racketvision": racketvision,
    "coco": coco,
    "csv": csv,
}
