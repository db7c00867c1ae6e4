#!/usr/bin/env bash
# Train what ships with the package on rendered rallies, and write it here (about an hour on two CPU cores).
#   bash tracknet/weights/make.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

# train NAME KIND OVERRIDES…
train() {
  rm -rf "outputs/weights/$1"
  tracknet train --data synthetic --model "$2_tiny_heatmap" --training default --seed 1 --output-dir "outputs/weights/$1" \
    'data.augment.crop=[256,144]' "${@:3}"
}

# export NAME OPTIONS…
export_() {
  rm -rf "tracknet/weights/$1.new"
  tracknet export --run outputs/weights/"$1"/runs/* --checkpoint best --out "tracknet/weights/$1.new" "${@:2}"
  rm -rf "tracknet/weights/$1"
  mv "tracknet/weights/$1.new" "tracknet/weights/$1"
}

# The backbones: without the detail branch, so that the backbone itself has to find the ball.
for kind in vit convnext; do
  train ${kind}_tiny $kind data.root=data/weights_backbones data.synthetic.games=64 data.synthetic.seed=1 \
    "data.split.train_games=[$(seq -s, 1 60)]" 'data.split.val_games=[61,62]' 'data.split.test_games=[63,64]' \
    model.backbone.weights=random model.decoder.detail=false training.batch_size=16 training.precision=bf16 \
    training.max_steps=$([ $kind = vit ] && echo 1200 || echo 400) \
    training.optimizer.lr=1e-3 training.optimizer.backbone_lr_scale=1.0 training.scheduler.warmup_epochs=1
  export_ ${kind}_tiny --format backbone
done

# A whole model, on more rallies and a wider range of sizes.
train vit_tiny_heatmap vit data.root=data/weights_rallies data.synthetic.games=200 data.synthetic.seed=2 \
  "data.split.train_games=[$(seq -s, 1 196)]" 'data.split.val_games=[197,198]' 'data.split.test_games=[199,200]' \
  'data.augment.scale=[0.8,1.7]' training.batch_size=8 training.max_steps=2200 training.loss.radius=2.0 \
  training.optimizer.lr=2e-3 training.optimizer.backbone_lr_scale=0.3 training.scheduler.warmup_epochs=0.2
# Real broadcasts are sharper than they are large: a ball of three pixels is gone at 512x288.
export_ vit_tiny_heatmap --format merged --dtype bf16 'data.preprocess.resize=[768,432]'
