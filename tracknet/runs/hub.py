"""Publishing a run on the Hugging Face hub, with a model card. ``load.locate_run`` fetches it again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from tracknet import __version__
from tracknet.config import Config
from tracknet.errors import UserError, first_line
from tracknet.models.heatmap_model import HeatmapModel
from tracknet.quantization.apply import active
from tracknet.runs.export import is_local, publishable, write_run
from tracknet.runs.load import HUB_ERRORS


def write_published(
    folder: Path,
    config: Config,
    model: HeatmapModel,
    state: dict,
    repo: str,
    self_contained: bool,
    license: str | None = None,
) -> None:
    """Write a run as it is published: configuration without the paths of this machine, weights, model card.

    Raises:
        UserError: the run names a base that nobody else can have.
    """
    base = model.base.name if model.base is not None else None
    if base is not None and not self_contained and is_local(base):
        raise UserError(
            f"The run's base {base} is a folder on this machine, which nobody else has: push with --self-contained."
        )
    if (
        model.base is not None and config.model.backbone is not None and not self_contained
    ):  # wherever this machine keeps its copy
        backbone = dataclasses.replace(config.model.backbone, name=model.base.name, revision=model.base.revision)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    write_run(folder, config, model, state, self_contained)
    on_hub = base is not None and not is_local(base) and not base.startswith("embedded/")
    build_card(publishable(config), state, repo, base if on_hub else None, license).save(folder / "README.md")


def build_card(config: Config, state: dict, repo: str, base: str | None, license: str | None) -> ModelCard:
    """Write the model card from what the run knows of itself."""
    progress = state.get("progress") or {}
    # The scores are those of the best state; the last one has none of its own.
    best = state.get("best") or {} if progress.get("step") == progress.get("best_step") else {}
    quantization, adapters = active(config.training.quantization), active(config.training.lora)
    stored = (
        "full precision"
        if quantization is None
        else (
            "8 bits (LLM.int8)"
            if quantization.load_in_8bit
            else (f"4 bits ({quantization.bnb_4bit_quant_type.upper()})")
        )
    )
    lora = f", LoRA of rank {adapters.r}" if adapters is not None else ""
    data = ModelCardData(
        library_name="tracknet",
        license=license,
        base_model=base,
        pipeline_tag="object-detection",
        tags=["ball-tracking", "heatmap"],
    )
    wh, length = config.data.preprocess.resize, config.data.sequence.length
    rows = [
        f"| {name.replace('_', ' ')} | {best[key]:.3f} |"
        for name, key in (
            ("F1 (strict)", "f1_strict"),
            ("precision", "precision"),
            ("recall (strict)", "recall_strict"),
            ("AP", "ap"),
        )
        if isinstance(best.get(key), float)
    ]
    scores = ""
    if rows:
        tolerance = best.get("tolerance_px", config.evaluation.tolerance_px)
        scores = (
            f"On its validation games{_count_balls(best)}, at {tolerance:g} px in source images:\n\n| | |\n|---|---|\n"
            + "\n".join(rows)
            + "\n"
        )
        if config.data.allow_leaks:
            scores += (
                "\nIt was trained with `data.allow_leaks`: training may have shown games, or frames, that these scores"
                " are of. They do not tell how well it follows games that it has never seen.\n"
            )
    name = config.model.backbone.name if config.model.backbone else "no backbone"
    text = (
        f"# {repo.rpartition('/')[2]}\n\nFinds the ball in video: {length} consecutive frames of {wh[0]}x{wh[1]} in,"
        f" one heatmap per frame out. A TrackNet `{config.model.name}` on `{name}`, its backbone stored in"
        f" {stored}{lora}.\n\n{scores}\n```bash\ntracknet predict --run {repo} rally.mp4 --out"
        f" out/\n```\n\n```python\nimport tracknet\n\nmodel = tracknet.load('{repo}')  # uint8 frames [batch, {length},"
        f" 3, {wh[1]}, {wh[0]}] -> logits\n```\n\nMade with TrackNet {__version__}. Settings: `config.yaml`.\n"
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _count_balls(scores: dict) -> str:
    """Say how many balls scores were measured on: those that were found, put elsewhere, or missed."""
    counts = [count for name in ("tp", "fp1", "fn") if isinstance(count := scores.get(name), int)]
    if len(counts) < 3:
        return ""
    return (
        f" ({sum(counts):,} balls in {scores.get('num_frames', sum(counts)):,}"
        f" frames{', too few to rely on' if sum(counts) < 100 else ''})"
    )


def upload(folder: Path, repo: str, private: bool, revision: str | None) -> str:
    """Upload a published folder; return its address.

    Raises:
        UserError: not logged in, no right to write, or no network.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message="TrackNet run")
    except HUB_ERRORS as error:
        raise UserError(
            f"{repo}: cannot be written on the hub: {first_line(error)}\nLog in with 'hf auth login', "
            "with a token that may write; look at what would be sent with --dry-run."
        ) from error
    return str(commit)
