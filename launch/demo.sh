#!/usr/bin/env bash
# The whole job on generated data, from nothing to a report: what `make demo` runs. If you run it again, finished
# steps are skipped and the others resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export NPROC=${NPROC:-2}
began=$SECONDS

coupalign synth data/demo/refshapes --images 6600 --seed 0
coupalign pack shards/recipes/refshapes.yaml root=data/demo/refshapes --out data/demo/shards
launch/deepspeed.sh train configs/demo.yaml
launch/deepspeed.sh eval runs/demo --language-blind --pictures 8
coupalign report runs/demo

cat <<EOF

the demo took $((SECONDS - began)) s
score     runs/demo/score.json
pictures  runs/demo/pictures/
page      runs/demo/report.html
MLflow    .venv/bin/mlflow ui --backend-store-uri sqlite:///$PWD/runs/mlflow.db
EOF
