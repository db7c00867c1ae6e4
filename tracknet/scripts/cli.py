"""Entry point of the ``tracknet`` command, with one verb per script."""

from __future__ import annotations

import importlib
import sys

from tracknet import __version__
from tracknet.errors import nearest

VERBS = {
    "demo": "check the installation: train, score and track a ball in a few minutes",
    "check_data": "check a dataset before training",
    "plan": "estimate the memory of a training step before it starts",
    "benchmark": "measure memory, speed and accuracy of training modes on this machine",
    "train": "train a model",
    "evaluate": "score a run on a split",
    "predict": "track the ball through a video",
    "synthesize": "render synthetic rallies",
    "export": "export a run as a merged model, an ONNX file, an adapter or a backbone",
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
            "\nRun 'tracknet VERB --help' for the options of a verb."
        )
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in VERBS:
        print(f"error: unknown verb '{argv[0]}' (verbs: {', '.join(VERBS)}){nearest(argv[0], VERBS)}", file=sys.stderr)
        return 2
    # Imported on demand: a verb imports torch and transformers, which takes seconds, and the help should not wait.
    try:
        return importlib.import_module(f"tracknet.scripts.{argv[0]}").main(argv[1:])
    except KeyboardInterrupt:  # during the import; afterwards, the verb handles it (`run_command`)
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
