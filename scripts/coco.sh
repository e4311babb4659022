#!/usr/bin/env bash
# COCO-Stuff: train, fine-tune, sample, evaluate, with the published settings. scripts/run_benchmark.sh has the stages.
name=coco run=COCO classes=183 no_instance=False test_images=5000
source "$(dirname "$0")/run_benchmark.sh"
