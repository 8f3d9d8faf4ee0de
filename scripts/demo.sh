#!/usr/bin/env bash
# Trains TRADES on real handwritten digits, plain and with BulletTrain, and prints both side by side.
set -euo pipefail
runs=${1:-runs/demo}

rm -rf "$runs/TRADES" "$runs/BulletTrain"
btrain train experiment=demo bt=uniform run.dir="$runs/TRADES"
btrain train experiment=demo bt=bullettrain run.dir="$runs/BulletTrain"
echo
btrain report "$runs/TRADES" "$runs/BulletTrain"
