#!/usr/bin/env bash
# Train the two embedded backbones on synthetic rallies and write them here (about half an hour on two CPU cores).
#   bash tracknet/weights/make.sh
# The detail branch is off, so that the backbone itself has to find the ball.
set -euo pipefail
cd "$(dirname "$0")/../.."
games=$(seq -s, 1 60)
for kind in vit convnext; do
  steps=$([ $kind = vit ] && echo 1200 || echo 400)
  out=outputs/weights/$kind
  rm -rf "$out" "tracknet/weights/${kind}_tiny.new"
  tracknet train --data synthetic --model ${kind}_tiny_heatmap --training default --seed 1 --output-dir "$out" \
    data.root=data/weights_rallies data.synthetic.games=64 data.synthetic.seed=1 \
    "data.split.train_games=[$games]" 'data.split.val_games=[61,62]' 'data.split.test_games=[63,64]' \
    'data.augment.crop=[256,144]' model.backbone.weights=random model.decoder.detail=false \
    training.batch_size=16 training.max_steps=$steps training.precision=bf16 \
    training.optimizer.lr=1e-3 training.optimizer.backbone_lr_scale=1.0 training.scheduler.warmup_epochs=1
  tracknet export --run "$out"/runs/* --checkpoint best --format backbone --out "tracknet/weights/${kind}_tiny.new"
  rm -r "tracknet/weights/${kind}_tiny"
  mv "tracknet/weights/${kind}_tiny.new" "tracknet/weights/${kind}_tiny"
done
