#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: tests marked gpu, then memory and speed for ViT-S and ViT-B, and accuracy.
#   bash benchmarks/gpu.sh                 results go to benchmarks/results/gpu/
#   bash benchmarks/gpu.sh --dry-run       check every command and say what would be measured
# Backbones have random weights: neither memory nor speed depends on them, and no hub is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} results=benchmarks/results/gpu dry=${1:-}

measure() { # seconds, name, arguments
    local limit=$1 name=$2 last=(--json "$results/$2.json")
    [ "$dry" = "--dry-run" ] && last=(--dry-run)
    timeout "$limit" "$python" -m tracknet.scripts.benchmark --data synthetic "${@:3}" "${last[@]}" || echo "$name: not finished"
}

if [ "$dry" != "--dry-run" ]; then
    mkdir -p "$results"
    timeout 150 "$python" -m pytest -m gpu || echo "gpu tests: not all passed"
fi
for size in small base; do
    measure 170 "vit-$size" --model vit_heatmap --what memory speed --rounds 5 --compile model.backbone.name=facebook/dinov2-$size \
        model.backbone.weights=random training.batch_size=16
done
measure 110 accuracy-vit-tiny --model vit_tiny_heatmap --what accuracy --seeds 1 --steps 200
