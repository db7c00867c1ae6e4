"""Take a part out of a run.

    tracknet export --run outputs/runs/<id> --format backbone --out my_backbone

``backbone`` writes the trained backbone alone as a Hugging Face folder (config.json, model.safetensors in fp16), to be used as
model.backbone.name=my_backbone.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from tracknet.errors import UserError
from tracknet.inference.load import load_run
from tracknet.models.backbone import Backbone
from tracknet.scripts.command_line import Parser, console, existing_or_new_json, new_folder, run_command
from tracknet.training.checkpoint import write_json


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _export(argv))


def _export(argv: list[str] | None) -> int:
    parser = Parser(__doc__, "export", overrides=False)
    parser.add_argument("--run", type=Path, metavar="RUN", required=True, help="folder of the run")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="which state of it (default: best)"
    )
    parser.add_argument("--format", choices=("backbone",), required=True, help="what to write")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make; it must not exist")
    parser.add_argument("--json", metavar="FILE", help="write what was made as one JSON object")
    args, _ = parser.parse(argv)
    json_file, out = existing_or_new_json(args.json), new_folder(args.out)
    config, model, _, _ = load_run(args.run, args.checkpoint)
    if model.backbone is None:
        raise UserError(f"{args.run}: {config.model.name} has no backbone.")
    if any(part is not None and part.enabled for part in (config.training.quantization, config.training.lora)):
        raise UserError(f"{args.run}: its backbone is quantised or has adapters; export one that was trained with "
                        "--training default.")  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.part-"))
    try:
        write_backbone(model.backbone, work)
        work.chmod(0o755)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    console.print(f"wrote {out}", markup=False)
    if json_file:
        write_json(json_file, {"format": args.format, "out": str(out)})
    return 0


def write_backbone(backbone: Backbone, folder: Path) -> None:
    """Write a backbone in fp16 as a Hugging Face folder, with the constants that its input is normalised by."""
    backbone.hf.to(torch.float16).save_pretrained(folder)
    normalisation = {
        "image_mean": backbone.mean.flatten().tolist(),
        "image_std": backbone.std.flatten().tolist(),
    }
    write_json(folder / "preprocessor_config.json", normalisation)
    for path in folder.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    raise SystemExit(main())
