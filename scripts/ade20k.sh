#!/usr/bin/env bash
# ADE20K: train, fine-tune, sample, evaluate, with the published settings. scripts/run_benchmark.sh has the stages.
name=ade20k run=ADE20K classes=151 no_instance=True test_images=2000
source "$(dirname "$0")/run_benchmark.sh"
