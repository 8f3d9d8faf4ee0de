#!/usr/bin/env bash
# The paper's two dials, N_R and γ (Figures 6 and 7), as one sweep; run folders land in runs/.
# Arguments are handed on: scripts/sweep.sh dataset=mnist model=small_cnn seed=0,1,2
set -euo pipefail

btrain train --multirun bt.n_r=0,1,2,3 bt.gamma=0.65,0.8,0.9 "$@"
