#!/usr/bin/env bash
# Memory and speed of every training mode at its budgets, beside full fine-tuning, a frozen backbone and LoRA in 16 bit:
#     bash benchmarks/modes.sh dinov2-small vit_heatmap facebook/dinov2-small
#     bash benchmarks/modes.sh dinov2-base vit_heatmap facebook/dinov2-base model.backbone.weights=random
#     bash benchmarks/modes.sh convnext-tiny convnext_fpn_heatmap facebook/convnext-tiny-224 model.backbone.weights=random
#     MODES="default frozen int8 qlora" BATCH=1 \
#       bash benchmarks/modes.sh dinov2-large vit_heatmap facebook/dinov2-large model.backbone.weights=random
# The kinds of adapters, in benchmarks/results/adapters:
#     GROUP=adapters MODES="default frozen lora lora-dora lora-vera lora-miss lora-oft" \
#       bash benchmarks/modes.sh dinov2-small vit_heatmap facebook/dinov2-small
# Plans the memory of 16 windows at 512x288 and times 4 windows at 256x144 in alternating rounds. BATCH=1 suits a
# backbone that takes more memory than this machine has. Random weights have no outliers, so int8 is faster with them.
# Writes benchmarks/results/GROUP/NAME-{memory,speed}.json; GROUP is modes.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?usage: modes.sh NAME MODEL BACKBONE [OVERRIDES]} model=$2 backbone=$3
shift 3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/training"
# Each mode as shipped, with all blocks, and at the other budgets.
for mode in int8 qlora; do
  sed '/^train_last_blocks/d' "configs/training/$mode.yaml" > "$work/training/$mode-all.yaml"
  for budget in lean free; do
    sed "s/  budget: .*/  budget: $budget/" "configs/training/$mode.yaml" > "$work/training/$mode-$budget.yaml"
  done
done
# Kinds of adapters in 16 bits: DoRA, and those of peft that take other settings.
sed 's/^  bias: none/  bias: none\n  use_dora: true/' configs/training/lora.yaml > "$work/training/lora-dora.yaml"
for kind in vera miss oft; do
  sed -e "s/^  enabled: true/  enabled: true\n  peft_type: ${kind^^}/" -e '/^  lora_\(alpha\|dropout\)/d' \
    configs/training/lora.yaml > "$work/training/lora-$kind.yaml"
done
sed -i '/^  r: /d' "$work/training/lora-oft.yaml"
sed -i 's/^  r: .*/  r: 256/' "$work/training/lora-vera.yaml" # it trains one value per rank, not a row
modes=(${MODES:-default frozen lora int8 int8-lean int8-free int8-all qlora qlora-lean qlora-free qlora-all int8_full})
common=(--data synthetic --model "$model" --config-dir "$work" --modes "${modes[@]}" "model.backbone.name=$backbone" "$@")
small=(data.synthetic.games=4 'data.synthetic.size=[256,144]' 'data.preprocess.resize=[256,144]'
  'data.split.train_games=[1,2]' 'data.split.val_games=[3]' 'data.split.test_games=[4]' "data.root=$work/rallies")
out=benchmarks/results/${GROUP:-modes}
mkdir -p "$out"
tracknet benchmark "${common[@]}" --what memory --out "$work/memory" --json "$out/$name-memory.json" training.batch_size=16
tracknet benchmark "${common[@]}" --what speed --as-shipped --rounds "${ROUNDS:-5}" --out "$work/speed" \
  --json "$out/$name-speed.json" "training.batch_size=${BATCH:-4}" "${small[@]}"
