"""TrackNet: train ball-tracking networks with large vision backbones in a fraction of the memory."""

import logging

__version__ = "0.1.0"

# bitsandbytes says at import that an optional package is missing, which this project does not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
