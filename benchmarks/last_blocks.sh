#!/usr/bin/env bash
# Memory and speed of training.train_last_blocks in every mode, beside full fine-tuning, a frozen backbone and LoRA:
#     bash benchmarks/last_blocks.sh facebook/dinov2-small
# Plans the memory of 16 windows at 512x288 and times 4 windows at 256x144 in alternating rounds; about five minutes on
# two CPU cores. Writes benchmarks/results/last_blocks/{memory,speed}.json.
set -euo pipefail
cd "$(dirname "$0")/.."
backbone=${1:?usage: last_blocks.sh BACKBONE}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/training"
# The modes without checkpointing, once with all blocks and once with the last six and four.
for mode in default lora int8 qlora; do
  sed 's/gradient_checkpointing: .*/gradient_checkpointing: none/' "configs/training/$mode.yaml" > "$work/training/$mode-all.yaml"
  for last in 6 4; do
    { cat "$work/training/$mode-all.yaml"; echo "train_last_blocks: $last"; } > "$work/training/$mode-last-$last.yaml"
  done
done
modes=(default frozen)
for mode in lora int8 qlora; do modes+=("$mode-all" "$mode-last-6" "$mode-last-4"); done
modes+=(default-last-6 default-last-4)
common=(--data synthetic --model vit_heatmap --config-dir "$work" --modes "${modes[@]}" "model.backbone.name=$backbone")
small=(data.synthetic.games=4 'data.synthetic.size=[256,144]' 'data.preprocess.resize=[256,144]'
  'data.split.train_games=[1,2]' 'data.split.val_games=[3]' 'data.split.test_games=[4]' "data.root=$work/rallies")
out=benchmarks/results/last_blocks
tracknet benchmark "${common[@]}" --what memory --out "$work/memory" --json "$out/memory.json" training.batch_size=16
tracknet benchmark "${common[@]}" --what speed --rounds 3 --out "$work/speed" --json "$out/speed.json" \
  training.batch_size=4 "${small[@]}"
