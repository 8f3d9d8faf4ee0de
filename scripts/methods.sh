#!/usr/bin/env bash
# Every defense, rival and allocator on one data set, and their table:
#   scripts/methods.sh runs/methods dataset=mnist model=small_cnn dataset.train_examples=6000 attack.epsilon=0.1
# SEEDS (default "0 1 2") and EPOCHS (default 10) are taken from the environment. Finished runs are not repeated.
set -euo pipefail
folder=$1
shift
epochs=${EPOCHS:-10}

run() {  # label, settings
  local label=$1
  shift
  for seed in ${SEEDS:-0 1 2}; do
    btrain train "${common[@]}" "$@" seed="$seed" run.dir="$folder/$label-seed$seed"
  done
}

common=("$@" "train.epochs=$epochs")
run trades bt=uniform
run trades_bt bt=bullettrain
for seed in ${SEEDS:-0 1 2}; do  # random examples at the shares, and so the budget, that BulletTrain had
  shares=$(python -c 'import json, sys; s = json.load(open(sys.argv[1])); b, r = round(s["f_b"], 3), round(s["f_r"], 3); print(f"[{b},{r},{1 - b - r:.3f}]")' "$folder/trades_bt-seed$seed/summary.json")
  SEEDS=$seed run trades_random_equal bt=random "bt.fractions=$shares"
done
run trades_random bt=random
run trades_gaussian bt=gaussian
run trades_early_exit bt=early_exit
run trades_oracle bt=oracle
run trades_fast rival=fast
run trades_fast3 rival=fast bt.n_b=3
run trades_yopo rival=yopo
run mart defense=mart bt=uniform
run mart_bt defense=mart bt=bullettrain
run mart_fast defense=mart rival=fast
run pgd defense=pgd bt=uniform
run pgd_bt defense=pgd bt=bullettrain
run pgd_fast defense=pgd rival=fast
run pgd_gradalign defense=pgd rival=gradalign
run pgd_mma defense=pgd rival=mma
run augmix defense=augmix bt=uniform
run augmix_no_jsd defense=augmix bt=uniform defense.jsd=false
run augmix_bt defense=augmix bt=bullettrain
common=("$@" "train.epochs=$(((epochs + 7) / 8))")  # of eight replays
run pgd_free defense=pgd rival=free
btrain report --merge-seeds "$folder"
