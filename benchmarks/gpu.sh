#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: tests marked gpu, then memory and speed for ViT-S and ViT-B, and accuracy.
#   bash benchmarks/gpu.sh                 results go to benchmarks/results/gpu/
#   bash benchmarks/gpu.sh --dry-run       check every command and say what would be measured
# Backbones have random weights: neither memory nor speed depends on them, and no hub is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
dry=()
[ "${1:-}" = "--dry-run" ] && dry=(--dry-run)
results=${RESULTS:-benchmarks/results/gpu}
[ ${#dry[@]} -gt 0 ] || { mkdir -p "$results"; timeout 150 "$python" -m pytest -m gpu || echo "gpu tests: not all passed"; }
for size in small base; do
    timeout 170 "$python" -m tracknet.scripts.benchmark --data synthetic --model vit_heatmap --what memory speed --rounds 5 --compile \
        model.backbone.name=facebook/dinov2-$size model.backbone.weights=random training.batch_size=16 \
        --json "$results/vit-$size.json" "${dry[@]}" || echo "vit-$size: not finished"
done
timeout 110 "$python" -m tracknet.scripts.benchmark --data synthetic --model vit_tiny_heatmap --what accuracy --seeds 1 --steps 200 \
    --json "$results/accuracy-vit-tiny.json" "${dry[@]}" || echo "accuracy: not finished"
