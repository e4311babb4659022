#!/usr/bin/env bash
# CelebAMask-HQ: train, fine-tune, sample, evaluate, with the published settings. scripts/run_benchmark.sh has the stages.
name=celeba run=CelebA classes=19 no_instance=False test_images=2000
source "$(dirname "$0")/run_benchmark.sh"
