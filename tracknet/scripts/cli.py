"""The ``tracknet`` command: one verb per script."""

from __future__ import annotations

import importlib
import sys

from tracknet import __version__
from tracknet.errors import nearest

VERBS = {
    "demo": "install check and first look: train, score and follow a ball in a few minutes",
    "check_data": "look a dataset over before the first epoch",
    "plan": "say how much memory a training takes, before it is started",
    "benchmark": "measure memory, speed and accuracy of training modes on this machine",
    "train": "train a model",
    "evaluate": "score a run on a split",
    "predict": "follow the ball through a video",
    "synthesize": "render synthetic rallies",
    "export": "take a merged model, an ONNX file, an adapter or a backbone out of a run",
    "push": "publish a run on the Hugging Face hub",
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: tracknet VERB [options] [section.key=value …]\n\nverbs:")
        print("\n".join(f"  {verb:<12}{text}" for verb, text in VERBS.items()))
        print(
            "\nexample: tracknet train --data synthetic --model vit_tiny_heatmap --training qlora"
            "\n'tracknet VERB --help' explains a verb."
        )
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in VERBS:
        print(
            f"error: there is no verb '{argv[0]}' (verbs: {', '.join(VERBS)}){nearest(argv[0], VERBS)}", file=sys.stderr
        )
        return 2
    # Imported here: a verb loads torch and transformers, which takes seconds; the help does not.
    try:
        return importlib.import_module(f"tracknet.scripts.{argv[0]}").main(argv[1:])
    except KeyboardInterrupt:  # while it is imported; later, the verb itself says so
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
