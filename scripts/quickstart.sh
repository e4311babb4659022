#!/usr/bin/env bash
# Trains, fine-tunes and samples SDM on an embedded data set of painted scenes: minutes on two CPU cores.
# Everything goes to QUICKSTART (default OUTPUT/quickstart). Started again, it goes on where it was.
# RANKS (2) processes train for STEPS (400) steps, and fine-tune for a quarter as many. PREDICT is what the network predicts:
# v, the velocity (default); xstart, the image; or eps, the noise, as published.
source "$(dirname "$0")/common.sh"
check_number STEPS 4 1 "its 4th part fine-tunes, where 0 would be without end"
check_number RANKS 1
choose_prediction "${PREDICT:-v}"
steps=${STEPS:-400}
use_environment mpi
out=${QUICKSTART:-OUTPUT/quickstart}
# one rank per GPU; without a GPU, two on the CPU
ranks=${RANKS:-$(python -c "import torch; print(torch.cuda.device_count() or 2)")}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one thread per rank: the ranks are the parallelism

data=$out/data results=$out/results
if [ ! -e "$data/dataset.json" ]; then
  python scripts/scenes/make_scenes.py --out "$data" --size 32 --train 1000 --val 64
fi

# The published settings, in small and with the rates of a short training, but for one: the network predicts the velocity
# instead of the noise.
# Arrays, not text: QUICKSTART may hold spaces.
model=(--data_dir "$data" --dataset_mode custom --num_classes 9 --no_instance True --class_cond True --image_size 32
  --num_channels 32 --channel_mult 1,2,2 --num_res_blocks 1 --attention_resolutions 8 --num_head_channels 32
  --resblock_updown True --use_scale_shift_norm True --learn_sigma True "${prediction[@]}")
training=(--batch_size $((ranks < 8 ? 8 / ranks : 1)) --ema_rate 0.98 --save_interval 100 --log_interval 20
  --keep_checkpoints 2)

echo "1/4  training: $out/train"
mpiexec -n "$ranks" python image_train.py "${model[@]}" "${training[@]}" --logdir "$out/train" --lr 1e-3 \
  --warmup_steps 50 --max_steps "$steps"
echo "2/4  fine-tuning with label drop: $out/finetune"
mpiexec -n "$ranks" python image_train.py "${model[@]}" "${training[@]}" --logdir "$out/finetune" --lr 3e-4 \
  --drop_rate 0.2 --max_steps $((steps / 4)) --resume_checkpoint "$out/train/model.pt"
echo "3/4  sampling with guidance: $results"
mpiexec -n "$ranks" python image_sample.py "${model[@]}" --model_path "$out/finetune/ema_0.98_best.pt" \
  --results_path "$results" --batch_size 16 --num_samples 64 --s 1.5 --sampler dpmsolver++ --num_steps 20
echo "4/4  scoring"
python scripts/scenes/score_scenes.py "$results" --data "$data" --json "$out/figures.json"

cat <<END

Look at    $results/overview.png   (layout, painted scene, sample)
Figures    $out/figures.json
Losses     $out/train/progress.csv
Next       docs/your-own-data.md: --dataset_mode custom takes any folder of images and label maps
END
