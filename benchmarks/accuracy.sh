#!/usr/bin/env bash
# Measure one seed of a row of the README's accuracy table (benchmarks/results/accuracy/tennis-game9.json): pretrain on rendered
# rallies, fine-tune on real tennis, score on the held-out game.
#
#   bash benchmarks/accuracy.sh TENNIS MODEL MODE SEED [OVERRIDES of the fine-tuning…]
#   bash benchmarks/accuracy.sh data/tennis vit_heatmap qlora 0 model.backbone.name=facebook/dinov2-small
#   bash benchmarks/accuracy.sh data/tennis wasb_hrnet default 0
#
# TENNIS is a folder with game1 … game9 of the TrackNet tennis dataset. On two CPU cores, pretraining takes about an hour and the rest
# half an hour. All modes and seeds of a model share the pretraining (outputs/accuracy/MODEL/pretraining). The scores are printed and
# written to the files that the last line names.
set -euo pipefail
tennis=$1 model=$2 mode=$3 seed=$4
shift 4
home=outputs/accuracy/$model
name=$mode-$seed
# The pretraining takes those overrides of the fine-tuning that select the backbone.
backbone=()
for setting in "$@"; do case $setting in model.backbone.*) backbone+=("$setting") ;; esac; done

# Learning rates: 1e-3 for heads trained from scratch, a twentieth of it for pretrained backbones, 2e-4 for adapters.
case $model-$mode in
  tracknet_v2-default | wasb_hrnet-default) rates=(training.optimizer.lr=1e-3) ;;
  *_tiny_*-default) rates=(training.optimizer.lr=1e-3 training.optimizer.backbone_lr_scale=0.3) ;;
  *-default) rates=(training.optimizer.lr=1e-3 training.optimizer.backbone_lr_scale=0.05) ;;
  *-frozen) rates=(training.optimizer.lr=1e-3) ;;
  *-lora) rates=(training.optimizer.lr=2e-4 training.optimizer.decoder_lr_scale=5) ;;
  # The rows of the table train all blocks.
  *-int8) rates=(training.optimizer.lr=3e-4 training.optimizer.decoder_lr_scale=3.3 training.train_last_blocks=null) ;;
  *-qlora) rates=(training.optimizer.lr=2e-4 training.optimizer.decoder_lr_scale=5 training.train_last_blocks=null) ;;
  *) echo "error: no recipe for --model $model --training $mode (modes: default, frozen, lora, int8, qlora; baselines: default)" >&2; exit 2 ;;
esac
# Gradient checkpointing is off: recomputation changes the results by rounding only, and takes time.
case $mode in default) ;; *) rates+=(training.memory_optimization.gradient_checkpointing=none) ;; esac
pretraining_rates=(training.optimizer.lr=1e-3)
case $model in
  *_tiny_*) pretraining_rates=(training.optimizer.lr=2e-3 training.optimizer.backbone_lr_scale=0.3) ;;
  *_heatmap) pretraining_rates+=(training.optimizer.backbone_lr_scale=0.05) ;;
esac

# Pretrain once per model; an interrupted pretraining, which has no metrics.json, is started again.
if ! compgen -G "$home/pretraining/runs/*/metrics.json" > /dev/null; then
  rm -rf "$home/pretraining"
  tracknet train --data synthetic --model "$model" --training default --output-dir "$home/pretraining" \
    data.root=data/accuracy_rallies data.synthetic.games=64 data.synthetic.seed=1 "data.split.train_games=[$(seq -s, 1 60)]" \
    'data.split.val_games=[61,62]' 'data.split.test_games=[63,64]' 'data.augment.crop=[256,144]' training.batch_size=8 \
    training.max_steps=500 training.scheduler.warmup_epochs=0.1 "${pretraining_rates[@]}" "${backbone[@]}"
fi
# Fine-tune from the pretrained weights, replacing an earlier run of the same mode and seed.
rm -rf "${home:?}/$name"
tracknet train --data tracknet --model "$model" --training "$mode" --seed "$seed" --output-dir "$home/$name" \
  data.root="$tennis" 'data.split.train_games=[1,3,5,6]' 'data.split.val_games=[7]' 'data.split.test_games=[9]' \
  'data.preprocess.resize=[768,432]' 'data.augment.crop=[280,168]' training.batch_size=8 training.max_steps=200 \
  training.scheduler.warmup_epochs=0.2 training.loss.radius=2.0 training.init_from="$(echo "$home"/pretraining/runs/*)" "${rates[@]}" "$@"
# Score along the ball's path and by the highest peak of each heatmap.
for reading in path peak; do
  settings=()
  # The highest peaks of the table are located by the centroid, like the first ones that were measured.
  [ $reading = path ] || settings=(evaluation.trajectory=false evaluation.subpixel=centroid)
  tracknet evaluate --run "$home/$name"/runs/* --json "$home/$name/$reading.json" "${settings[@]}"
done
echo "SCORES: $home/$name/peak.json (the table), $home/$name/path.json (as shipped)"
