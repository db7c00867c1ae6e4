"""TrackNet: train ball-tracking networks with large vision backbones in a fraction of the memory."""

import logging

__version__ = "0.1.0"

# bitsandbytes says at import that an optional package is missing, which this project does not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> object:
    # Loading a model needs torch and transformers, which take seconds to import; the package itself does not.
    if name == "load":
        from tracknet.inference.load import load

        return load
    if name == "switch":
        from tracknet.inference.transfer import switch

        return switch
    raise AttributeError(f"module 'tracknet' has no attribute '{name}'")
