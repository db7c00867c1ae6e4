"""Publication of a run on the Hugging Face hub, with a model card; ``load.locate_run`` downloads it again."""

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
    """Write a run for publication: its configuration without the paths of this machine, its weights, and a model card.

    Args:
        folder: empty folder to write to.
        config: configuration of the run.
        model: model of the run.
        state: state of its checkpoint.
        repo: hub id ``owner/name`` for the model card.
        self_contained: whether to include the weights of the frozen base.
        license: license id for the model card, or ``None``.

    Raises:
        UserError: if the run refers to a base that is not available elsewhere.
    """
    base = model.base.name if model.base is not None else None
    if base is not None and not self_contained and is_local(base):
        raise UserError(
            f"The run's base {base} is a folder on this machine, which is not available elsewhere: push with "
            "--self-contained."
        )
    # Name the base by its hub id and revision, not by the place where this machine keeps a copy.
    if model.base is not None and config.model.backbone is not None and not self_contained:
        backbone = dataclasses.replace(config.model.backbone, name=model.base.name, revision=model.base.revision)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    write_run(folder, config, model, state, self_contained)
    on_hub = base is not None and not is_local(base) and not base.startswith("embedded/")
    build_card(publishable(config), state, repo, base if on_hub else None, license).save(folder / "README.md")


def build_card(config: Config, state: dict, repo: str, base: str | None, license: str | None) -> ModelCard:
    """Build the model card of a run.

    Args:
        config: publishable configuration of the run.
        state: state of its checkpoint, with the progress and the best scores.
        repo: hub id ``owner/name``.
        base: hub id of the base model, or ``None``.
        license: license id, or ``None``.
    """
    progress = state.get("progress") or {}
    # The scores belong to the best checkpoint; a later one has not been scored.
    best = state.get("best") or {} if progress.get("step") == progress.get("best_step") else {}
    # Storage of the backbone, in words.
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
    # Metadata that the hub reads.
    data = ModelCardData(
        library_name="tracknet",
        license=license,
        base_model=base,
        pipeline_tag="object-detection",
        tags=["ball-tracking", "heatmap"],
    )
    # Table of scores.
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
            f"Scores on its validation games{_count_balls(best)}, at a tolerance of {tolerance:g} px in source"
            " images:\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n"
        )
        if config.data.allow_leaks:
            scores += (
                "\nThe model was trained with `data.allow_leaks`: its training data may contain games or frames of the"
                " validation data. The scores do not show how well it tracks balls in games that it has never seen.\n"
            )
    # Text with the commands to use the model.
    name = config.model.backbone.name if config.model.backbone else "no backbone"
    text = (
        f"# {repo.rpartition('/')[2]}\n\nDetects the ball in video: the input is {length} consecutive frames of"
        f" {wh[0]}x{wh[1]}, the output one heatmap per frame. TrackNet `{config.model.name}` on `{name}`, with the"
        f" backbone stored in {stored}{lora}.\n\n{scores}\n```bash\ntracknet predict --run {repo} rally.mp4 --out"
        f" out/\n```\n\n```python\nimport tracknet\n\nmodel = tracknet.load('{repo}')  # uint8 frames [batch, {length},"
        f" 3, {wh[1]}, {wh[0]}] -> logits\n```\n\nMade with TrackNet {__version__}. Settings: `config.yaml`.\n"
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _count_balls(scores: dict) -> str:
    """Return the number of balls and frames that scores were measured on, in parentheses, or an empty string.

    The balls are the sum of those found, those found at a wrong position, and those missed.
    """
    counts = [count for name in ("tp", "fp1", "fn") if isinstance(count := scores.get(name), int)]
    if len(counts) < 3:
        return ""
    return (
        f" ({sum(counts):,} balls in {scores.get('num_frames', sum(counts)):,}"
        f" frames{', too few to rely on' if sum(counts) < 100 else ''})"
    )


def upload(folder: Path, repo: str, private: bool, revision: str | None) -> str:
    """Upload a published folder to the hub and return its address.

    Args:
        folder: folder written by ``write_published``.
        repo: hub id ``owner/name``; created if it does not exist.
        private: whether a created repository is private.
        revision: branch to write to, created if it does not exist; ``None`` for the default branch.

    Raises:
        UserError: if the user is not logged in or may not write, or the network is not available.
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
            "using a token with write access. To inspect the files without uploading them, use --dry-run."
        ) from error
    return str(commit)
