"""Export the model of a run, or a part of it.

    tracknet export --run outputs/runs/<id> --format merged --out merged --dtype bf16
    tracknet export --run outputs/runs/<id> --format onnx --out outputs/runs/<id>/onnx

merged    run with the adapters merged into the dequantized backbone; loads without bitsandbytes and peft
onnx      merged model as model.onnx, compared with torch after the export; run it with tracknet predict --engine onnx
adapter   trained weights only, a few MB; load it with tracknet predict --run, swap it with tracknet.swap_adapter
backbone  merged backbone only, as a Hugging Face folder (fp16), for model.backbone.name=<folder>
"""

from __future__ import annotations

import dataclasses

from tracknet.errors import UserError
from tracknet.files import new_folder, write_json
from tracknet.reporting.console import echo
from tracknet.scripts.command_line import LOADABLE_HELP, Parser, check_new_folder, existing_or_new_json, run_command

FORMATS = ("merged", "onnx", "adapter", "backbone")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _export(argv))


def _export(argv: list[str] | None) -> int:
    """Parse the arguments and write the export; return the exit code."""
    parser = Parser(__doc__, "export", LOADABLE_HELP)
    parser.add_argument("--run", metavar="RUN", required=True, help="folder of the run, its hub id, or embedded/NAME")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="checkpoint of the run (default: best)"
    )
    parser.add_argument("--format", choices=FORMATS, required=True, help="output format, see above")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to create; it must not exist yet")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default=None,
        help="dtype of the weights of --format merged (default: fp32)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write a description of the export to this file as a JSON object"
    )
    args, overrides = parser.parse(argv)

    # Imported after the arguments were checked: importing torch takes seconds, and --help should not wait for it.
    from tracknet.runs.export import write_adapter, write_backbone, write_merged, write_onnx_checked
    from tracknet.runs.load import load_run, locate_run
    from tracknet.training.checkpoint import find_checkpoint
    from tracknet.training.state import load_state

    if args.dtype and args.format != "merged":
        raise UserError(
            f"--dtype applies to --format merged only; --format {args.format} has a fixed dtype. Remove --dtype."
        )
    json_file, out = existing_or_new_json(args.json), check_new_folder(args.out)
    run = locate_run(args.run)
    config, model, _ = load_run(run, args.checkpoint, overrides)
    checkpoint = find_checkpoint(run, args.checkpoint)
    result = {"format": args.format, "out": str(out)}
    # Written to a temporary folder that is renamed at the end: a failed export, such as an ONNX model that differs from
    # torch, leaves nothing behind.
    with new_folder(out) as work:
        if args.format == "merged":
            write_merged(work, config, model, load_state(checkpoint), args.dtype or "fp32")
        elif args.format == "adapter":
            write_adapter(work, config, model, load_state(checkpoint))
        elif args.format == "backbone":
            write_backbone(work, model)
        else:
            parity, source = write_onnx_checked(work, config, model, checkpoint)
            result |= dataclasses.asdict(parity)
            echo(
                f"onnxruntime compared with torch on {source}: heatmaps differ by at most"
                f" {parity.max_heatmap_difference:.1e}, the positions of {parity.num_balls} balls by at most"
                f" {parity.max_displacement_px:.4f} px; {parity.num_one_sided} balls were found by only one of them",
            )
            if not parity.num_balls:
                echo(
                    "No ball reached evaluation.threshold, so no position was compared; set a lower threshold to"
                    " compare positions."
                )
    result["bytes"] = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    echo(f"wrote {out} ({result['bytes'] / 1e6:.1f} MB)")
    if json_file:
        write_json(json_file, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
