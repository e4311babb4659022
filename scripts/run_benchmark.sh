# Sourced by ade20k.sh, cityscapes.sh, celeba.sh and coco.sh: the published settings, and the four stages.
# usage: bash scripts/ade20k.sh [train|finetune|sample|evaluate|all]      default: all
# Overridable from the environment: RANKS (8), DATA, OUTPUT, RESULTS, TRAIN_STEPS, FINETUNE_STEPS, NUM_SAMPLES,
# PRECISION (fp16), EXTRA (flags added to every stage of training and sampling).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
check_number RANKS 1
check_number TRAIN_STEPS 0
check_number FINETUNE_STEPS 0
check_number NUM_SAMPLES 1

RANKS=${RANKS:-8}
DATA=${DATA:-./data/$name}
OUTPUT=${OUTPUT:-OUTPUT/$run-SDM-256CH}
RESULTS=${RESULTS:-RESULTS/$run-SDM-256CH}
# 0: until interrupted. The paper does not say when it stopped.
TRAIN_STEPS=${TRAIN_STEPS:-0}
FINETUNE_STEPS=${FINETUNE_STEPS:-0}
NUM_SAMPLES=${NUM_SAMPLES:-$test_images}
EXTRA=${EXTRA:-}

# An array, not text: DATA may hold spaces.
model=(--data_dir "$DATA" --dataset_mode "$name" --image_size 256 --num_classes "$classes" --no_instance "$no_instance"
  --class_cond True --attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --noise_schedule linear
  --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True
  --precision "${PRECISION:-fp16}" --use_scale_shift_norm True)

train() {
  mpiexec -n "$RANKS" python image_train.py "${model[@]}" --logdir "$OUTPUT" --use_checkpoint True --lr 1e-4 \
    --batch_size 4 --max_steps "$TRAIN_STEPS" $EXTRA
}

finetune() {
  mpiexec -n "$RANKS" python image_train.py "${model[@]}" --logdir "$OUTPUT-FINETUNE" --use_checkpoint True --lr 2e-5 \
    --batch_size 4 --drop_rate 0.2 --resume_checkpoint "$OUTPUT/model.pt" --max_steps "$FINETUNE_STEPS" $EXTRA
}

sample() {
  mpiexec -n "$RANKS" python image_sample.py "${model[@]}" --model_path "$OUTPUT-FINETUNE/ema_0.9999_best.pt" \
    --results_path "$RESULTS" --batch_size 2 --num_samples "$NUM_SAMPLES" --s 1.5 $EXTRA
}

evaluate() {
  python evaluations/test_with_FID.py "$RESULTS/images" "$RESULTS/samples" --json "$RESULTS/fid.json"
}

case "${1:-all}" in
  train | finetune | sample | evaluate) "$1" ;;
  all)
    if [ "$TRAIN_STEPS" = 0 ] || [ "$FINETUNE_STEPS" = 0 ]; then
      echo "$0 all: set TRAIN_STEPS and FINETUNE_STEPS, or run the stages one by one and end training with Ctrl-C" >&2
      exit 2
    fi
    train && finetune && sample && evaluate
    ;;
  *) echo "usage: $0 [train|finetune|sample|evaluate|all]" >&2 && exit 2 ;;
esac
