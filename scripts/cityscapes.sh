#!/usr/bin/env bash
# Cityscapes: train, fine-tune, sample, evaluate, with the published settings. scripts/run_benchmark.sh has the stages.
name=cityscapes run=Cityscapes classes=35 no_instance=False test_images=500
source "$(dirname "$0")/run_benchmark.sh"
