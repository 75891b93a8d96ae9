#!/usr/bin/env bash
# Train the zoo's drafters for SmolLM2 on one GPU: the target writes a corpus, the drafters learn from it in turn.
#
#   scripts/zoo.sh PROMPTS_FOLDER EVALUATION_FILE OUT_FOLDER [CORPUS_MINUTES] [UNIT_MINUTES]
#
# The corpus is written by three processes, one per temperature: the host is what limits them. Trainings run one after
# the other (side by side they are slower; docs/log.md), the longest first; UNIT_MINUTES scales them all. Killed and
# started again, every step goes on where it was.
set -uo pipefail
prompts=$1 evaluation=$2 out=$3 corpus_minutes=${4:-3} unit=${5:-2}
mkdir -p "$out/logs"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
outpace() { python3 -m outpace.cli "$@"; }

writers=()
for temperature in 0 0.7 1; do
  outpace corpus smollm2 --out "$out/corpus" --prompts "$prompts" --exclude "$evaluation" --temperatures "$temperature" \
    --max-new-tokens 384 --max-prompt 640 --max-batch 192 --shard 256 --minutes "$corpus_minutes" \
    > "$out/logs/corpus-$temperature.log" 2>&1 &
  writers+=($!)
  sleep 4 # the first one writes corpus.json
done
wait "${writers[@]}"

train() { # name spec units
  outpace train smollm2 --drafter "$2" --corpus "$out/corpus" --out "$out/$1" --optimizer adamw --eval-every 0 \
    --eval-prompts 16 --eval-tokens 96 --minutes "$(python3 -c "print($3 * $unit)")" > "$out/logs/train-$1.log" 2>&1
  tail -n 1 "$out/logs/train-$1.log"
}
train eagle3 "eagle3:layers=2,vocabulary=16384,nodes=31,draft_len=7" 3
train ptp "ptp:any_temperature=true,rank=40" 2
train mask "ptp:mode=mask,any_temperature=true,rank=40" 2
train mtp "mtp:vocabulary=16384,nodes=31" 1
train medusa "medusa:vocabulary=16384,nodes=31" 0.5
