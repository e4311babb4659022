#!/usr/bin/env bash
# CamVid from scratch: trains, fine-tunes with label drop, samples, scores, compares settings, draws the pictures.
#   CAMVID=path/to/CamVid bash scripts/camvid.sh            the CPU's size: 64x48 pixels, some two hours on two cores
#   CAMVID=path/to/CamVid SIZE=gpu bash scripts/camvid.sh   192x144 pixels; made for one H100 (not run yet)
# CAMVID is the folder of the data (scripts/data/prepare_camvid.py tells its layout). Everything goes to OUT (OUTPUT/camvid-cpu or
# OUTPUT/camvid-gpu; with another PREDICT or SEED that is part of the name). Started again, it goes on where it was.
# STEPS and RANKS change the length of training and the number of processes, PREDICT what the network predicts: v, the
# velocity; xstart, the image; or eps, the noise, as published. SEED (0) is that of the generator's trainings; the
# segmentation network that scores has always the same.
camvid=${CAMVID:+$(realpath "$CAMVID" 2> /dev/null)} # before common.sh leaves the folder that it may be relative to
source "$(dirname "$0")/common.sh"
[ -d "$camvid" ] || refuse "CAMVID is ${CAMVID:-empty}, no folder; name that of CamVid, as CAMVID=data/CamVid (docs/training.md says where it comes from)"
check_number RANKS 1
check_number STEPS 24 24 "its 4th, 6th and 8th part are used"
check_number SEED 0
size=${SIZE:-cpu} predict=${PREDICT:-v} seed=${SEED:-0}
name=camvid-$size
[ "$predict" = v ] || name=$name-$predict
[ "$seed" = 0 ] || name=$name-seed$seed
out=${OUT:-OUTPUT/$name}
case $size in
  cpu)
    ranks=${RANKS:-2} steps=${STEPS:-3600} precision=bf16 pixels=48
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one thread per rank: the ranks are the parallelism
    network=(--num_channels 32 --channel_mult 1,2,3,4 --num_res_blocks 1 --attention_resolutions 12,6 --num_head_channels 32)
    batch=8 lr=5e-4 ema=0.995 sampling_batch=16 ;;
  gpu) # 51 tera-operations a step (FlopCounterMode): at a quarter of an H100's peak, a quarter of an hour
    ranks=${RANKS:-1} steps=${STEPS:-4800} precision=bf16 pixels=144
    network=(--num_channels 128 --channel_mult 1,1,2,3,4 --num_res_blocks 2 --attention_resolutions 36,18,9 --num_head_channels 64)
    batch=32 lr=2e-4 ema=0.999 sampling_batch=64 ;;
  *) refuse "SIZE is $size; choose cpu or gpu" ;;
esac
choose_prediction "$predict"
((ranks <= batch)) || refuse "RANKS is $ranks; the $batch images of a step leave some without work: give at most $batch"
use_environment mpi,plots
interval=$((steps / 8))                            # a save falls on a quarter of the steps, which is compared
launcher=$([ "$ranks" = 1 ] || echo mpiexec -n "$ranks") # one process needs no MPI
data=$out/data segmenter=$out/segmenter.pt results=$out/results

python scripts/data/prepare_camvid.py --source "$camvid" --out "$data"
python scripts/data/prepare_camvid.py --source "$camvid" --out "$out/subset" --every 6

# As published but for the size, the rates and the augmentation that go with it, and two flags: the velocity, which so
# short a training draws with more detail than the image; and no learned variance, which the solver used here does not need.
model=(--data_dir "$data" --dataset_mode custom --no_instance True --class_cond True --image_size "$pixels" "${network[@]}"
  --resblock_updown True --use_scale_shift_norm True "${prediction[@]}" --learn_sigma False --precision "$precision")
training=(--batch_size $((batch / ranks)) --ema_rate "$ema" --save_interval "$interval" --log_interval 50 --val_images 32
  --scale_jitter 0.2 --sample_interval "$interval" --seed "$seed")
sampling=(--precision "$precision" --s 1.5 --sampler dpmsolver++ --num_steps 20)

train() { # train LOGDIR STEPS FLAGS...
  local logdir=$1 steps=$2
  shift 2
  $launcher python image_train.py "${model[@]}" "${training[@]}" --logdir "$logdir" --max_steps "$steps" "$@"
}

echo "1/6  the segmentation network that scores samples: $segmenter"
[ -e "$segmenter" ] || python benchmarks/segmenter.py train --data_dir "$data" --image_size "$pixels" --out "$segmenter"
echo "2/6  training: $out/train"
train "$out/train" "$steps" --lr "$lr" --warmup_steps 100 --loss_weighting none
echo "3/6  fine-tuning with label drop: $out/finetune"
train "$out/finetune" $((steps / 6)) --lr "$(python -c "print($lr / 5)")" --drop_rate 0.2 --loss_weighting none \
  --resume_checkpoint "$out/train/model.pt"
echo "4/6  sampling: $results"
best=$out/finetune/ema_${ema}_best.pt
for split in val test; do
  $launcher python image_sample.py --model_path "$best" --results_path "$results/$split" --split "$split" \
    --batch_size "$sampling_batch" "${sampling[@]}"
done
$launcher python image_sample.py --model_path "$best" --results_path "$results/several" --data_dir "$out/subset" \
  --samples_per_layout 10 --batch_size 10 "${sampling[@]}"
echo "5/6  the same by loss weighting, for a quarter of the steps: $out/min_snr"
train "$out/min_snr" $((steps / 4)) --lr "$lr" --warmup_steps 100 --loss_weighting min_snr
echo "6/6  scores, settings compared, pictures"
python benchmarks/camvid.py --out "$out" --ema "$ema" --steps "$steps" --precision "$precision" \
  --ranks "$ranks" --batch_size "$sampling_batch"
python assets/make_samples.py --run "$out" --results results/test --out "$out/results.png"
python assets/make_samples.py --run "$out" --results results/several --out "$out/diversity.png"

cat <<END

Look at    $results/val/overview.png, $out/*.png
Figures    $out/figures.json, $out/figures.md
END
