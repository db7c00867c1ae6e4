#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: tests marked gpu, then speed and peak memory for ViT-S and ViT-B, and accuracy.
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
# Each row of speed has the peaks of the allocator too; what is planned for other sizes needs no GPU.
vit() { # seconds, name, size, options
    measure "$1" "$2" --model vit_heatmap --what speed --rounds 3 "${@:4}" model.backbone.name=facebook/dinov2-"$3" \
        model.backbone.weights=random training.batch_size=16
}
vit 110 vit-small small --triton
vit 140 vit-base base --triton
vit 110 vit-small-compiled small --compile
measure 80 accuracy-vit-tiny --model vit_tiny_heatmap --what accuracy --seeds 1 --steps 200
